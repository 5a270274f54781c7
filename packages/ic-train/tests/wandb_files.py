"""The file of an offline run of W&B: records in blocks, as in a LevelDB log."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK_BYTES, _HEADER_BYTES = 32768, 7


def read_records(file: Path) -> Iterator[Any]:
    """W&B's records, in the order in which they were written."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = file.read_bytes(), _HEADER_BYTES, b""
    while place + _HEADER_BYTES <= len(data):
        left = _BLOCK_BYTES - place % _BLOCK_BYTES
        if left < _HEADER_BYTES:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER_BYTES])
        parts += data[place + _HEADER_BYTES : place + _HEADER_BYTES + length]
        place += _HEADER_BYTES + length
        # whole, or the last part of one
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def values_of(items: Any) -> dict[str, Any]:
    """Names and values of a record's items."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
