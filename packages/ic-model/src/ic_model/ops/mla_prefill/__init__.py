"""Exact attention over packed or dense sequences, for prefill and training; forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ic_model.ops.dispatch import Implementation, dispatch, kernel_refuses
from ic_model.ops.mla_prefill import reference, sdpa
from ic_model.ops.mla_prefill.reference import merge_attention, merge_attention_

__all__ = ["merge_attention", "merge_attention_", "mla_prefill", "mla_prefill_dense"]

# What is tried, in this order, by compute capability from which on; who cannot take the arguments is passed over.
# 90: by speed on an NVIDIA H100 (docs/log.md, 2026-11-25). 80 and 89: not measured; PyTorch gives 192/128 to cuDNN
# only from 90 on. 75: not measured; stock Triton has no tensor cores there, nor has cuDNN an attention.
AUTOMATIC_ORDER = {
    90: ("gluon", "cudnn", "triton", "torch", "reference"),
    80: ("triton", "torch", "reference"),
    0: ("torch", "triton", "reference"),
}

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_DIM = 256
# kernels count tokens in 32 bits
MAX_TOKENS = 2**31 - 1


def mla_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool = True,
    return_lse: bool = False,
    implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend within each of several packed sequences (arXiv 2205.14135; formula in `reference.py`).

    Gradients flow to q, k and v through out, not through lse. The lengths stay on the device: nothing waits for
    the host unless "reference" is chosen.

    Args:
        q: `[tokens_q, N, QK]`, any strides but the last, which is 1.
        k: `[tokens_k, N_kv, QK]`, likewise, in q's dtype; N is a multiple of N_kv.
        v: `[tokens_k, N_kv, V]`, likewise. QK and V are multiples of 16, up to 256.
        cu_seqlens_q: `[sequences + 1]` int32 on q's device, where each sequence's queries begin, from 0; the last
            one is where they end. Queries past it get zeros.
        cu_seqlens_k: the same of the keys; None: as the queries.
        max_seqlen_q: longest sequence of queries in tokens, or any bound of it. Where there is one sequence, of
            as many keys and without cu_seqlens_k, a bound of q's tokens says that it fills q: cuDNN may take it.
        max_seqlen_k: the same of the keys.
        softmax_scale: positive factor on the scores.
        causal: whether query i of Lq sees only keys up to i + Lk - Lq of Lk; else it sees all.
        return_lse: whether the log-sum-exp of the scores is returned as well.
        implementation: "cudnn", "triton", "gluon", "torch" or "reference"; None to choose. The gradients of
            "cudnn" and "torch" may differ from run to run in their last bits.

    Returns:
        out `[tokens_q, N, V]` in q's dtype, and lse `[N, tokens_q]` float32, natural logarithm, where asked for. A
        query that sees nothing gets zeros and minus infinity.

    Raises:
        ValueError: shapes, dtypes, devices or numbers do not fit.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    _check_tensors(q, k, v, 3)
    _check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if cu_seqlens_k is cu_seqlens_q and q.shape[0] != k.shape[0]:
        raise ValueError(
            f"k has {k.shape[0]} tokens and q {q.shape[0]}; accepted: as many, without cu_seqlens_k"
        )
    _check_scale(softmax_scale)
    return dispatch(
        "mla_prefill",
        _implementations("mla_prefill", q, implementation),
        implementation,
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        return_lse=return_lse,
    )


def mla_prefill_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    return_lse: bool = False,
    implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend in a batch of sequences of equal length, laid out as PyTorch's scaled_dot_product_attention has them.

    Strided inputs are read where they are. Causal is aligned bottom right: the last query sees all keys.

    Args:
        q: `[B, N, T, QK]`, any strides but the last, which is 1.
        k: `[B, N_kv, S, QK]`, likewise.
        v: `[B, N_kv, S, V]`, likewise.
        softmax_scale: see `mla_prefill`, as all that follows.
        causal: see there.
        return_lse: see there.
        implementation: see there.

    Returns:
        out `[B, N, T, V]`, contiguous as `[B, T, N, V]`, and lse `[B, N, T]` where asked for.

    Raises:
        ValueError: shapes, dtypes or numbers do not fit.
    """
    q, k, v = (part.transpose(1, 2) if part.ndim == 4 else part for part in (q, k, v))
    _check_tensors(q, k, v, 4)
    _check_scale(softmax_scale)
    found = dispatch(
        "mla_prefill_dense",
        _implementations("mla_prefill_dense", q, implementation),
        implementation,
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        return_lse=return_lse,
    )
    return (found[0].transpose(1, 2), found[1]) if return_lse else found.transpose(1, 2)


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ndim: int) -> None:
    shapes = f"q has shape {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == ndim:
        raise ValueError(f"{shapes}; accepted: {ndim} dimensions each")
    if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1] or q.shape[:-3] != k.shape[:-3]:
        raise ValueError(
            f"{shapes}; k and v must agree but for the last dimension, q and k in it and the batch"
        )
    if not k.shape[-2] or not q.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{shapes}; the heads of q must be a multiple of those of k")
    for name, part in (("q", q), ("k", k), ("v", v)):
        if part.dtype not in DTYPES or part.dtype != q.dtype:
            raise ValueError(
                f"{name} is {part.dtype}; accepted: float32, float16 or bfloat16, all three alike"
            )
        if part.device != q.device:
            raise ValueError(f"{name} is on {part.device} and q on {q.device}; accepted: one device")
        if part.shape[-1] % 16 or not 16 <= part.shape[-1] <= MAX_DIM:
            raise ValueError(
                f"{name} has last dimension {part.shape[-1]}; accepted: multiples of 16 to {MAX_DIM}"
            )
        if part.shape[-3] > MAX_TOKENS:
            raise ValueError(f"{name} has {part.shape[-3]} tokens; accepted: up to {MAX_TOKENS}")
        if part.stride(-1) != 1:
            raise ValueError(f"{name} has stride {part.stride(-1)} in its last dimension; accepted: 1")


def _check_lengths(
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    for name, lengths in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if lengths.dtype not in (torch.int32, torch.int64) or lengths.ndim != 1 or lengths.shape[0] < 2:
            raise ValueError(
                f"{name} is {lengths.dtype} of shape {list(lengths.shape)}; accepted: int32 or int64 "
                "[sequences + 1], of at least one sequence"
            )
        if lengths.device != q.device or not lengths.is_contiguous():
            raise ValueError(f"{name} is on {lengths.device}; it must be contiguous on {q.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q has {cu_seqlens_q.shape[0]} numbers and cu_seqlens_k {cu_seqlens_k.shape[0]}; "
            "accepted: as many"
        )
    for name, longest, tokens in (("q", max_seqlen_q, q.shape[0]), ("k", max_seqlen_k, k.shape[0])):
        if longest < 0 or (tokens and not longest):
            raise ValueError(
                f"max_seqlen_{name} is {longest} with {tokens} tokens; accepted: numbers from 1 on"
            )


def _check_scale(softmax_scale: float) -> None:
    if not 0 < softmax_scale < float("inf"):
        raise ValueError(f"softmax_scale is {softmax_scale}; accepted: positive numbers")


def _implementations(function: str, q: torch.Tensor, wanted: str | None) -> list[Implementation]:
    """What computes `mla_prefill` or `mla_prefill_dense`: the best for q's device first, or all by name."""

    def launch(name: str, **options: Any) -> Callable[[], Callable[..., Any]]:
        def load() -> Callable[..., Any]:
            from ic_model.ops.mla_prefill import launch

            return partial(getattr(launch, name), **options)

        return load

    known = {
        "cudnn": Implementation("cudnn", lambda: getattr(sdpa, f"{function}_cudnn"), sdpa.cudnn_refuses),
        "triton": Implementation("triton", launch(function), _triton_refuses),
        "gluon": Implementation(
            "gluon", launch(function, gluon=True, by_name=wanted is not None), _gluon_refuses
        ),
        "torch": Implementation("torch", lambda: getattr(sdpa, function), sdpa.refuses),
        "reference": Implementation("reference", lambda: getattr(reference, function), lambda *_, **__: None),
    }
    if wanted is not None:
        return list(known.values())
    capability = 0
    if q.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(q.device)
        capability = 10 * major + minor
    order = next(names for lowest, names in AUTOMATIC_ORDER.items() if capability >= lowest)
    return [known[name] for name in order]


def _triton_refuses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> str | None:
    return kernel_refuses(q, k, v)


def _gluon_refuses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> str | None:
    reason = kernel_refuses(q, k, v)
    if reason is not None:
        return reason
    from ic_model.ops.mla_prefill.hopper_launch import gluon_refuses

    return gluon_refuses(q, k, v)
