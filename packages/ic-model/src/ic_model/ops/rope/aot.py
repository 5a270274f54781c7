"""What would be launched on each chip, for compiling ahead of time."""

from __future__ import annotations

from ic_model.ops.aot import AotVariant
from ic_model.ops.launch import launch_parameters
from ic_model.ops.rope.kernel import constants, rope_kernel

# ic-1b's queries, DeepSeek-V2-Lite's and V3's, and one shared key
HEADS = (32, 16, 128, 1)
ROTARY_DIM = 64
# numbers of tokens that tuning may tell apart, the usual one first
TOKENS = (8192, 1)


def variants(capability: int) -> list[AotVariant]:
    """The kernel for the models' heads, there and back.

    Args:
        capability: of the chip; below 80 float16, else bfloat16.
    """
    found: dict[tuple[str, ...], AotVariant] = {}
    for heads in HEADS:
        for tokens in TOKENS:
            for back in (False, True):
                variant = rope_variant(capability, heads, tokens=tokens, back=back)
                # variants that differ only in the number of tokens are one
                found.setdefault((str(sorted(variant.constants.items())), str(variant.num_warps)), variant)
    return list(found.values())


def rope_variant(
    capability: int, heads: int, *, tokens: int, dim: int = ROTARY_DIM, back: bool = False, **changes: int
) -> AotVariant:
    """The kernel.

    Args:
        capability: of the chip.
        heads: of a token.
        tokens: a power of two.
        dim: numbers of a head.
        back: whether it is the gradient's.
        changes: launch parameters other than those of the tuning file.
    """
    element = "fp16" if capability < 80 else "bf16"
    parameters = launch_parameters("rope", capability, row_dim=dim, heads=heads, tokens=tokens) | changes
    options = constants(parameters, heads, dim)
    num_warps = options.pop("num_warps")
    name = f"{heads} heads of {dim}{' back' if back else ''}"
    return AotVariant(
        name=name if tokens == TOKENS[0] else f"{name}, {tokens} tokens",
        function=rope_kernel,
        signature={
            "x_ptr": f"*{element}",
            "cos_ptr": "*fp32",
            "sin_ptr": "*fp32",
            "out_ptr": f"*{element}",
            **{argument: "i32" for argument in rope_kernel.arg_names if "stride" in argument},
            "tokens": "i32",
        },
        constants={"HEADS": heads, "ROTARY": dim, "BACK": back, **options},
        num_warps=num_warps,
    )
