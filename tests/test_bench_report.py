"""Tables of kernels in documents."""

import json

from bench.report import NO_ROWS, load_rows, render

DECODE = {
    "op": "mla_decode", "impl": "triton", "row_dim": 576, "heads": 16, "batch": 1, "context_tokens": 131_072,
    "lengths": "even", "query_tokens": 1, "kv_dtype": "bfloat16", "median_us": 41.23, "gb_per_s": 3663.0,
    "tflops": 110.7, "rel_err": 2e-3, "ours": True, "roofline_share": 0.83, "gpu": "NVIDIA H200",
    "result": "20261124-h200-mla-decode",
}  # fmt: skip
PEER = {**DECODE, "impl": "fa3", "ours": False, "median_us": 39.0}
AOT = {
    "op": "rope", "variant": "heads32", "capability": 90, "triton": "3.9.0", "num_warps": 4, "num_stages": 1,
    "shared_bytes": 1024, "shared_limit_bytes": 232_448, "registers": 40, "stack_bytes": 0, "spill_bytes": 0,
    "mma": "fma", "cp_async": False, "tma": False, "error": None, "result": "20261124-cpu-aot", "gpu": "cpu",
}  # fmt: skip


def _table(mark, rows):
    text = render(f"<!-- results:{mark} -->\n<!-- /results -->\n", rows, "README.md")
    return text.splitlines()[1:-1]


def test_decode_table():
    lines = _table(
        "kernels op=mla_decode row_dim=576",
        [
            PEER,
            DECODE,
            {**DECODE, "context_tokens": 8192, "median_us": 1234.5},
            {**DECODE, "batch": 32, "context_tokens": 8192, "impl": "eager", "ours": False},
            {**DECODE, "row_dim": 320},
            {"op": "rope", "task": "no kernel row"},
        ],
    )
    assert lines == [
        "`mla_decode`, row 576, heads 16, lengths even, queries 1, cache bfloat16. Ours: triton.",
        "",
        "| batch | context, tokens | triton, us | fa3, us | eager, us | GB/s | of roofline | device | result |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
        "| 1 | 8,192 | **1,234** | - | - | 3,663 | 83% | NVIDIA H200 | `20261124-h200-mla-decode` |",
        "| 1 | 131,072 | 41.2 | **39** | - | 3,663 | 83% | NVIDIA H200 | `20261124-h200-mla-decode` |",
        "| 32 | 8,192 | - | - | **41.2** | - | - | NVIDIA H200 | `20261124-h200-mla-decode` |",
    ]


def test_a_line_is_of_the_newest_run_alone():
    newer = {**DECODE, "median_us": 30.0, "result": "20261125-h200-mla-decode"}
    elsewhere = {**DECODE, "median_us": 60.0, "gpu": "NVIDIA A100"}
    text = "\n".join(_table("kernels op=mla_decode", [DECODE, PEER, elsewhere, newer]))
    assert "fa3" not in text, "a peer of another run"
    assert "41.2" not in text
    assert "**30**" in text
    assert "**60**" in text


def test_prefill_and_small_ops():
    prefill = {
        "op": "mla_prefill", "impl": "triton", "direction": "backward", "heads": 32, "batch": 1,
        "context_tokens": 8192, "query_tokens": 8192, "median_us": 9000.0, "tflops": 412.34, "gb_per_s": 1.0,
        "ours": True, "roofline_share": 0.5, "gpu": "H200", "result": "r",
    }  # fmt: skip
    lines = _table("kernels op=mla_prefill", [prefill])
    assert lines[0] == (
        "`mla_prefill`, direction backward, heads 32, batch 1, context, tokens 8,192. Ours: triton."
    )
    assert lines[-1] == "| **9,000** | 412.3 | 50% | H200 | `r` |"
    norm = {**prefill, "op": "rms_norm", "row_dim": 512, "residual": False}
    lines = _table("kernels", [norm, {**norm, "residual": True}, prefill])
    assert sum(line.startswith("`") for line in lines) == 2, "a table per op"
    assert "| no | **9,000** | 1 | 50% | H200 | `r` |" in lines


def test_pass_keys_before_and_after_healing_stand_in_one_cell():
    row = {
        "task": "passkey", "source": "s", "model": "s 128+64", "engine": "transformers", "kv_dtype": "bfloat16",
        "context_tokens": 512, "correct": 14, "total": 30, "gpu": "H100", "result": "r",
    }  # fmt: skip
    healed = {**row, "model": "s 128+64 healed", "correct": 24}
    said = [(0, "11111", "11111"), (0, "22222", " 11111."), (1, "33333", " 11111."), (1, "44444", "Who?")]
    samples = [
        {"context": context, "expected": key, "answer": answer, "correct": key in answer}
        for context, key, answer in said
    ]
    source = {**row, "model": "s", "correct": 29, "gpu": "cpu", "result": "q", "samples": samples}
    larger = {**row, "model": "s 256+64", "context_tokens": 1024}
    assert _table("conversion-keys source=s", [row, healed, source, larger]) == [
        "| C, R | 512 tokens | 1,024 tokens | device | result |",
        "| --- | ---: | ---: | --- | --- |",
        "| source | 29 of 30 | - | cpu | `q` |",
        "| 256, 64 | - | 14 of 30 | H100 | `r` |",
        "| 128, 64 | 14 of 30, 24 of 30 | - | H100 | `r` |",
        "",
        "Of the source's 3 wrong answers 1 are another key of the same context.",
    ]
    assert "another key" not in _table("conversion-keys source=s", [row, healed, larger])[-1]


def test_an_evaluation_names_its_tasks_and_perplexity_is_that_of_the_longest_context():
    row = {
        "task": "niah", "model": "m", "engine": "transformers", "kv_dtype": "bfloat16", "context_tokens": 4096,
        "correct": 200, "total": 200, "spare_tokens": 160, "gpu": "H100", "result": "r",
    }  # fmt: skip
    other = {**row, "task": "absent", "correct": 0}
    share = "0.0% (0.0% to 1.9%) | transformers, bfloat16 | H100 | `r` |"
    assert _table("evaluation model=m", [row, other])[-1] == f"| m | absent | 4,096 | 0 of 200 | {share}"
    assert _table("evaluation task=absent", [row, other])[-1] == f"| m | 4,096 | 0 of 200 | {share}"
    text = {**row, "task": "perplexity", "from_tokens": 0, "to_tokens": 1024, "perplexity": 7.336, "low": 6.0}
    text |= {"high": 8.0, "texts": 4}
    longer = {**text, "context_tokens": 32_768, "perplexity": 7.5}
    assert _table("perplexity", [longer, text])[2:] == [
        "| m | 0 to 1,024 | 7.50 (6.00 to 8.00) | 4 | H100 | `r` |"
    ]


def test_without_rows():
    assert _table("kernels op=rope", [DECODE]) == [NO_ROWS]


def test_aot_table():
    older = {**AOT, "shared_bytes": 7777, "result": "20261123-cpu-aot"}
    gone = {**AOT, "capability": 75, "result": "20261123-cpu-aot"}
    lines = _table("aot", [older, gone, AOT])
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["sm75", "sm90"]
    assert "7,777" not in "\n".join(lines)
    assert "| 1,024 | 232,448 | 40 | 0 | fma |" in lines[-1]


def test_several_gpus_beside_one():
    one = {
        "model": "ic-1b", "tokens_per_sequence": 8192, "gpus": 1, "ring": 1, "impl": "ours", "mfu": 0.4,
        "tokens_per_s": 1000.0, "tokens_per_s_per_gpu": 1000.0, "peak_gib": 40.0, "losses": [9.1926, 11.1],
        "gpu": "NVIDIA H100", "result": "alone", "flags": "--per_device_train_batch_size 2",
    }  # fmt: skip
    two = {**one, "gpus": 2, "tokens_per_s": 1900.0, "tokens_per_s_per_gpu": 950.0, "result": "two"}
    ring = {**two, "ring": 2, "losses": [9.1931, 11.1], "result": "ring"}
    other = {**two, "tokens_per_sequence": 16384, "result": "no such work on one"}
    lines = _table("training-scaling", [one, {**one, "impl": "torch", "tokens_per_s": 1.0}, other, ring, two])
    cells = [[cell.strip() for cell in line.split("|")[5:-1]] for line in lines[2:]]
    assert cells[0] == ["2, 1", "950", "95.0%", "40.0%", "40.0", "-", "NVIDIA H100", "`two`, `alone`"]
    # the same sequence by both: the losses are to be compared
    assert cells[1][5] == "9.193 11.100, 9.193 11.100"
    assert cells[2] == ["2, 1", "950", "-", "40.0%", "40.0", "-", "NVIDIA H100", "`no such work on one`"]


def test_the_tenth_result_of_a_day_is_newer_than_the_second(tmp_path):
    result = {"topic": "t", "command": "c", "commit": "c", "gpu": "g", "versions": {}}
    for name in ("20261127-h100-t", "20261127-h100-t-10", "20261127-h100-t-2", "20261126-h100-t-11"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({**result, "rows": [{"name": name}]}))
    assert [row["name"] for row in load_rows(tmp_path)] == [
        "20261126-h100-t-11",
        "20261127-h100-t",
        "20261127-h100-t-2",
        "20261127-h100-t-10",
    ]


def test_training_table():
    row = {
        "model": "ic-1b", "tokens_per_sequence": 8192, "gpus": 1, "ring": 1, "impl": "ours",
        "tokens_per_s": 33_537.7, "mfu": 0.3647, "gpu_util": 0.983, "peak_gib": 51.66,
        "gpu": "NVIDIA H100", "result": "old", "flags": "--per_device_train_batch_size 2 --bf16 true",
    }  # fmt: skip
    failed = {
        name: row[name] for name in ("model", "tokens_per_sequence", "gpus", "ring", "gpu", "result", "flags")
    }
    # the last flag holds
    more = " --per_device_train_batch_size 3 --gradient_accumulation_steps 4 --gradient_checkpointing true"
    rows = [
        row,
        {**row, "result": "new"},
        {**row, "flags": row["flags"] + more, "result": "x"},
        {**row, "gpus": 2},
        # a first step does not replace others
        {**row, "compiles": True, "result": "one"},
        {**row, "compiles": True, "result": "one", "tokens_per_sequence": 9000},
        {**failed, "impl": "torch", "error": "no memory"},
    ]
    assert _table("training gpus=1", rows)[2:] == [
        "| ic-1b | 8,192 | 2 | 1, 1 | `ours` | 33,538 | 36.5% | 98.3% | 51.7 | NVIDIA H100 | `new` |",
        "| ic-1b | 8,192 | 12, recomputed | 1, 1 | `ours` | 33,538 | 36.5% | 98.3% | 51.7 | NVIDIA H100 | `x` |",
        "| ic-1b | 9,000 | 2 | 1, 1 | `ours`, first step | 33,538 | 36.5% | 98.3% | 51.7 | NVIDIA H100 | `one` |",
    ]
