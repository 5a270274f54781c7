"""Attention implementations for transformers: `mla_prefill` on one process, `ring` over several.

`config._attn_implementation` names one; the model hands over what it was called with, among it `layout`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from ic_model.ops.mla_prefill import mla_prefill, mla_prefill_dense
from ic_model.ops.mla_prefill.compiled import compiled_attention, takes_compiled
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from ic_train.context_parallel.layout import SequenceLayout
from ic_train.context_parallel.ring import Ring, RingShape, ring_attention

MLA_PREFILL, RING = "mla_prefill", "ring"
# of mla_prefill, by name: "mla_prefill" lets the op choose
KERNELS = ("triton", "cudnn", "gluon", "torch", "reference")


def register_attention(ring: Ring | None = None) -> list[str]:
    """Make the implementations known to transformers.

    Args:
        ring: the processes that share a sequence; without it `ring` is not registered.

    Returns:
        the names that `attn_implementation` then takes.
    """
    functions: dict[str, Any] = {MLA_PREFILL: mla_prefill_attention}
    for kernel in KERNELS:
        functions[f"{MLA_PREFILL}_{kernel}"] = partial(mla_prefill_attention, implementation=kernel)
    if ring is not None:
        attend: Any = partial(latent_ring_attention, ring=ring)
        attend.takes_latent_rows = True
        functions[RING] = attend
    for name, function in functions.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _no_mask)
    return list(functions)


def mla_prefill_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    layout: SequenceLayout | None = None,
    implementation: str | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention by `ic_model.ops.mla_prefill`, in the signature of transformers' attention functions.

    Args:
        module: unused, part of the signature.
        query: `[B, N, T, QK]`.
        key: `[B, N, S, QK]`.
        value: `[B, N, S, V]`.
        attention_mask: must be None: documents come as `layout`, padding is not supported.
        scaling: softmax scale.
        dropout: unused, the model has no attention dropout.
        layout: where documents begin; None: every sequence is one.
        implementation: of `mla_prefill`; None to choose.

    Returns:
        the output `[B, T, N, V]`, and None for the weights.

    Raises:
        ValueError: there is a mask.
    """
    if torch.compiler.is_compiling() and attention_mask is None:
        out = _traced(query, key, value, scaling, layout, implementation)
        if out is not None:
            return out, None
    return _untraced(query, key, value, attention_mask, scaling, layout, implementation), None


def _traced(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    layout: SequenceLayout | None,
    implementation: str | None,
) -> torch.Tensor | None:
    """The output as one node of the graph that is being compiled; None where that cannot be."""
    starts = None
    # of the layout nothing that differs from batch to batch may be looked at: the graph would be compiled anew
    if layout is not None and layout.packed:
        starts = layout.device_starts
        if starts is None or starts.device != query.device:
            return None
    if not query.dtype == key.dtype == value.dtype or not takes_compiled(
        query.device, query.dtype, query.shape[-1], value.shape[-1], implementation
    ):
        return None
    q, k, v = (part.transpose(1, 2) for part in (query, key, value))
    return compiled_attention(
        q, k, v, softmax_scale=scaling, cu_seqlens=starts, implementation=implementation
    )


# the op chooses among kernels and launches its own: nothing for the compiler to trace, who may fuse the rest
@torch.compiler.disable
def _untraced(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    layout: SequenceLayout | None,
    implementation: str | None,
) -> torch.Tensor:
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; with attn_implementation {MLA_PREFILL!r} it "
            "must be None: documents come as `layout`"
        )
    if layout is None or layout.document_starts is None:
        out = mla_prefill_dense(query, key, value, softmax_scale=scaling, implementation=implementation)
        assert isinstance(out, torch.Tensor)
        return out.transpose(1, 2)
    starts = layout.cumulative_lengths(query.device)
    packed = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    longest = layout.tokens_per_sequence
    out = mla_prefill(
        *packed,
        cu_seqlens_q=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scaling,
        implementation=implementation,
    )
    assert isinstance(out, torch.Tensor)
    return out.unflatten(0, (query.shape[0], query.shape[2]))


@torch.compiler.disable
def latent_ring_attention(
    module: Any,
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    *,
    scaling: float,
    ring: Ring,
    layout: SequenceLayout,
    **kwargs: Any,
) -> torch.Tensor:
    """Causal attention over the tokens of all processes of a ring, called with latent rows instead of keys.

    Args:
        module: the ICAttention, for its up-projection.
        q_nope: `[1, T, N, P]`, T this process's tokens.
        q_rope: `[1, T, N, R]`.
        latent: `[1, T, C]`, normed.
        k_rope: `[1, T, R]`, rotated.
        scaling: softmax scale.
        ring: the processes.
        layout: of the whole sequence.

    Returns:
        the output `[1, T, N, V]`.

    Raises:
        ValueError: there are several sequences, or an adapter is on the up-projection.
    """
    if latent.shape[0] != 1:
        raise ValueError(
            f"per_device_train_batch_size is {latent.shape[0]}; with ring attention it must be 1"
        )
    if not isinstance(module.kv_b_proj, nn.Linear):
        raise ValueError(
            f"kv_b_proj is a {type(module.kv_b_proj).__name__}; ring attention uses its weight itself: leave it "
            "out of the adapters (lora_target_modules)"
        )
    starts = [0] if layout.document_starts is None else layout.document_starts[0]
    query = torch.cat((q_nope, q_rope), dim=-1)[0]
    shape = RingShape(
        ring=ring,
        tokens_per_sequence=layout.tokens_per_sequence,
        document_starts=starts,
        heads=query.shape[1],
        rope_dim=k_rope.shape[-1],
        value_dim=module.config.v_head_dim,
        softmax_scale=scaling,
    )
    rows = torch.cat((latent, k_rope), dim=-1)[0]
    out = ring_attention(query, rows.to(query.dtype), module.kv_b_proj.weight.to(query.dtype), shape)
    return out[None]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """These implementations are causal by themselves; the mask of [T, T] that others take is never built."""
