"""Tables and plot of conversions."""

import json

import pytest

from bench.cases.conversion_needs import SHAPES, needs_row
from bench.conversion import main, plot_conversions
from bench.report import render

SOURCE = {
    "source": "SmolLM2", "stage": "source", "perplexity": 32.0, "kv_numbers_per_token": 11520,
    "kv_saved_vs_mha": 0.667, "kv_saved_vs_source": 0.0, "gpu": "cpu", "result": "20260101-cpu-conversion",
}  # fmt: skip
CONVERTED = {
    **SOURCE, "stage": "converted", "kv_lora_rank": 128, "qk_rope_head_dim": 64, "perplexity": 48.0,
    "kv_numbers_per_token": 5760, "kv_saved_vs_mha": 0.8333, "kv_saved_vs_source": 0.5,
}  # fmt: skip
SMALL = {
    **CONVERTED,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "perplexity": 320.0,
    "kv_saved_vs_source": 0.79,
}
NEWER = {"result": "20260102-h-conversion"}
HEALED = {
    **CONVERTED, **NEWER, "stage": "healed", "perplexity": 34.0, "tokens": 25_300_000, "wall_s": 91.2,
    "gpu": "H",
}  # fmt: skip
CHAT = {
    "task": "chat", "model": "healed", "engine": "vllm 0.32", "question": "Why?", "answer": "Because.\nReally.",
    "finish_reason": "length", "gpu": "cpu", "result": "20260103-cpu-conversion-chat",
}  # fmt: skip


def _table(mark, rows):
    text = render(f"<!-- results:{mark} -->\n<!-- /results -->\n", rows, "README.md")
    return text.splitlines()[1:-1]


def test_a_line_is_of_one_result_and_the_healed_one_wins():
    source = {**SOURCE, **NEWER, "perplexity": 33.0}
    again = {**CONVERTED, **NEWER, "perplexity": 49.5}
    latest = {"result": "20260103-cpu-conversion"}
    lines = _table(
        "conversion",
        [
            SOURCE, SMALL, CONVERTED, source, {**again, "stage": "partial_rope", "perplexity": 34.0}, again,
            HEALED, {**SOURCE, **latest}, {**CONVERTED, **latest},
        ],
    )  # fmt: skip
    assert lines[0] == "Perplexity of `SmolLM2` at each size:"
    healed, converted = lines[4:]
    assert healed == (
        "| 128 | 64 | 5,760 | 83.3% | 50.0% | 33.00 | 49.50 (1.500 x) | 34.00 | 1.030 "
        "| 25.3 M tokens in 91 s, H | `20260102-h-conversion` |"
    )
    assert converted == (
        "| 64 | 16 | 5,760 | 83.3% | 79.0% | 32.00 | 320.00 (10.000 x) | - | - | - | `20260101-cpu-conversion` |"
    )


def test_chats_are_printed_in_full_from_the_newest_result():
    older = {**CHAT, "answer": "no", "result": "20260102-cpu-conversion-chat"}
    other = {**CHAT, "model": "source", "finish_reason": "stop", "answer": "So."}
    text = "\n".join(_table("conversion-chat", [older, other, CHAT]))
    assert (
        "**Why?**\n\nsource:\n\n> So.\n\nhealed *(cut at the limit of tokens)*:\n\n> Because.\n> Really."
        in text
    )
    assert "no" not in text.split("greedy.")[1]


def test_plot(tmp_path, capsys):
    folder = tmp_path / "20260102-h100-conversion"
    folder.mkdir()
    rows = [SOURCE, CONVERTED, {**HEALED, "result": SOURCE["result"]}, SMALL, {"op": "rope"}]
    (folder / "result.json").write_text(json.dumps({"rows": rows}))
    assert main([str(folder)]) == 0
    assert (folder / "conversion.png").read_bytes().startswith(b"\x89PNG")
    # sizes of several results in one plot, which is of one source
    other = tmp_path / "20260103-cpu-conversion"
    other.mkdir()
    (other / "result.json").write_text(json.dumps({"rows": [SOURCE, {**CONVERTED, "kv_lora_rank": 256}]}))
    assert plot_conversions([other, folder]) == other / "conversion.png"
    (other / "result.json").write_text(json.dumps({"rows": [{**row, "source": "Qwen"} for row in rows[:2]]}))
    with pytest.raises(ValueError, match="of SmolLM2, Qwen"):
        plot_conversions([folder, other])
    (folder / "result.json").write_text(json.dumps({"rows": [SOURCE]}))
    with pytest.raises(ValueError, match="has no conversions"):
        plot_conversions([folder])
    assert main([str(folder)]) == 2
    assert "has no conversions" in capsys.readouterr().err


def test_what_conversions_took_is_of_the_newest_result_of_a_size():
    took = {**CONVERTED, "wall_s": 94.4, "peak_memory_bytes": 2 * 1024**3}
    lines = _table(
        "conversion-cost",
        [
            took,
            {**took, **NEWER, "wall_s": 80.0},
            {**took, **NEWER, "stage": "partial_rope"},
            {**HEALED, "peak_memory_bytes": 1},
        ],
    )
    assert lines[2:] == ["| `SmolLM2` | 128 | 64 | 80 | 2.00 | cpu | `20260102-h-conversion` |"]


def test_what_a_shape_needs_is_counted_as_the_converter_counts_it():
    rows = [{**needs_row(name), "gpu": "cpu", "result": "r"} for name in SHAPES]
    lines = _table("conversion-needs", rows)
    assert len(lines) == 2 + len(SHAPES)
    large = rows[-1]
    assert large["shape_of"] == "Llama-3.1-8B" and 7.9e9 < large["parameters"] < 8.5e9
    assert large["source_kv_numbers_per_token"] == 65_536
    # of one layer at a time: far less than the weights, and more than the embedding in both its forms
    assert 6 * 128_256 * 4096 * 2 < large["needs_memory_bytes"] < large["checkpoint_bytes"]
