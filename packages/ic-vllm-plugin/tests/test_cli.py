"""`ic-vllm-plugin check`: the answer, its arithmetic and its exit status."""

import json
import subprocess
import sys

import pytest
from served_models import users_environment, write_checkpoint

from ic_vllm_plugin.cli import main

GIB = 1024**3


def checked(capsys, *arguments: str) -> tuple[int, dict]:
    status = main(["check", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_long_context_fits_an_8_gib_card(capsys):
    status, plan = checked(capsys, "ic-1b", "--gpu-memory-gib", "8", "--max-model-len", "131072")
    assert status == 0 and plan["fits"]
    memory = plan["memory"]
    assert memory["kv_cache"] == (131072 + 64) * 11520
    assert sum(memory.values()) <= plan["usable_bytes"] == int(8 * 0.9 * GIB)
    assert plan["full_sequences"] >= 2, "room for at least one more"
    assert plan["stock_bytes"] > GIB > memory["prefill"], "vLLM's own would take more than one of eight GiB"
    assert plan["flags"][:2] == ["--max-model-len", "131072"] and "--kv-cache-dtype" not in plan["flags"]


def test_a_million_tokens_fit_80_gb(capsys):
    status, plan = checked(capsys, "ic-1b", "--gpu-memory-gib", "79.6")
    assert status == 0 and plan["max_model_len"] == 1_048_576 and plan["kv_dtype"] == "bf16"


def test_fp8_is_taken_only_where_it_is_needed(capsys):
    arguments = ("ic-1b", "--gpu-memory-gib", "8", "--max-model-len", "600000")
    status, plan = checked(capsys, *arguments)
    assert status == 0 and plan["kv_dtype"] == "fp8"
    assert plan["flags"][-2:] == ["--kv-cache-dtype", "fp8"]
    status, plan = checked(capsys, *arguments, "--kv-cache-dtype", "auto")
    assert status == 1 and plan["kv_dtype"] == "bf16"


def test_the_longest_context_it_names_fits_and_one_page_more_does_not(capsys):
    fixed = ("--gpu-memory-gib", "4", "--max-num-seqs", "4", "--max-num-batched-tokens", "512")
    _, plan = checked(capsys, "ic-1b", *fixed, "--kv-cache-dtype", "auto")
    assert not plan["fits"] and plan["longest_tokens"] > 10_000
    for tokens, wanted in ((plan["longest_tokens"], 0), (plan["longest_tokens"] + 64, 1)):
        arguments = (*fixed, "--kv-cache-dtype", "auto", "--max-model-len", str(tokens))
        assert checked(capsys, "ic-1b", *arguments)[0] == wanted


def test_several_gpus_share_weights_but_not_the_cache(capsys):
    arguments = (
        "ic-1b",
        "--gpu-memory-gib",
        "24",
        "--max-num-seqs",
        "16",
        "--max-num-batched-tokens",
        "2048",
    )
    _, one = checked(capsys, *arguments)
    _, two = checked(capsys, *arguments, "--tensor-parallel-size", "2")
    assert two["memory"]["weights"] == one["memory"]["weights"] // 2
    assert two["memory"]["kv_cache"] == one["memory"]["kv_cache"]
    assert two["flags"][-2:] == ["--tensor-parallel-size", "2"]


def test_the_checkpoints_own_size_counts_and_float32_is_served_in_16_bits(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "model")
    stored = (folder / "model.safetensors").stat().st_size
    _, plan = checked(capsys, str(folder), "--gpu-memory-gib", "8")
    assert plan["memory"]["weights"] == stored // 2


def test_the_text_says_what_takes_how_much_and_what_helps(capsys):
    assert main(["check", "ic-1b", "--gpu-memory-gib", "8", "--max-model-len", "131072"]) == 0
    text = capsys.readouterr().out
    for said in (
        "KV cache of one sequence",
        "1.41 GiB",
        "It fits",
        "vllm serve MODEL --max-model-len 131072",
    ):
        assert said in text
    assert main(["check", "ic-1b", "--gpu-memory-gib", "4"]) == 1
    text = capsys.readouterr().out
    assert "It does not fit" in text and "--max-model-len of at most" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ic-2b", "--gpu-memory-gib", "8"], "model is 'ic-2b'; accepted: a preset"),
        (["ic-1b", "--gpu-memory-gib", "0"], "--gpu-memory-gib is 0.0; accepted: numbers above 0"),
        (["ic-1b", "--gpu-memory-gib", "nan"], "--gpu-memory-gib is nan"),
        (["ic-1b", "--gpu-memory-gib", "8", "--max-model-len", "0"], "--max-model-len is 0"),
        (
            ["ic-1b", "--gpu-memory-gib", "8", "--max-model-len", "1048577"],
            "max_model_len is 1048577; accepted",
        ),
        (["ic-1b", "--gpu-memory-gib", "8", "--max-num-seqs", "-1"], "--max-num-seqs is -1"),
        (
            ["ic-1b", "--gpu-memory-gib", "8", "--gpu-memory-utilization", "1.5"],
            "--gpu-memory-utilization is 1.5",
        ),
        (
            ["ic-1b", "--gpu-memory-gib", "8", "--tensor-parallel-size", "3"],
            "tensor_parallel_size is 3; it must divide",
        ),
        (["ic-1b"], "--gpu-memory-gib"),
        (["ic-1b", "--gpu-memory-gib", "8", "--kv-cache-dtype", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["check", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_nothing_of_vllm_or_cuda_is_loaded():
    code = (
        "import sys; from ic_vllm_plugin.cli import main; "
        "main(['check', 'ic-nano', '--gpu-memory-gib', '8', '--json']); "
        "import torch; print(torch.cuda.is_initialized(), 'vllm' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=users_environment(),
    )
    assert done.stdout.splitlines()[-1] == "False False", done.stderr
