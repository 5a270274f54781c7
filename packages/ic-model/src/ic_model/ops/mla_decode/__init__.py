"""Absorbed attention over cached latent rows: the step that decoding is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ic_model.ops.dispatch import Implementation, dispatch, kernel_refuses
from ic_model.ops.mla_decode import reference
from ic_model.ops.mla_decode.reference import latent_attention

__all__ = ["latent_attention", "mla_decode"]

# what strides have to be multiples of. Triton is told so; without it rows are read number by number, and on Hopper
# Triton 3.6 compiles that wrongly
ALIGNED = 16


def mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    *,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_lora_rank: int,
    softmax_scale: float,
    kv_scale: float = 1.0,
    q_rope: torch.Tensor | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to paged latent rows; the last T rows of a sequence are those of its T queries, causally.

    With the key up-projection absorbed into the query and the value up-projection left to the caller
    (DeepSeek-V2, arXiv 2405.04434, section 2.1.2), s over a sequence's rows, `c` the first C of a row's numbers:

        out[t, n] = sum_s softmax_s(softmax_scale * q[t, n] . row[s])[s] * c[s]

    The kernels wait for nothing on the host, so that a CUDA graph may hold a call and be replayed with other
    `seq_lens`, `block_table` and rows; they give the same bits every time.

    Args:
        q: `[B, T, N, C + R]` float32, float16 or bfloat16, the absorbed query followed by the rotated query; the
            absorbed query `[B, T, N, C]` alone where q_rope has the other.
        kv_cache: `[pages, page_tokens, C + R]` of q's dtype or float8_e4m3fn, the pages of all sequences.
        block_table: `[B, max_pages]` int32, the pages of each sequence in order. Entries past a sequence's
            last page are never read, nor are rows past its last token.
        seq_lens: `[B]` int32, cached tokens of each sequence, its T queries included; 0 gives zeros.
        kv_lora_rank: C.
        softmax_scale: positive factor on the scores.
        kv_scale: what a number in kv_cache is multiplied by, positive, one for the whole tensor.
        q_rope: `[B, T, N, R]` of q's dtype, the rotated query where it lies apart, so that nobody has to copy both
            into one tensor.
        implementation: "hopper", "turing", "triton" or "reference"; None takes the first of these that can.

    Returns:
        out `[B, T, N, C]` in q's dtype, and the log-sum-exp of the scores `[B, T, N]` in float32. A query that
        sees nothing gets zeros and minus infinity.

    Raises:
        ValueError: shapes, dtypes, devices or numbers do not fit, or `implementation` is none of them or cannot
            take these.
    """
    _check(q, q_rope, kv_cache, block_table, seq_lens, kv_lora_rank)
    _check_numbers(softmax_scale=softmax_scale, kv_scale=kv_scale)
    if q_rope is not None and not (_lies_well(q) and _lies_well(q_rope)):
        # kernels would refuse them as they lie
        q, q_rope = torch.cat((q, q_rope), dim=-1), None
    return dispatch(
        "mla_decode",
        _IMPLEMENTATIONS,
        implementation,
        q,
        kv_cache,
        block_table=block_table,
        seq_lens=seq_lens,
        kv_lora_rank=kv_lora_rank,
        softmax_scale=softmax_scale,
        kv_scale=kv_scale,
        q_rope=q_rope,
    )


def _lies_well(q: torch.Tensor) -> bool:
    """Whether the kernels read a part of the query, `[B, T, N, C]` or `[B, T, N, R]`, as it is."""
    rows = q.stride(-1) == 1 and not any(stride % ALIGNED for stride in q.stride()[:3])
    # copies to shared memory take 16 bytes at a time
    return rows and q.data_ptr() % 16 == 0


def _check(
    q: torch.Tensor,
    q_rope: torch.Tensor | None,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    kv_lora_rank: int,
) -> None:
    shapes = {"q": q, "kv_cache": kv_cache, "block_table": block_table, "seq_lens": seq_lens}
    for (name, tensor), dims in zip(shapes.items(), (4, 3, 2, 1), strict=True):
        if tensor.dim() != dims:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; accepted: {dims} dimensions")
    if any(tensor.device != q.device for tensor in shapes.values()):
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor in shapes.items())
        raise ValueError(f"the tensors are {found}; accepted: one device")
    if q_rope is not None and (
        q_rope.shape[:-1] != q.shape[:-1]
        or (q_rope.dtype, q_rope.device) != (q.dtype, q.device)
        or q.shape[-1] != kv_lora_rank
        or kv_lora_rank + q_rope.shape[-1] != kv_cache.shape[-1]
    ):
        raise ValueError(
            f"q_rope is {list(q_rope.shape)} {q_rope.dtype} on {q_rope.device}, q {list(q.shape)} {q.dtype} on "
            f"{q.device}, kv_lora_rank {kv_lora_rank} and kv_cache has rows of {kv_cache.shape[-1]}; accepted: "
            "q with rows of kv_lora_rank, q_rope with the rest of kv_cache's, else alike"
        )
    if q_rope is None and (q.shape[-1] != kv_cache.shape[-1] or not 0 < kv_lora_rank < q.shape[-1]):
        raise ValueError(
            f"q has rows of {q.shape[-1]}, kv_cache rows of {kv_cache.shape[-1]}, and kv_lora_rank is "
            f"{kv_lora_rank}; accepted: equal rows, longer than kv_lora_rank by qk_rope_head_dim"
        )
    if not q.shape[0] == block_table.shape[0] == seq_lens.shape[0]:
        raise ValueError(
            f"q is for {q.shape[0]} sequences, block_table for {block_table.shape[0]} and seq_lens for "
            f"{seq_lens.shape[0]}; accepted: the same number"
        )
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q is {q.dtype}; accepted: float32, float16, bfloat16")
    if kv_cache.dtype not in (q.dtype, torch.float8_e4m3fn):
        raise ValueError(f"kv_cache is {kv_cache.dtype}; accepted: q's {q.dtype}, or torch.float8_e4m3fn")
    for name in ("block_table", "seq_lens"):
        if shapes[name].dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} is {shapes[name].dtype}; accepted: torch.int32 (and int64 in the reference)"
            )


def _check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < float("inf"):
            raise ValueError(f"{name} is {number}; accepted: positive numbers")


# the launchers import Triton, which not every machine has: each is asked for only when it may be used
def _load(name: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        from ic_model.ops.mla_decode import launch

        return getattr(launch, name)

    return load


def _refuses(name: str) -> Callable[..., str | None]:
    def refuses(*tensors: torch.Tensor, **arguments: Any) -> str | None:
        reason = kernel_refuses(*tensors)
        return reason if reason is not None else _load(name)()(*tensors, **arguments)

    return refuses


def _load_turing() -> Callable[..., Any]:
    from ic_model.ops.mla_decode.turing import mla_decode_turing

    return mla_decode_turing


def _turing_refuses(q: torch.Tensor, kv_cache: torch.Tensor, **arguments: Any) -> str | None:
    reason = kernel_refuses(q, kv_cache)
    if reason is not None:
        return reason
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) != (7, 5):
        return "it is for compute capability 7.5"
    from ic_model.ops.mla_decode.reference import joined
    from ic_model.ops.mla_decode.turing import refusal

    names = ("block_table", "seq_lens", "kv_lora_rank")
    q = joined(q, arguments["q_rope"])
    return refusal(q, kv_cache, **{name: arguments[name] for name in names})


_IMPLEMENTATIONS = (
    Implementation("hopper", _load("mla_decode_hopper"), _refuses("hopper_refuses")),
    Implementation("turing", _load_turing, _turing_refuses),
    Implementation("triton", _load("mla_decode_triton"), _refuses("triton_refuses")),
    Implementation("reference", lambda: reference.mla_decode, lambda *_, **__: None),
)
