"""Write the tables of committed results into documents: `python -m bench.report [--check]`.

A document marks where a table goes, and the marks stay:

    <!-- results:retrieval model=ic-nano -->
    <!-- /results -->

What stands between them is made from `bench/results/*/result.json`, never typed. Words after the table's name
keep only rows with such a field. Of several rows that measured the same, the newest result's is shown. Kernels
are shown beside the peers of the same run: a case's newest result supplies its whole line.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ic_model.ops import aot
from ic_model.sizing import GIB
from ic_train.evaluation.passkey import wilson_interval
from ic_train.evaluation.report import Pairs, paired_interval

from bench.cases.serving_tables import TABLES as SERVING_TABLES
from bench.cases.training_tables import TABLES as TRAINING_TABLES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = ("README.md", "docs/**/*.md", "bench/**/*.md", "packages/**/*.md")
NO_ROWS = "No results are committed yet."

_BLOCK = re.compile(
    r"^<!-- results:(?P<table>[\w-]+)(?P<filters>(?: \w+=\S+)*) -->\n(?P<body>.*?)^<!-- /results -->$",
    re.MULTILINE | re.DOTALL,
)
_RETRIEVAL_KEY = ("task", "model", "engine", "kv_dtype", "context_tokens")

Row = dict[str, Any]


def _measured(row: Row) -> tuple[object, ...]:
    """What a retrieval result is about, whatever the lengths."""
    return tuple(row[field] for field in ("task", "model", "engine", "kv_dtype", "gpu"))


def retrieval_table(rows: Sequence[Row]) -> str:
    """Share of what was found, by context length, with its 95 % confidence interval (Wilson).

    Tasks are named where there are several.
    """
    # of a model only the newest result: an older one was another checkpoint's
    latest = {_measured(row): row["result"] for row in rows}
    rows = [row for row in rows if row["result"] == latest[_measured(row)]]
    newest = {tuple(row[field] for field in (*_RETRIEVAL_KEY, "gpu")): row for row in rows}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    header = [
        "model",
        "context, tokens",
        "found",
        "share (95 % interval)",
        "engine, KV cache",
        "device",
        "result",
    ]
    if named := len(tasks) > 1:
        header.insert(1, "task")
    lines = [_markdown(header), "|---|" + "---|" * named + "---:|---:|---|---|---|---|"]
    for row in sorted(
        newest.values(),
        key=lambda row: [str(row["model"]), tasks.index(row["task"]), row["context_tokens"], row["engine"]],
    ):
        low, high = wilson_interval(row["correct"], row["total"])
        share, task = row["correct"] / row["total"], row["task"]
        lines.append(
            f"| {row['model']} {f'| {task} ' if named else ''}| {row['context_tokens']:,} "
            f"| {row['correct']} of {row['total']} "
            f"| {share:.1%} ({low:.1%} to {high:.1%}) | {row['engine']}, {row['kv_dtype']} | {row['gpu']} "
            f"| `{row['result']}` |"
        )
    return "\n".join(lines)


def perplexity_table(rows: Sequence[Row]) -> str:
    """Perplexity by position in the longest contexts, with its 95 % interval."""
    longest = {
        row["model"]: max(one["context_tokens"] for one in rows if one["model"] == row["model"])
        for row in rows
    }
    newest = {
        (row["model"], row["from_tokens"]): row
        for row in rows
        if row["context_tokens"] == longest[row["model"]]
    }
    lines = [
        "| model | tokens | perplexity (95 % interval) | texts | device | result |",
        "|---|---:|---|---:|---|---|",
    ]
    for row in newest.values():
        lines.append(
            f"| {row['model']} | {row['from_tokens']:,} to {row['to_tokens']:,} | {row['perplexity']:.2f} "
            f"({row['low']:.2f} to {row['high']:.2f}) | {row['texts']} | {row['gpu']} | `{row['result']}` |"
        )
    return "\n".join(lines)


# what tells the cases of an op apart: (field, heading)
_CASES: dict[str, tuple[tuple[str, str], ...]] = {
    "mla_decode": (
        ("row_dim", "row"), ("heads", "heads"), ("batch", "batch"), ("context_tokens", "context, tokens"),
        ("lengths", "lengths"), ("query_tokens", "queries"), ("kv_dtype", "cache"),
    ),
    "mla_prefill": (
        ("direction", "direction"), ("heads", "heads"), ("batch", "batch"),
        ("context_tokens", "context, tokens"),
    ),
    "latent_cache": (("row_dim", "row"), ("context_tokens", "tokens"), ("kv_dtype", "cache")),
    "rms_norm": (
        ("direction", "direction"), ("residual", "residual"), ("row_dim", "row"),
        ("context_tokens", "tokens"),
    ),
    "rope": (("heads", "heads"), ("context_tokens", "tokens")),
}  # fmt: skip
# the op's rate: (field, heading, digits)
_RATES = {"mla_prefill": ("tflops", "TFLOP/s", 1)}
_GB_PER_S = ("gb_per_s", "GB/s", 0)


def kernels_table(rows: Sequence[Row]) -> str:
    """Median microseconds of every implementation, one line per case and device, the fastest in bold.

    Rate and roofline are of the fastest implementation of ours: the roofline is the longer of the op's least bytes
    at the measured bandwidth and its FLOP at the measured bf16 peak, over its time.
    """
    return "\n\n".join(
        _op_table(op, [row for row in rows if row["op"] == op])
        for op in _CASES
        if any(row["op"] == op for row in rows)
    )


def _op_table(op: str, rows: Sequence[Row]) -> str:
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (*(row.get(name) for name, _ in _CASES[op]), row["gpu"])
        found = lines.setdefault(key, [])
        # rows come oldest first, and a line is of one run
        if found and found[0]["result"] != row["result"]:
            found.clear()
        found.append(row)
    shown = [row for found in lines.values() for row in found]
    # ours first, then peers in the order of the newest run
    impls = sorted(dict.fromkeys(row["impl"] for row in shown), key=lambda name: not _is_ours(shown, name))
    varying = [place for place in range(len(_CASES[op])) if len({key[place] for key in lines}) > 1]
    field, heading, digits = _RATES.get(op, _GB_PER_S)
    titles = [_CASES[op][place][1] for place in varying]
    header = [*titles, *(f"{name}, us" for name in impls), heading, "of roofline", "device", "result"]
    aligned = ["---:"] * (len(header) - 2) + ["---"] * 2
    text = [_markdown(header), _markdown(aligned)]
    for key, found in sorted(lines.items(), key=lambda item: [_order(value) for value in item[0]]):
        ours = [row for row in found if row.get("ours")]
        best = min(ours, key=lambda row: row["median_us"]) if ours else None
        rate = ["-", "-"] if best is None else [f"{best[field]:,.{digits}f}", f"{best['roofline_share']:.0%}"]
        cells = [_cell(key[place]) for place in varying] + _times(found, impls) + rate
        text.append(_markdown([*cells, key[-1], f"`{found[0]['result']}`"]))
    fixed = [
        f"{title} {_cell(next(iter(lines))[place])}"
        for place, (_, title) in enumerate(_CASES[op])
        if place not in varying
    ]
    ours = ", ".join(name for name in impls if _is_ours(shown, name)) or "none"
    return f"`{op}`{''.join(f', {text}' for text in fixed)}. Ours: {ours}.\n\n" + "\n".join(text)


def _times(found: Sequence[Row], impls: Sequence[str]) -> list[str]:
    times = {row["impl"]: row["median_us"] for row in found}
    cells = []
    for name in impls:
        text = "-"
        if name in times:
            text = f"{times[name]:,.0f}" if times[name] >= 1000 else f"{times[name]:.3g}"
            text = f"**{text}**" if times[name] == min(times.values()) else text
        cells.append(text)
    return cells


def _is_ours(rows: Sequence[Row], name: str) -> bool:
    return any(row.get("ours") for row in rows if row["impl"] == name)


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers in their order, then words in theirs: a column holds one kind, but for None."""
    is_number = isinstance(value, int | float)
    return not is_number, float(value) if is_number else 0.0, "" if is_number else str(value)


CONVERSION_FIELDS = frozenset({"source", "stage", "perplexity", "kv_numbers_per_token", "kv_saved_vs_mha"})
_KEY_STAGES = ("converted", "healed")
CHAT_FIELDS = frozenset({"task", "model", "engine", "question", "answer", "finish_reason"})
_CONVERSION_HEADER = (
    "C", "R", "numbers per token", "less than multi-head", "less than the source", "source", "converted", "healed",
    "healed, relative", "healing", "result",
)  # fmt: skip


def conversion_table(rows: Sequence[Row]) -> str:
    """Perplexities of every size, each line of the newest result that has it, healed ones first.

    A line's perplexities are of one run on one text, and so is what they are relative to.
    """
    tables = []
    for name in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == name]
        lines = [_conversion_line(of_size) for of_size in conversion_sizes(own)]
        head = [
            _markdown(_CONVERSION_HEADER),
            _markdown(["---:"] * (len(_CONVERSION_HEADER) - 2) + ["---"] * 2),
        ]
        tables.append("\n".join([f"Perplexity of `{name}` at each size:", "", *head, *lines]))
    return "\n\n".join(tables)


def conversion_sizes(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """Of each size the rows of one result, by stage; the largest cache first.

    Args:
        rows: of one source, oldest first, each with the name of its `result`.
    """
    sizes: dict[tuple[int, int], dict[str, dict[str, Row]]] = {}
    sources = {row["result"]: row for row in rows if row["stage"] == "source"}
    for row in rows:
        if "kv_lora_rank" in row and row["result"] in sources:
            size = (row["kv_lora_rank"], row["qk_rope_head_dim"])
            result = sizes.setdefault(size, {}).setdefault(row["result"], {})
            result["source"] = sources[row["result"]]
            result[row["stage"]] = row
    # rows come oldest first
    chosen = [
        max(
            enumerate(results.values()),
            key=lambda entry: ("healed" in entry[1], "converted" in entry[1], entry[0]),
        )[1]
        for _, results in sorted(sizes.items(), key=lambda item: (-sum(item[0]), -item[0][0]))
    ]
    return [stages for stages in chosen if "converted" in stages]


def _conversion_line(stages: dict[str, Row]) -> str:
    source, converted, healed = stages["source"], stages["converted"], stages.get("healed")
    base = source["perplexity"]
    after = ["-", "-", "-"]
    if healed is not None:
        after = [
            f"{healed['perplexity']:.2f}",
            f"{healed['perplexity'] / base:.3f}",
            f"{healed['tokens'] / 1e6:.1f} M tokens in {healed['wall_s']:.0f} s, {healed['gpu']}",
        ]
    return _markdown(
        [
            str(converted["kv_lora_rank"]),
            str(converted["qk_rope_head_dim"]),
            f"{converted['kv_numbers_per_token']:,}",
            f"{converted['kv_saved_vs_mha']:.1%}",
            f"{converted['kv_saved_vs_source']:.1%}",
            f"{base:.2f}",
            f"{converted['perplexity']:.2f} ({converted['perplexity'] / base:.3f} x)",
            *after,
            f"`{converted['result']}`",
        ]
    )


def conversion_keys_table(rows: Sequence[Row]) -> str:
    """Pass keys found by each size before and after healing, a column per length; the source first."""
    found: dict[tuple[str, str], dict[str, dict[int, Row]]] = {}
    for row in rows:
        size, _, healed = row["model"].removeprefix(row["source"]).strip().partition(" ")
        stages = found.setdefault((size, row["gpu"]), {})
        stages.setdefault(healed or "converted", {})[row["context_tokens"]] = row
    lengths = sorted({row["context_tokens"] for row in rows})
    header = ["C, R", *(f"{length:,} tokens" for length in lengths), "device", "result"]
    lines = [_markdown(header), _markdown(["---", *["---:"] * len(lengths), "---", "---"])]
    wrong = other = 0
    # the largest cache first; the source's key is empty
    for (size, gpu), stages in sorted(found.items(), key=lambda item: _size_order(item[0][0])):
        cells = [
            _keys_cell([stages.get(stage, {}).get(length) for stage in _KEY_STAGES]) for length in lengths
        ]
        results = dict.fromkeys(row["result"] for stage in stages.values() for row in stage.values())
        name = size.replace("+", ", ") or "source"
        lines.append(_markdown([name, *cells, gpu, ", ".join(f"`{result}`" for result in results)]))
        if not size:
            wrong, other = _other_keys([row for stage in stages.values() for row in stage.values()])
    if wrong:
        lines += ["", f"Of the source's {wrong} wrong answers {other} are another key of the same context."]
    return "\n".join(lines)


def _other_keys(rows: Sequence[Row]) -> tuple[int, int]:
    """How many answers were wrong, and how many of these have another key of their context."""
    wrong = other = 0
    for row in rows:
        for sample in row["samples"]:
            if sample["correct"]:
                continue
            keys = {one["expected"] for one in row["samples"] if one["context"] == sample["context"]}
            wrong += 1
            other += any(key in sample["answer"] for key in keys - {sample["expected"]})
    return wrong, other


def _size_order(size: str) -> tuple[int, ...]:
    parts = [int(part) for part in size.split("+") if part]
    return (0,) if not parts else (1, -sum(parts), -parts[0])


def _keys_cell(rows: Sequence[Row | None]) -> str:
    """Of one length: "14 of 30, 24 of 30", or what there is of it."""
    return ", ".join(f"{row['correct']} of {row['total']}" for row in rows if row is not None) or "-"


def conversion_cost_table(rows: Sequence[Row]) -> str:
    """Time and memory that conversions took, each size of the newest result that has it."""
    newest = {
        (row["source"], row["kv_lora_rank"], row["qk_rope_head_dim"], row["gpu"]): row
        for row in rows
        if row["stage"] == "converted"
    }
    lines = [
        "| source | C | R | took, s | peak memory, GiB | device | result |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for row in newest.values():
        lines.append(
            f"| `{row['source']}` | {row['kv_lora_rank']} | {row['qk_rope_head_dim']} | {row['wall_s']:.0f} "
            f"| {row['peak_memory_bytes'] / GIB:.2f} | {row['gpu']} | `{row['result']}` |"
        )
    return "\n".join(lines)


def conversion_needs_table(rows: Sequence[Row]) -> str:
    """Memory and disk by arithmetic, a line per shape of the newest result."""
    lines = [
        "| source | C | R | numbers per token, before, after | memory, GiB | disk meanwhile, GiB | result, GiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in {row["shape_of"]: row for row in rows}.values():
        memory, meanwhile, left = (
            f"{row[name] / GIB:.1f}"
            for name in ("needs_memory_bytes", "needs_workspace_bytes", "checkpoint_bytes")
        )
        lines.append(
            f"| {row['shape_of']} | {row['kv_lora_rank']} | {row['qk_rope_head_dim']} "
            f"| {row['source_kv_numbers_per_token']:,}, {row['kv_numbers_per_token']:,} "
            f"| {memory} | {meanwhile} | {left} |"
        )
    return "\n".join(lines)


def chat_table(rows: Sequence[Row]) -> str:
    """Every question of the newest result with all its answers, in full."""
    newest = [row for row in rows if row["result"] == rows[-1]["result"]]
    parts = [f"From `{newest[0]['result']}`, {newest[0]['engine']}, {newest[0]['gpu']}; greedy."]
    for question in dict.fromkeys(row["question"] for row in newest):
        parts.append(f"**{question}**")
        for row in newest:
            if row["question"] == question:
                end = "" if row["finish_reason"] == "stop" else " *(cut at the limit of tokens)*"
                answer = str(row["answer"]).strip().replace("\n", "\n> ")
                parts.append(f"{row['model']}{end}:\n\n> {answer}")
    return "\n\n".join(parts)


def aot_table(rows: Sequence[Row]) -> str:
    """What each kernel needs on each chip, as the compiler said it."""
    newest = {(row["op"], row["variant"], row["capability"]): row["result"] for row in rows}
    chosen = [row for row in rows if newest[row["op"], row["variant"], row["capability"]] == row["result"]]
    return aot.table(chosen)


def preferences_table(rows: Sequence[Row]) -> str:
    """Right answers before and after preference training, with the paired 95 % interval of the gain by Newcombe.

    Of a stretch's perplexity, which what follows cannot change, the last row stands: the longest context's.
    """
    newest = {(row["model"], row["task"], row.get("to_tokens", row["context_tokens"])): row for row in rows}
    lines = [
        "| task | context, tokens | before | after | gain (95 %) | lost, won | trained at | device | result |",
        "|---|---:|---:|---:|---|---:|---|---|---|",
    ]
    for row in newest.values():
        trained = f"{row['longest_pair_tokens']:,} tokens | {row['gpu']} | `{row['result']}` |"
        if row["task"] == "perplexity":
            before, after = (
                f"{row[f'perplexity_{place}']:.2f} [{row[f'low_{place}']:.2f}, {row[f'high_{place}']:.2f}]"
                for place in ("before", "after")
            )
            span = f"perplexity, tokens {row['from_tokens']:,} to {row['to_tokens']:,}"
            lines.append(f"| {span} | {row['context_tokens']:,} | {before} | {after} | | | {trained}")
            continue
        asked = row["asked"]
        before, after, lost, won = (
            row[name] for name in ("right_before", "right_after", "only_before", "only_after")
        )
        pairs = Pairs(both=before - lost, lost=lost, won=won, neither=asked - before - won)
        low, high = paired_interval(pairs)
        lines.append(
            f"| {row['task']} | {row['context_tokens']:,} | {before} of {asked} | {after} of {asked} | "
            f"{(after - before) / asked:+.1%} [{low:+.1%}, {high:+.1%}] | {lost}, {won} | {trained}"
        )
    return "\n".join(lines)


def engines_table(rows: Sequence[Row]) -> str:
    """The same questions in transformers and behind a server: right answers of both, and where they differ."""
    key = ("model", "engine", "task", "context_tokens", "gpu")
    newest = {tuple(row[field] for field in key): row for row in rows}
    lines = [
        (
            "| model | task | context, tokens | right in process | right behind a server | only one of them "
            "| same text | server | device | result |"
        ),
        "|---|---|---:|---:|---:|---|---|---|---|---|",
    ]
    for row in sorted(newest.values(), key=lambda row: (row["model"], row["task"], row["context_tokens"])):
        asked = row["asked"]
        lines.append(
            f"| {row['model']} | {row['task']} | {row['context_tokens']:,} | {row['right_process']} of {asked} "
            f"| {row['right_server']} of {asked} | {row['only_process']}, {row['only_server']} "
            f"| {row['same_text']} of {asked} | {row['engine']} | {row['gpu']} | `{row['result']}` |"
        )
    for gpu in sorted({row["gpu"] for row in newest.values()}):
        rows = [row for row in newest.values() if row["gpu"] == gpu]
        other = sum(row["only_process"] + row["only_server"] for row in rows)
        lines += [
            "",
            f"{gpu}: {other:,} of {sum(row['asked'] for row in rows):,} questions have another verdict.",
        ]
    return "\n".join(lines)


# name in the mark: (fields that its rows have, the table)
TABLES: dict[str, tuple[frozenset[str], Callable[[Sequence[Row]], str]]] = {
    "retrieval": (frozenset({*_RETRIEVAL_KEY, "correct", "total"}), retrieval_table),
    # with what only `ic-train evaluate` says
    "evaluation": (frozenset({*_RETRIEVAL_KEY, "correct", "total", "spare_tokens"}), retrieval_table),
    "perplexity": (
        frozenset({"model", "task", "from_tokens", "to_tokens", "perplexity", "texts"}),
        perplexity_table,
    ),
    "kernels": (frozenset({"op", "impl", "heads", "batch", "context_tokens", "median_us"}), kernels_table),
    "aot": (frozenset({"op", "variant", "capability", "shared_bytes", "registers"}), aot_table),
    "conversion": (CONVERSION_FIELDS, conversion_table),
    "conversion-keys": (frozenset({*_RETRIEVAL_KEY, "source", "correct", "total"}), conversion_keys_table),
    "conversion-cost": (
        CONVERSION_FIELDS | {"kv_lora_rank", "wall_s", "peak_memory_bytes"},
        conversion_cost_table,
    ),
    "conversion-needs": (frozenset({"shape_of", "needs_memory_bytes"}), conversion_needs_table),
    "conversion-chat": (CHAT_FIELDS, chat_table),
    "preferences": (frozenset({"task", "longest_pair_tokens", "training_commit"}), preferences_table),
    "engines": (frozenset({"task", "right_process", "right_server", "same_text"}), engines_table),
    **SERVING_TABLES,
    **TRAINING_TABLES,
}


def load_rows(results: Path) -> list[Row]:
    """Every row of every result, oldest first, with the result's folder name and device.

    Raises:
        ValueError: a file is not a result: names the file and what it lacks.
    """
    rows: list[Row] = []
    for path in sorted(results.glob("*/result.json"), key=_numbered):
        result = json.loads(path.read_text())
        lacking = {"topic", "command", "commit", "gpu", "versions", "rows"} - set(result)
        if lacking or not result["rows"]:
            raise ValueError(f"{path} is no result: it has no {', '.join(sorted(lacking) or ['rows'])}")
        rows += [{**row, "result": path.parent.name, "gpu": result["gpu"]} for row in result["rows"]]
    return rows


def _numbered(file: Path) -> list[int | str]:
    """Orders results as people do: the tenth of a day after its second."""
    # text and numbers in turn, so that like is compared with like
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.parent.name)]


def render(text: str, rows: Sequence[Row], source: str) -> str:
    """A document with its marked tables made anew.

    Args:
        text: the document.
        rows: from load_rows.
        source: the document's name, for messages.

    Raises:
        ValueError: a mark names a table that there is not, or a mark is not closed.
    """

    def block(match: re.Match[str]) -> str:
        """A mark with its table as it is to be."""
        name, filters = match["table"], dict(word.split("=", 1) for word in match["filters"].split())
        if name not in TABLES:
            raise ValueError(f"{source} has a table {name!r}; it must be one of {', '.join(sorted(TABLES))}")
        fields, table = TABLES[name]
        chosen = [
            row
            for row in rows
            if fields <= set(row) and all(str(row.get(field)) == value for field, value in filters.items())
        ]
        opening = match[0].split("\n", 1)[0]
        return f"{opening}\n{table(chosen) if chosen else NO_ROWS}\n<!-- /results -->"

    # examples in code, with their indentation, are left alone
    opened = len(re.findall(r"^<!-- results:", text, re.MULTILINE))
    if opened != len(_BLOCK.findall(text)):
        raise ValueError(f"{source} has a results mark that is malformed or lacks its <!-- /results -->")
    return _BLOCK.sub(block, text)


def stale_documents(root: Path = ROOT, *, write: bool = False) -> list[Path]:
    """Documents whose tables are not what the results say.

    Args:
        root: of the repository.
        write: bring them up to date.
    """
    rows = load_rows(root / "bench" / "results")
    stale = []
    for path in sorted({path for pattern in DOCUMENTS for path in root.glob(pattern)}):
        text = path.read_text()
        made = render(text, rows, str(path.relative_to(root)))
        if made != text:
            stale.append(path)
            if write:
                path.write_text(made)
    return stale


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the tables; 1 when --check finds one out of date."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Tables from bench/results.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail when a table is out of date"
    )
    options = parser.parse_args(arguments)
    try:
        stale = stale_documents(write=not options.check)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in stale:
        print(f"{'out of date' if options.check else 'written'}: {path.relative_to(ROOT)}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
