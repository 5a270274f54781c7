"""Write what follows from other files: the chart's schema, the tables of its README, and its sizing table.

    python charts/tools/generate.py            write the files
    python charts/tools/generate.py --check    exit 1 and name the files that are not up to date

values.schema.json and the README's tables come from the comments of values.yaml; files/sizing.json from
`ic_model.sizing_serving`. The part of values.yaml below the line MONITORING is values.monitoring.part.yaml, word
for word.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[1] / "infinite-context"
MONITORING = "# Monitoring and autoscaling: edit values.monitoring.part.yaml, then run the command above."
README_BLOCK = re.compile(r"(<!-- values -->\n).*?(<!-- /values -->)", re.DOTALL)
TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
# what `vllm serve` takes for --max-num-batched-tokens and --max-num-seqs by itself, by the memory of the card
# (EngineArgs.get_batch_defaults of vLLM 0.32; an A100 of 80 GB gets the first row, so the second is the safe one)
VLLM_DEFAULTS = [
    {"fromGib": 0, "tokens": 2048, "sequences": 256},
    {"fromGib": 70, "tokens": 8192, "sequences": 1024},
    {"fromGib": 160, "tokens": 16384, "sequences": 1024},
]
QUANTITY = r"^[0-9]+(\.[0-9]+)?([EPTGMk]i?|m)?$"
DEFINITIONS = {
    "quantities": {
        "type": "object",
        "additionalProperties": {"type": ["string", "number"], "pattern": QUANTITY, "minimum": 0},
    },
    "resources": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "requests": {"$ref": "#/$defs/quantities"},
            "limits": {"$ref": "#/$defs/quantities"},
        },
    },
}


class AnnotationError(ValueError):
    """A comment of values.yaml lacks something; the message names the key and the line."""


@dataclass(kw_only=True)
class Key:
    """A key of values.yaml: where it is, what its comment says, what its default is."""

    path: tuple[str, ...]
    line: int
    text: str
    schema: dict[str, Any]
    default: Any
    children: list[Key] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Dotted, as `--set` takes it."""
        return ".".join(self.path)

    @property
    def is_section(self) -> bool:
        """Whether its children are keys with comments of their own, not part of its default."""
        return bool(self.children)


def read_keys(text: str) -> list[Key]:
    """The keys of the root of a values.yaml, with their children.

    Raises:
        AnnotationError: a key has no description, or its type cannot be known from its default.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    return list(_children(root, (), text.splitlines()))


def _children(node: yaml.MappingNode, path: tuple[str, ...], lines: list[str]) -> Iterator[Key]:
    for key_node, value_node in node.value:
        here = (*path, key_node.value)
        line = key_node.start_mark.line
        text, schema = _comment(lines, line, key_node.start_mark.column, ".".join(here))
        default = yaml.SafeLoader("").construct_document(value_node)
        key = Key(path=here, line=line + 1, text=text, schema=schema, default=default)
        described = isinstance(value_node, yaml.MappingNode) and not (
            "$ref" in schema or "additionalProperties" in schema
        )
        if described and value_node.value:
            key.children = list(_children(value_node, here, lines))
        elif not text:
            raise AnnotationError(f"values.yaml:{line + 1}: {key.name} has no `# -- description` above it")
        yield key


def _comment(lines: list[str], line: int, indent: int, name: str) -> tuple[str, dict[str, Any]]:
    """Description and schema from the comment lines directly above a key."""
    start = line
    while start > 0 and lines[start - 1].startswith(" " * indent + "#"):
        start -= 1
    words: list[str] = []
    schema: dict[str, Any] = {}
    for comment in (row.strip().lstrip("#").strip() for row in lines[start:line]):
        if comment.startswith("-- "):
            words = [comment[3:]]
        elif comment.startswith("@schema "):
            try:
                schema |= json.loads(comment.removeprefix("@schema "))
            except ValueError as error:
                raise AnnotationError(
                    f"values.yaml:{line + 1}: @schema of {name} is not JSON: {error}"
                ) from None
        elif words:
            words.append(comment)
    return " ".join(words), schema


def schema_of(keys: list[Key]) -> dict[str, Any]:
    """JSON Schema of the whole file; nothing that is not a key of it is accepted."""
    root = _object(keys)
    # Helm passes `global` to every chart
    root["properties"]["global"] = {"type": "object"}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **root, "$defs": DEFINITIONS}


def _object(keys: list[Key]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {key.path[-1]: _schema(key) for key in keys},
    }


def _schema(key: Key) -> dict[str, Any]:
    description = {"description": key.text} if key.text else {}
    if key.is_section:
        return {**description, **_object(key.children), **key.schema}
    if "$ref" in key.schema:
        return {**description, **key.schema}
    if key.default is None and "type" not in key.schema:
        raise AnnotationError(f"values.yaml:{key.line}: {key.name} is null; give its type with @schema")
    if key.default == {} and "additionalProperties" not in key.schema:
        raise AnnotationError(
            f"values.yaml:{key.line}: {key.name} is {{}}; say what it may hold with @schema"
        )
    if key.default == [] and "items" not in key.schema:
        raise AnnotationError(f"values.yaml:{key.line}: {key.name} is []; say what it may hold with @schema")
    inferred: dict[str, Any] = {}
    if "type" not in key.schema:
        # a number may be written with or without a fraction: 8 is as good a default as 0.9
        is_number = {"minimum", "exclusiveMinimum"} & key.schema.keys() and (
            isinstance(key.default, float) or "exclusiveMinimum" in key.schema
        )
        inferred["type"] = "number" if is_number else TYPES[type(key.default)]
    return {**description, **inferred, **key.schema}


def readme_tables(keys: list[Key]) -> str:
    """One table for the keys of the root, and one for each section."""
    plain = [key for key in keys if not key.is_section]
    parts = [_table(plain)] if plain else []
    for section in (key for key in keys if key.is_section):
        parts.append(f"### `{section.name}`\n\n{section.text}\n\n{_table(list(_leaves(section)))}")
    return "\n".join(parts)


def _leaves(key: Key) -> Iterator[Key]:
    for child in key.children:
        if child.is_section:
            if child.text:
                yield child
            yield from _leaves(child)
        else:
            yield child


def _table(keys: list[Key]) -> str:
    rows = ["| value | default | is |", "|---|---|---|"]
    for key in keys:
        if key.is_section:
            rows.append(f"| **`{key.name}`** | | {key.text} |")
            continue
        default = json.dumps(key.default).replace("|", "\\|")
        accepted = key.schema.get("enum")
        choice = f" One of {', '.join(f'`{json.dumps(item)}`' for item in accepted)}." if accepted else ""
        rows.append(f"| `{key.name}` | `{default}` | {key.text}{choice} |".replace("\n", " "))
    return "\n".join(rows) + "\n"


def sizing_table() -> dict[str, Any]:
    """What the templates need to check a context length, in the words of `ic_model.sizing_serving`."""
    from ic_model import sizing, sizing_serving
    from ic_model.presets import preset, preset_names
    from ic_vllm_plugin import compat, cpu_defaults

    presets = {}
    for name in preset_names():
        config = preset(name)
        presets[name] = {
            "parameters": sizing.parameter_count(config),
            "embeddingParameters": sizing.embedding_parameters(config),
            "maxContextTokens": config.max_position_embeddings,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "hiddenSize": config.hidden_size,
            "intermediateSize": config.intermediate_size,
            "vocabSize": config.vocab_size,
            "qLoraRank": config.q_lora_rank or 0,
            "kvLoraRank": config.kv_lora_rank,
            "qkRopeHeadDim": config.qk_rope_head_dim,
            "qkNopeHeadDim": config.qk_nope_head_dim,
            "vHeadDim": config.v_head_dim,
        }
    return {
        "generatedBy": "python charts/tools/generate.py, from ic_model.sizing_serving",
        "pageTokens": sizing_serving.PAGE_TOKENS,
        "runtimeBytes": round(sizing.RUNTIME_GIB * sizing.GIB),
        "graphBytesPerLayer": sizing_serving.GRAPH_BYTES_PER_LAYER,
        "prefill": {
            "share": sizing_serving.PREFILL_SHARE,
            "minBytes": sizing_serving.MIN_PREFILL_BYTES,
            "maxBytes": sizing_serving.MAX_PREFILL_BYTES,
            "minTokens": sizing_serving.MIN_PREFILL_TOKENS,
        },
        "vllmDefaults": VLLM_DEFAULTS,
        # as `plan_cpu_memory` divides a machine without a GPU; the loader holds the weights twice
        "cpu": {
            "processesBytes": cpu_defaults.PROCESSES_BYTES,
            "weightCopies": 2,
            "pageTokens": compat.CPU_PAGE_TOKENS,
        },
        "presets": presets,
    }


def generate(chart: Path = CHART) -> dict[Path, str]:
    """The text that each generated file should have."""
    values = (chart / "values.yaml").read_text(encoding="utf-8")
    part = chart / "values.monitoring.part.yaml"
    if part.is_file():
        own = values.split(MONITORING)[0].rstrip("\n")
        values = f"{own}\n\n{MONITORING}\n\n{part.read_text(encoding='utf-8').strip()}\n"
    keys = read_keys(values)
    readme = (chart / "README.md").read_text(encoding="utf-8")
    tables = readme_tables(keys)
    return {
        chart / "values.yaml": values,
        chart / "values.schema.json": json.dumps(schema_of(keys), indent=2) + "\n",
        chart / "README.md": README_BLOCK.sub(lambda found: f"{found[1]}\n{tables}\n{found[2]}", readme),
        chart / "files" / "sizing.json": json.dumps(sizing_table(), indent=2) + "\n",
    }


def main(arguments: list[str] | None = None) -> int:
    """Write or check the files; the exit code."""
    parser = argparse.ArgumentParser(
        description="Generate the chart's schema, README tables and sizing table."
    )
    parser.add_argument("--check", action="store_true", help="only name the files that are not up to date")
    options = parser.parse_args(arguments)
    stale = []
    for path, text in generate().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if not options.check:
                path.write_text(text, encoding="utf-8")
    for path in stale:
        sys.stdout.write(
            f"{path.relative_to(CHART.parent)} {'is not up to date' if options.check else 'written'}\n"
        )
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
