"""The serving benchmark's parts that need no engine; that its points run is shown by running them."""

import importlib.metadata
import json
import math
from types import SimpleNamespace

import pytest
import torch
from bench.cases import serving, serving_engine, serving_faults, serving_parity, serving_tables
from bench.cases.serving_host import model_folder, write_dist_info, write_random_checkpoint
from bench.cases.serving_server import run_child
from ic_model import ICConfig, ICForCausalLM
from served_models import SMALL
from transformers import AutoConfig, AutoTokenizer


def test_entry_points_for_a_host_without_a_registry(tmp_path, monkeypatch):
    folders = write_dist_info(tmp_path)
    assert len(folders) == 3
    monkeypatch.syspath_prepend(str(tmp_path))
    distributions = importlib.metadata.distributions(path=[str(tmp_path)])
    found = {entry.name: (entry.group, entry.value) for one in distributions for entry in one.entry_points}
    assert found["infinite_context"] == ("vllm.general_plugins", "ic_vllm_plugin:register")
    assert found["ic-vllm-plugin"] == ("console_scripts", "ic_vllm_plugin.cli:main")


def test_a_random_checkpoint_is_a_checkpoint(tmp_path):
    folder = write_random_checkpoint(tmp_path / "model", ICConfig(**SMALL))
    model = ICForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    weight = model.model.layers[0].self_attn.o_proj.weight.float()
    assert math.isclose(weight.std().item(), 0.02, rel_tol=0.1)
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == [97, 98]
    exported = model_folder(tmp_path, str(folder), stock=True)
    assert AutoConfig.from_pretrained(exported).model_type == "deepseek_v3"


def test_a_model_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model is 'ic-2b'; accepted: ic-135m"):
        model_folder(tmp_path, "ic-2b")


@pytest.mark.parametrize("point", serving.POINTS)
def test_every_point_has_defaults_and_a_limit(point):
    options = serving.parser().parse_args([point, "--limit-s", "5"])
    assert options.limit_s == 5 and options.context_tokens
    assert (serving.POINTS[point].__doc__ or "").strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "--engine", "{"], "--engine is '{', which is not JSON"),
        (["decode", "--model", "ic-2b"], "model is 'ic-2b'"),
        (["decode", "--gpus", "0"], "--gpus is 0; it must be at least 1"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_wrong_arguments_exit_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        serving.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_longer_prompt_is_estimated_by_the_square_of_its_length():
    runs = [{"finished": True, "ttft_s": 2.0, "context_tokens": 1000}, {"finished": False}]
    assert serving_engine._estimate(runs, 4000) == 32.0
    assert serving_engine._estimate([], 4000) == 0.0


def test_time_of_steps_is_from_the_first_token_of_all():
    class Engine:
        """Two requests; the second one's first token comes a step later."""

        def __init__(self) -> None:
            self.steps = 0
            self.names: list[str] = []

        def add_request(self, name, prompt, sampling):
            self.names.append(name)

        def has_unfinished_requests(self):
            return self.steps < 4

        def step(self):
            self.steps += 1
            ready = self.names if self.steps > 1 else self.names[:1]
            tokens = SimpleNamespace(token_ids=list(range(self.steps)))
            return [SimpleNamespace(request_id=name, outputs=[tokens]) for name in ready]

    found = serving_engine.timed(Engine(), [[1], [2]], 4, limit_s=10)
    assert found["finished"] and len(found["step_s"]) == 2 and len(found["tokens"]) == 2


def test_rows_of_parity_count_up_to_the_first_other_token():
    reference = {"tokens": [[1, 2, 3], [4, 5, 6]], "logprobs": [[-1.0] * 3, [-2.0] * 3]}
    first = {"tokens": [[1, 2, 3], [4, 9, 6]], "logprobs": [[-1.1] * 3, [-2.5, -9.0, -9.0]]}
    row = serving_parity._row("case", "bfloat16", [first, reference], reference)
    assert row["equal"] == 1 and row["rounds_differ"] == 1 and row["tokens_agreed"] == [3, 1]
    assert math.isclose(row["max_logprob_difference"], 0.5)


def test_a_fault_that_is_not_what_it_has_to_be_fails_the_run(tmp_path, monkeypatch):
    def survives(run):
        raise serving_faults.Fault("the server started")

    monkeypatch.setattr(serving_faults, "STARTS", {"sabotage": survives})
    monkeypatch.setattr(serving_faults, "LIVE", {})
    options = serving.parser().parse_args(["faults", "--results", str(tmp_path), "--limit-s", "100"])
    run = serving.Run("faults", options)
    serving_faults.provoke_all(run)
    assert run.failed
    (file,) = tmp_path.glob("*/result.json")
    (row,) = json.loads(file.read_text())["rows"]
    assert row["fault"] == "sabotage" and row["held"] is False and row["seen"] == "the server started"


def test_tables_have_the_newest_of_equal_measurements_and_no_empty_columns():
    old = {
        "point": "decode",
        "model": "ic-1b",
        "impl": "ours",
        "context_tokens": 1048576,
        "kv_dtype": "auto",
        "decode_tokens_per_s": 10.0,
        "memory_limit_gib": None,
        "gpu": "G",
        "result": "first",
    }
    rows = [old, {**old, "decode_tokens_per_s": 123.45, "share_of_limit": 0.714, "result": "second"}]
    rows += [{**old, "impl": "stock", "result": "second"}]
    text = serving_tables.serving_table(rows)
    assert "| ic-1b | ours | 1,048,576 | auto | 123.5 | 71% | G | `second` |" in text
    assert "| ic-1b | stock | 1,048,576 | auto | 10.0 | - | G | `second` |" in text
    assert "first" not in text and "card, GiB" not in text and "GPUs" not in text
    text = serving_tables.serving_table([*rows, {**old, "gpus": 2, "result": "third"}])
    assert "| ic-1b | ours | 1 | 1,048,576 | auto | 123.5 | 71% | G | `second` |" in text
    assert "| ic-1b | ours | 2 | 1,048,576 | auto | 10.0 | - | G | `third` |" in text
    lengths = {line.count("|") for line in text.splitlines()}
    assert len(lengths) == 1
    fault = {
        "point": "faults",
        "fault": "killed engine",
        "held": True,
        "seconds": 1.5,
        "gpu": "G",
        "result": "r",
    }
    assert "| killed engine | yes | 1.5 | G | `r` |" in serving_tables.faults_table([fault])
    case = {
        "model": "ic-nano",
        "case": "float32",
        "equal": 9,
        "prompts": 9,
        "max_logprob_difference": 4.9e-05,
    }
    assert "| float32 | 9 of 9 | 4.9e-05 | G | `r` |" in serving_tables.parity_table(
        [{**case, "gpu": "G", "result": "r"}]
    )


def test_a_child_that_fails_or_takes_too_long_is_an_error():
    assert "accepted: timed, greedy" in run_child({"task": "dance"}, 60)["error"]
    assert "exit" in run_child({"task": "roofline"}, 0.2)["error"]
