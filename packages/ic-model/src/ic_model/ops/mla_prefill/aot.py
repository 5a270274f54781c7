"""What would be launched on each chip, for compiling ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ic_model.ops.aot import AotVariant
from ic_model.ops.launch import launch_parameters
from ic_model.ops.mla_prefill.backward import delta_kernel, keys_kernel, queries_kernel
from ic_model.ops.mla_prefill.blocks import UNSPECIALIZED
from ic_model.ops.mla_prefill.hopper import UNSPECIALIZED as HOPPER_UNSPECIALIZED
from ic_model.ops.mla_prefill.hopper import forward_hopper_kernel
from ic_model.ops.mla_prefill.hopper_backward import UNSPECIALIZED as HOPPER_BACKWARD_UNSPECIALIZED
from ic_model.ops.mla_prefill.hopper_backward import backward_hopper_kernel
from ic_model.ops.mla_prefill.hopper_launch import GLUON_DIMS, GLUON_PIECES, GLUON_SIDE
from ic_model.ops.mla_prefill.hopper_sums import UNSPECIALIZED as SUMS_UNSPECIALIZED
from ic_model.ops.mla_prefill.hopper_sums import finish_kernel, prepare_kernel
from ic_model.ops.mla_prefill.kernel import forward_kernel
from ic_model.ops.mla_prefill.problem import precision, widths

# query or key, value: ic-1b and DeepSeek-V3, then other models' shapes
DIMS = ((192, 128), (128, 128), (64, 64))

# per thread; a few registers around the masked blocks, of which there are one or two per program. With Triton 3.6
# the keys' kernel on Hopper spills 76 bytes and was the fastest all the same
MAX_SPILL_BYTES = 80
# likewise of both of its consumers together: dK and dV leave them 80 registers per thread
MAX_BACKWARD_SPILL_BYTES = 320


def variants(capability: int) -> list[AotVariant]:
    """The forward and backward kernels of the models' shapes.

    Args:
        capability: of the chip; below 80 float16, else bfloat16.
    """
    found: list[AotVariant] = []
    for qk_dim, v_dim in DIMS:
        for packed in (True, False):
            found.append(forward_variant(capability, qk_dim, v_dim, packed=packed))
        for kernel in ("backward_keys", "backward_queries", "delta"):
            found.append(backward_variant(capability, kernel, qk_dim, v_dim))
    if capability == 90:
        for packed in (True, False):
            found += [gluon_variant(packed=packed), gluon_backward_variant(packed=packed)]
        for kernel in ("prepare", "finish"):
            found.append(gluon_sums_variant(kernel))
    return found


def gluon_variant(*, packed: bool = True, causal: bool = True, **changes: int) -> AotVariant:
    """The forward kernel for Hopper.

    Args:
        packed: whether sequences are packed.
        causal: see `mla_prefill`.
        changes: launch parameters other than those of the tuning file.
    """
    from triton.experimental.gluon.language import NVMMASharedLayout

    parameters = _parameters("gluon", 90, *GLUON_DIMS) | changes
    queries = parameters["block_queries"] // parameters["consumers"]
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    plain = parameters | {"tma": 1}
    signature, missing = _signature(forward_hopper_kernel, "bf16", widths(*GLUON_DIMS), plain, packed=packed)
    for name in [name for name in signature if "_desc" in name]:
        width = (
            GLUON_PIECES[1] if name.endswith("_1") else GLUON_PIECES[0] if name[0] in "qk" else GLUON_DIMS[1]
        )
        block = [queries if name[0] == "q" else parameters["block_keys"], width]
        signature[name] = f"tensordesc<bf16{block},{layout!r}>"
    return AotVariant(
        name=f"gluon {GLUON_DIMS[0]}/{GLUON_DIMS[1]} {'packed' if packed else 'dense'}",
        function=forward_hopper_kernel,
        signature=signature,
        constants={
            **missing,
            "GROUP": 1,
            "CONSUMERS": parameters["consumers"],
            "SLOTS": parameters["slots"],
            "CAUSAL": causal,
            "PACKED": packed,
            "TURNS": bool(parameters["turns"]) and parameters["consumers"] == 2,
        },
        attributes=dict.fromkeys(HOPPER_UNSPECIALIZED, 1),
        num_warps=parameters["num_warps"],
        max_spill_bytes=MAX_SPILL_BYTES,
        mma="wgmma",
    )


def gluon_backward_variant(*, packed: bool = True, causal: bool = True, **changes: int) -> AotVariant:
    """The backward kernel for Hopper.

    Args:
        packed: whether sequences are packed.
        causal: see `mla_prefill`.
        changes: launch parameters other than those of the tuning file.
    """
    from triton.experimental.gluon.language import NVMMASharedLayout

    parameters = _parameters("gluon_backward", 90, *GLUON_DIMS) | changes
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    flat = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    signature, missing = _signature(
        backward_hopper_kernel,
        "bf16",
        widths(*GLUON_DIMS),
        {"tma": 1, "block_queries": GLUON_SIDE, "block_keys": GLUON_SIDE},
        packed=packed,
    )
    for name in [name for name in signature if "_desc" in name]:
        width = GLUON_PIECES[1] if name.endswith("_1") else GLUON_PIECES[0]
        signature[name] = f"tensordesc<bf16{[GLUON_SIDE, width]},{layout!r}>"
    signature["sums_desc"] = f"tensordesc<fp32{[2, GLUON_SIDE]},{flat!r}>"
    signature["d_q_ptr"] = "*fp32"
    return AotVariant(
        name=f"gluon_backward {GLUON_DIMS[0]}/{GLUON_DIMS[1]} {'packed' if packed else 'dense'}",
        function=backward_hopper_kernel,
        signature=signature,
        constants={
            **missing,
            "GROUP": 1,
            "SLOTS": parameters["slots"],
            "CAUSAL": causal,
            "PACKED": packed,
        },
        attributes=dict.fromkeys(HOPPER_BACKWARD_UNSPECIALIZED, 1),
        num_warps=parameters["num_warps"],
        max_spill_bytes=MAX_BACKWARD_SPILL_BYTES,
        mma="wgmma",
    )


def gluon_sums_variant(kernel: str, *, packed: bool = True) -> AotVariant:
    """What runs before and after the backward kernel for Hopper.

    Args:
        kernel: "prepare" or "finish".
        packed: whether sequences are packed.
    """
    function = {"prepare": prepare_kernel, "finish": finish_kernel}[kernel]
    signature, missing = _signature(function, "bf16", {}, {}, packed=packed)
    signature |= {name: "*fp32" for name in ("sums_ptr", "d_q_sum_ptr") if name in signature}
    return AotVariant(
        name=f"{kernel} of gluon_backward",
        function=function,
        signature=signature,
        constants={**missing, "PACKED": packed} | ({"V_DIM": GLUON_DIMS[1]} if kernel == "prepare" else {}),
        attributes={name: 1 for name in (*SUMS_UNSPECIALIZED,) if name in signature},
        num_warps=4,
    )


def forward_variant(
    capability: int, qk_dim: int, v_dim: int, *, packed: bool = True, causal: bool = True, **changes: int
) -> AotVariant:
    """The forward kernel.

    Args:
        capability: of the chip.
        qk_dim: of a query.
        v_dim: of a value.
        packed: whether sequences are packed.
        causal: see `mla_prefill`.
        changes: launch parameters other than those of the tuning file.
    """
    element = _element(capability)
    parameters = _parameters("forward", capability, qk_dim, v_dim) | changes
    constants = widths(qk_dim, v_dim)
    signature, missing = _signature(forward_kernel, element, constants, parameters, packed=packed)
    return AotVariant(
        name=f"forward {qk_dim}/{v_dim} {'packed' if packed else 'dense'}",
        function=forward_kernel,
        signature=signature,
        constants={
            **constants,
            **missing,
            "GROUP": 1,
            "BLOCK_QUERIES": parameters["block_queries"],
            "BLOCK_KEYS": parameters["block_keys"],
            "CAUSAL": causal,
            "PACKED": packed,
            "DESCRIPTORS": bool(parameters["tma"]),
            "WARP_SPECIALIZE": bool(parameters["warp_specialize"]),
            "PRECISION": precision(element),
        },
        attributes=_unspecialized(signature),
        num_warps=parameters["num_warps"],
        num_stages=parameters["num_stages"],
        max_spill_bytes=MAX_SPILL_BYTES,
    )


def backward_variant(
    capability: int, kernel: str, qk_dim: int, v_dim: int, *, packed: bool = True, **changes: int
) -> AotVariant:
    """A kernel of the backward pass.

    Args:
        capability: of the chip.
        kernel: "backward_keys", "backward_queries" or "delta".
        qk_dim: of a query.
        v_dim: of a value.
        packed: whether sequences are packed.
        changes: launch parameters other than those of the tuning file.
    """
    element = _element(capability)
    constants: dict[str, Any] = dict(widths(qk_dim, v_dim))
    if kernel == "delta":
        return AotVariant(
            name=f"delta of {qk_dim}/{v_dim}",
            function=delta_kernel,
            signature=_signature(delta_kernel, element, constants, {}, packed=packed)[0],
            constants={"V_DIM": v_dim, "BLOCK_V": constants["BLOCK_V"], "BLOCK_QUERIES": 64},
        )
    parameters = _parameters(kernel, capability, qk_dim, v_dim) | changes
    function = {"backward_keys": keys_kernel, "backward_queries": queries_kernel}[kernel]
    signature, missing = _signature(function, element, constants, parameters, packed=packed)
    return AotVariant(
        name=f"{kernel} {qk_dim}/{v_dim}",
        function=function,
        signature=signature,
        constants={
            **constants,
            **missing,
            "GROUP": 1,
            "BLOCK_QUERIES": parameters["block_queries"],
            "BLOCK_KEYS": parameters["block_keys"],
            "CAUSAL": True,
            "PACKED": packed,
            "DESCRIPTORS": bool(parameters["tma"]),
            "PRECISION": precision(element),
        },
        attributes=_unspecialized(signature),
        num_warps=parameters["num_warps"],
        num_stages=parameters["num_stages"],
        max_spill_bytes=MAX_SPILL_BYTES,
    )


def _element(capability: int) -> str:
    return "fp16" if capability < 80 else "bf16"


def _parameters(kernel: str, capability: int, qk_dim: int, v_dim: int) -> dict[str, int]:
    return launch_parameters(
        "mla_prefill", capability, kernel=kernel, qk_dim=qk_dim, v_dim=v_dim, element_bytes=2
    )


def _unspecialized(signature: Mapping[str, str]) -> dict[str, int]:
    """No divisor for the arguments that the kernels are not specialised in."""
    return {name: 1 for name in UNSPECIALIZED if name in signature}


def _signature(
    function: Any, element: str, constants: Mapping[str, Any], parameters: Mapping[str, int], *, packed: bool
) -> tuple[dict[str, str], dict[str, None]]:
    """Types of a kernel's arguments by their names, and those that are None."""
    types: dict[str, str] = {}
    missing: dict[str, None] = {}
    for name in function.arg_names:
        if name.isupper():
            continue
        if "_desc" in name:
            width = constants[{"_0": "BLOCK_QK_0", "_1": "BLOCK_QK_1"}.get(name[-2:], "BLOCK_V")]
            block = parameters["block_queries" if name.startswith(("q_", "d_out_")) else "block_keys"]
            types[name] = f"tensordesc<{element}[1, {block}, 1, {width}]>"
            if not parameters["tma"] or not width:
                missing[name] = None
        elif name.startswith("cu_"):
            types[name] = "*i32"
            if not packed:
                missing[name] = None
        elif name in ("lse_ptr", "delta_ptr"):
            types[name] = "*fp32"
        elif name.endswith("_ptr"):
            types[name] = f"*{element}"
        else:
            types[name] = "fp32" if "scale" in name else "i32"
    return {name: kind for name, kind in types.items() if name not in missing}, missing
