"""What would be launched on each chip, for compiling ahead of time."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon.language import NVMMASharedLayout

from ic_model.ops.aot import AotVariant
from ic_model.ops.launch import launch_parameters
from ic_model.ops.mla_decode.hopper import decode_hopper_kernel
from ic_model.ops.mla_decode.hopper_rows import decode_hopper_rows_kernel
from ic_model.ops.mla_decode.kernel import combine_kernel, decode_kernel
from ic_model.ops.mla_decode.launch import (
    OP,
    ROPE_DIM,
    Split,
    descriptor_blocks,
    hopper_constants,
    triton_constants,
)
from ic_model.ops.mla_decode.turing import aot_variants

PAGE_TOKENS = 64
BLOCK_SEQS = 32
PROCESSORS = {75: 40, 80: 108, 89: 128, 90: 132}
# (kv_lora_rank, rows): ic-1b with one query token and with four, DeepSeek-V3 on eight GPUs and on one
SHAPES = ((256, 32), (256, 128), (512, 16), (512, 128))
# offsets of queries and results while they wait for the next sequence: not in the loop over tiles
MAX_SPILL_BYTES = 512


def variants(capability: int) -> list[AotVariant]:
    """Both kernels in plain Triton, and the chip's own.

    Args:
        capability: of the chip; below 80 float16, else bfloat16.
    """
    element = "fp16" if capability < 80 else "bf16"
    found = []
    for kv_lora_rank, rows in SHAPES:
        # 512 columns are refused below 80: they do not fit
        if capability >= 80 or kv_lora_rank <= 256:
            found.append(_plain(capability, kv_lora_rank, rows, element))
        if capability == 90:
            found += [hopper_variant(kv_lora_rank, rows, element, kv) for kv in (element, "fp8e4nv")]
    if capability < 90:
        # on Hopper its own kernels take these
        found.append(_plain(capability, 256, 32, element, fp8=True))
        if capability >= 80:
            found.append(_plain(capability, 512, 16, element, fp8=True))
    else:
        # other numbers of rows have launch parameters of their own
        found += [hopper_variant(256, 16, element, kv) for kv in (element, "fp8e4nv")]
        found.append(hopper_variant(512, 32, element, element))
        found.append(hopper_variant(256, 64, element, element))
    for batch in (1, 128):
        found.append(_combine(capability, batch, element))
    found.append(_combine(capability, 1, element, rows=16, block_rows=16))
    if capability == 90:
        found += [
            _combine(capability, 1, element, rows=128, block_rows=block_rows) for block_rows in (64, 128)
        ]
    return found + (aot_variants(capability) if capability == 75 else [])


def _plain(capability: int, kv_lora_rank: int, rows: int, element: str, *, fp8: bool = False) -> AotVariant:
    row_dim = kv_lora_rank + ROPE_DIM
    parameters = launch_parameters(
        OP, capability, kernel="triton", row_dim=row_dim, rows=rows, element_bytes=2
    )
    constants = triton_constants(parameters, 1, kv_lora_rank, row_dim, PAGE_TOKENS)
    constants |= {"BLOCK_SEQS": BLOCK_SEQS, "FP8": fp8, "PDL": capability >= 90}
    # e4m3 comes as bytes
    elements = {
        "q_ptr": element,
        "q_rope_ptr": element,
        "kv_ptr": "u8" if fp8 else element,
        "out_ptr": element,
    }
    return AotVariant(
        name=f"triton {row_dim}, {rows} rows" + (", fp8" if fp8 else ""),
        function=decode_kernel,
        signature=_signature(decode_kernel, elements),
        constants=constants,
        num_warps=parameters["num_warps"],
        num_stages=parameters["num_stages"],
        attributes={"table_stride": 1},
        mma={75: "fma", 80: "mma.sync", 89: "mma.sync", 90: "wgmma"}[capability],
        max_spill_bytes=MAX_SPILL_BYTES,
    )


def hopper_variant(kv_lora_rank: int, rows: int, element: str, kv: str, **changes: int) -> AotVariant:
    """A kernel for Hopper.

    Args:
        kv_lora_rank: C.
        rows: heads times query tokens.
        element: Triton type of queries and results.
        kv: of the cached rows.
        changes: launch parameters other than those of the tuning file.
    """
    row_dim, kv_bytes = kv_lora_rank + ROPE_DIM, 1 if kv == "fp8e4nv" else 2
    parameters = launch_parameters(OP, 90, kernel="hopper", row_dim=row_dim, rows=rows, kv_bytes=kv_bytes)
    parameters |= changes
    kernel = decode_hopper_rows_kernel if parameters["gathers"] else decode_hopper_kernel
    signature = _signature(kernel, {"q_ptr": element, "q_rope_ptr": element, "out_ptr": element})
    constants = hopper_constants(parameters, 1, kv_lora_rank, PAGE_TOKENS)
    blocks = descriptor_blocks(kv_lora_rank, kv_bytes, constants)
    for name, (block, swizzle) in zip(("latent_desc", "rope_desc"), blocks, strict=True):
        layout = NVMMASharedLayout(swizzle, 8 * kv_bytes, 2)
        signature[name] = f"tensordesc<{kv}{block},{layout!r}>"
    registers = parameters["max_registers"]
    return AotVariant(
        name=f"hopper {row_dim}, {rows} rows, {kv}",
        function=kernel,
        signature=signature,
        constants=constants | {"BLOCK_SEQS": BLOCK_SEQS, "PDL": True},
        num_warps=parameters["num_warps"],
        attributes={"table_stride": 1},
        mma="wgmma",
        max_spill_bytes=MAX_SPILL_BYTES,
        options={"maxnreg": registers} if registers else {},
    )


def _combine(
    capability: int, batch: int, element: str, *, rows: int = 32, block_rows: int = 32
) -> AotVariant:
    shape = {"kv_lora_rank": 512, "block_rows": block_rows, "batch": batch}
    parameters = launch_parameters(OP, capability, kernel="combine", **shape)
    split = Split(
        batch=batch, rows=rows, block_rows=block_rows, block_tokens=64, processors=PROCESSORS[capability]
    )
    return AotVariant(
        name=f"combine, batch {batch}" + (f", blocks of {block_rows} rows" if block_rows != 32 else ""),
        function=combine_kernel,
        signature=_signature(combine_kernel, {"out_ptr": element}),
        constants=split.combine_constants(512, parameters) | {"PDL": capability >= 90},
        num_warps=parameters["num_warps"],
    )


def _signature(function: Any, elements: dict[str, str]) -> dict[str, str]:
    """Types of a kernel's arguments: pointers by name, float32 unless said, scales, and 32-bit numbers."""
    constants = {parameter.name for parameter in function.params if parameter.is_constexpr}
    found = {}
    for name in function.arg_names:
        if name in constants:
            continue
        if name.endswith("_ptr"):
            found[name] = f"*{elements.get(name, 'i32' if name in ('table_ptr', 'lens_ptr') else 'fp32')}"
        else:
            found[name] = "fp32" if "scale" in name else "i32"
    return found
