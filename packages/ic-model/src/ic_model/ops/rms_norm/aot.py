"""What would be launched on each chip, for compiling ahead of time."""

from __future__ import annotations

from typing import Any

from ic_model.ops.aot import AotVariant
from ic_model.ops.launch import launch_parameters
from ic_model.ops.rms_norm.kernel import backward_kernel, constants, forward_kernel, weight_kernel

# ic-1b's width, query rank and latent rank; DeepSeek-V3's latent rank and width; the widest
DIMS = (2048, 768, 256, 512, 7168, 16384)
# numbers of rows that tuning may tell apart, the usual one first
TOKENS = (8192, 1)
# 16,384 float32 sums beside two rows do not fit into a block's registers; no model that we know is that wide
WIDE, WIDE_SPILL_BYTES = 8192, 256


def variants(capability: int) -> list[AotVariant]:
    """The kernels at the models' widths.

    Args:
        capability: of the chip; below 80 float16, else bfloat16.
    """
    element = "fp16" if capability < 80 else "bf16"
    found: dict[Any, AotVariant] = {}
    for dim in DIMS:
        for tokens in TOKENS:
            for residual in (False, True):
                for training in (False, True):
                    variant = forward_variant(
                        capability, element, dim, tokens=tokens, residual=residual, training=training
                    )
                    found.setdefault(_launch(variant), variant)
                variant = backward_variant(capability, element, dim, tokens=tokens, residual=residual)
                found.setdefault(_launch(variant), variant)
        variant = weight_variant(capability, element, dim)
        found[_launch(variant)] = variant
    return list(found.values())


def forward_variant(
    capability: int, element: str, dim: int, *, tokens: int, residual: bool, training: bool, **changes: int
) -> AotVariant:
    """The forward kernel.

    Args:
        capability: of the chip.
        element: Triton's type of everything but the statistics.
        dim: width of a row.
        tokens: rows, a power of two.
        residual: whether one is added.
        training: whether the statistics are kept.
        changes: launch parameters other than those of the tuning file.
    """
    pointers = ["x_ptr", "weight_ptr", "out_ptr", *(["residual_ptr", "total_ptr"] if residual else [])]
    signature = {
        **dict.fromkeys(pointers, f"*{element}"),
        **({"inverse_rms_ptr": "*fp32"} if training else {}),
        **dict.fromkeys(("x_stride", "residual_stride", "rows"), "i32"),
        "epsilon": "fp32",
    }
    name = f"forward {dim}{' residual' if residual else ''}{' training' if training else ''}"
    return _variant(capability, "forward", name, forward_kernel, signature, dim, tokens, changes)


def backward_variant(
    capability: int, element: str, dim: int, *, tokens: int, residual: bool, **changes: int
) -> AotVariant:
    """The backward kernel, with the weight's gradient.

    Args:
        capability: see `forward_variant`, as what follows.
        element: see there.
        dim: see there.
        tokens: see there.
        residual: whether h is an output with a gradient of its own.
        changes: see there.
    """
    pointers = ["d_out_ptr", "total_ptr", "weight_ptr", "d_x_ptr", *(["d_total_ptr"] if residual else [])]
    signature = {
        **dict.fromkeys(pointers, f"*{element}"),
        **dict.fromkeys(("inverse_rms_ptr", "partial_ptr"), "*fp32"),
        **dict.fromkeys(("d_out_stride", "d_total_stride", "total_stride", "rows"), "i32"),
    }
    name = f"backward {dim}{' residual' if residual else ''}"
    return _variant(capability, "backward", name, backward_kernel, signature, dim, tokens, changes)


def weight_variant(capability: int, element: str, dim: int) -> AotVariant:
    """The kernel that sums the programs' shares of the weight's gradient.

    Args:
        capability: see `forward_variant`, as what follows.
        element: see there.
        dim: see there.
    """
    parameters = launch_parameters("rms_norm", capability, kernel="weight", row_dim=dim)
    return AotVariant(
        name=f"weight {dim}",
        function=weight_kernel,
        signature={"partial_ptr": "*fp32", "d_weight_ptr": f"*{element}", "programs": "i32"},
        constants={
            "DIM": dim,
            "BLOCK_COLUMNS": parameters["block_columns"],
            "BLOCK_PROGRAMS": parameters["block_programs"],
        },
        num_warps=parameters["num_warps"],
    )


def _variant(
    capability: int, kernel: str, name: str, function: Any, signature: dict[str, str], dim: int, tokens: int,
    changes: dict[str, int],
) -> AotVariant:  # fmt: skip
    parameters = (
        launch_parameters("rms_norm", capability, kernel=kernel, row_dim=dim, tokens=tokens) | changes
    )
    options = constants(parameters, dim)
    num_warps = options.pop("num_warps")
    missing = {name: None for name in function.arg_names if name.endswith("_ptr") and name not in signature}
    return AotVariant(
        name=name if tokens == TOKENS[0] else f"{name}, {tokens} rows",
        function=function,
        signature=signature,
        constants={**missing, "DIM": dim, **options},
        num_warps=num_warps,
        max_spill_bytes=WIDE_SPILL_BYTES if kernel == "backward" and dim > WIDE else 0,
    )


def _launch(variant: AotVariant) -> tuple[Any, ...]:
    """What is compiled: variants that only differ in the number of rows are one."""
    return (
        id(variant.function),
        tuple(sorted(variant.signature.items())),
        tuple(sorted((name, str(value)) for name, value in variant.constants.items())),
        variant.num_warps,
    )
