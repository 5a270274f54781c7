"""The whole conversion of a checkpoint, from path to path."""

from __future__ import annotations

import logging
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ic_train.convert.calibration import Windows, WindowSizes, choose_windows
from ic_train.convert.checkpoint import converted_config, write_checkpoint
from ic_train.convert.memory import ConversionNeeds, conversion_needs
from ic_train.convert.options import ConversionOptions, check_options
from ic_train.convert.pipeline import Converter
from ic_train.convert.record import PLOT_FILE, RECORD_FILE, conversion_record, plot_conversion
from ic_train.convert.source import Source, open_source
from ic_train.convert.workspace import Workspace

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# free disk beyond what is needed
_SLACK_BYTES = 64 * 1024**2
logger = logging.getLogger(__name__)


def convert(
    source_path: str | Path,
    target: str | Path,
    options: ConversionOptions,
    *,
    calibration: Sequence[str] = (),
    held_out: Sequence[str] = (),
    sizes: WindowSizes | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    measured: Path | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint into a new folder.

    What is in progress is in `TARGET.partial`; the same call continues it. The target appears when it is whole.

    Args:
        source_path: a Hugging Face folder or a GGUF file.
        target: folder to make; it must not exist, or be empty.
        options: what to convert to.
        calibration: text files or folders; default: the embedded Jargon File.
        held_out: text files or folders to report perplexity on; default: the ends of the calibration texts.
        sizes: how much of the texts is used.
        dtype: of the result; default: the source's.
        device: to run forward passes on.
        measured: folder for what does not depend on the options, to share between conversions of one source.

    Returns:
        the record, as in `conversion.json`.

    Raises:
        ValueError: something about the source, the options, the texts or the disk; the message says what.
    """
    started = time.perf_counter()
    folder, sizes = Path(target), sizes or WindowSizes()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; give a new one")
    source = open_source(source_path)
    check_options(options, source)
    warn_about(source, options)
    windows = choose_windows(source.tokenizer, calibration, held_out, sizes)
    _check_context(source, sizes)
    chosen = dtype or source.dtype
    base = _settings(source, windows, sizes, device)
    workspace = Workspace(folder.with_name(f"{folder.name}.partial"), base | asdict(options))
    needs = planned_needs(source, options, sizes, chosen)
    _check_disk(needs, workspace, shared=measured is not None)
    shared = Workspace(measured, base) if measured else workspace
    converter = Converter(source, windows, shared, torch.device(device))
    conversion = converter.convert(options, workspace)
    config = converted_config(source, options, conversion.plan.frequencies, dtype=chosen)
    checkpoint = write_checkpoint(source, workspace, conversion, config, chosen)
    record = conversion_record(
        source,
        options,
        conversion,
        config,
        text=windows.record | asdict(sizes),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=_peak_memory_bytes(),
    )
    workspace.save_json(f"checkpoint/{RECORD_FILE}", record)
    plot_conversion(record, checkpoint / PLOT_FILE)
    if folder.is_dir():
        folder.rmdir()
    checkpoint.rename(folder)
    shutil.rmtree(workspace.folder)
    return record


def warn_about(source: Source, options: ConversionOptions) -> list[str]:
    """Say what is legal and probably not meant."""
    said = []
    row = options.kv_lora_rank + options.qk_rope_head_dim
    if row >= source.kv_numbers_per_layer:
        said.append(
            f"the latent row has {row} numbers (kv_lora_rank + qk_rope_head_dim), and the source caches "
            f"{source.kv_numbers_per_layer} per token and layer: nothing is saved"
        )
    if source.context_tokens < source.config.max_position_embeddings:
        said.append(
            f"the source attends to a window of {source.context_tokens} tokens, the converted "
            "model to everything: "
            f"its context is limited to that window"
        )
    for line in said:
        logger.warning("%s", line)
    return said


def planned_needs(
    source: Source, options: ConversionOptions, sizes: WindowSizes, dtype: torch.dtype
) -> ConversionNeeds:
    """Memory and disk that a conversion will take, before it starts."""
    placeholder = (1.0,) * (options.qk_rope_head_dim // 2)
    return conversion_needs(
        converted_config(source, options, placeholder, dtype=dtype),
        kv_heads=source.shape.kv_heads,
        sizes=sizes,
        dtype_bytes=dtype.itemsize,
    )


def _settings(source: Source, windows: Windows, sizes: WindowSizes, device: str) -> dict[str, Any]:
    """What measurements depend on: a changed source or text starts anew."""
    path = source.path
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {
        "format": 1,
        "files": {
            file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()
        },
        "text": windows.record,
        "sizes": asdict(sizes),
        "device": device,
    }


def _check_context(source: Source, sizes: WindowSizes) -> None:
    longest = source.context_tokens
    for name in ("calibration_tokens", "evaluation_tokens"):
        if getattr(sizes, name) > longest:
            raise ValueError(f"{name} is {getattr(sizes, name)}; the source takes at most {longest}")


def _check_disk(needs: ConversionNeeds, workspace: Workspace, *, shared: bool) -> None:
    held = sum(file.stat().st_size for file in workspace.folder.rglob("*") if file.is_file())
    wanted = needs.workspace_bytes + needs.checkpoint_bytes + _SLACK_BYTES - held
    free = shutil.disk_usage(workspace.folder).free
    if free < wanted and not shared:
        raise ValueError(
            f"{workspace.folder.parent} has {free / 1e9:.2f} GB free; the conversion needs "
            f"{wanted / 1e9:.2f} GB there"
        )


def _peak_memory_bytes() -> int:
    """Of this process since it started."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
