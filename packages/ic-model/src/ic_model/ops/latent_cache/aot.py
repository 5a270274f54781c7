"""What would be launched on each chip, for compiling ahead of time."""

from __future__ import annotations

from ic_model.ops.aot import AotVariant
from ic_model.ops.latent_cache.kernel import (
    AS_IT_IS,
    FP8_CAPABILITY,
    FP8_COMPUTED,
    FP8_CONVERTED,
    constants,
    latent_cache_kernel,
)
from ic_model.ops.launch import launch_parameters

# ic-1b's latent rank and DeepSeek-V3's
RANKS = (256, 512)
ROTARY_DIM = 64
PAGE_TOKENS = 64
# a step of decoding, a prompt
TOKENS = (32, 8192)


def variants(capability: int) -> list[AotVariant]:
    """The kernel for the models' rows, in caches of the model's dtype and of float8.

    Args:
        capability: of the chip; below 80 float16, else bfloat16.
    """
    return [
        latent_cache_variant(capability, rank, tokens=tokens, fp8=fp8, norm=norm, rows=rows)
        for rank in RANKS
        for tokens in TOKENS
        for fp8 in (False, True)
        # without a norm, and with rows to return, as far as a prompt needs it
        for norm, rows in ((True, False), *(((False, False), (True, True)) if tokens == TOKENS[1] else ()))
    ]


def latent_cache_variant(
    capability: int,
    rank: int,
    *,
    tokens: int,
    fp8: bool,
    norm: bool = True,
    rows: bool = False,
    **changes: int,
) -> AotVariant:
    """The kernel.

    Args:
        capability: of the chip.
        rank: C.
        tokens: a power of two.
        fp8: whether the cache is float8.
        norm: whether the latent is normed.
        rows: whether what was computed is returned.
        changes: launch parameters other than those of the tuning file.
    """
    element = "fp16" if capability < 80 else "bf16"
    kv_dtype = "fp8_e4m3" if fp8 else {"fp16": "float16", "bf16": "bfloat16"}[element]
    parameters = launch_parameters(
        "latent_cache", capability, row_dim=rank + ROTARY_DIM, tokens=tokens, kv_dtype=kv_dtype
    )
    options = constants(parameters | changes, rank, ROTARY_DIM)
    num_warps = options.pop("num_warps")
    given = ["latent_ptr", "k_rope_ptr", *(["weight_ptr"] if norm else [])]
    returned = ["normed_ptr", "rotated_ptr"]
    missing = [
        name for name in ("weight_ptr", *returned) if name not in [*given, *(returned if rows else [])]
    ]
    storage = (FP8_CONVERTED if capability >= FP8_CAPABILITY else FP8_COMPUTED) if fp8 else AS_IT_IS
    return AotVariant(
        name=f"{rank}+{ROTARY_DIM}, {tokens} tokens{', fp8' if fp8 else ''}{'' if norm else ', no norm'}"
        f"{', rows returned' if rows else ''}",
        function=latent_cache_kernel,
        signature={
            **dict.fromkeys(given + (returned if rows else []), f"*{element}"),
            **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
            "cache_ptr": "*u8" if fp8 else f"*{element}",
            "slot_ptr": "*i64",
            **dict.fromkeys(("epsilon", "inverse_scale"), "fp32"),
            **{name: "i32" for name in latent_cache_kernel.arg_names if "stride" in name},
            **dict.fromkeys(("tokens", "pages"), "i32"),
        },
        constants={
            **dict.fromkeys(missing),
            "PAGE_TOKENS": PAGE_TOKENS,
            "RANK": rank,
            "ROTARY": ROTARY_DIM,
            "STORAGE": storage,
            **options,
        },
        num_warps=num_warps,
    )
