"""Ring attention over latent rows (Ring Attention, arXiv 2310.01889), forward and backward.

Every process keeps its queries and passes the latent rows of its tokens on to the next one, n - 1 times. What
travels is C + R numbers per token; keys and values of all heads would be N (P + R + V). Each process expands the
rows that arrive with its own copy of the up-projection, attends, and merges with what it has by log-sum-exp.
In the backward pass the rows travel again, and the gradient of each travels with it until it is back at its owner.

Letters: T tokens of one process, N heads, C kv_lora_rank, R qk_rope_head_dim, P qk_nope_head_dim, V v_head_dim,
QK = P + R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ic_model.ops.mla_prefill import merge_attention_
from torch import distributed as dist

from ic_train.context_parallel.blocks import block_backward, block_forward
from ic_train.context_parallel.layout import block_pairs


@dataclass(frozen=True, slots=True)
class Passing:
    """A tensor under way to the next process, and another from the one before.

    Args:
        arriving: what comes.
        works: to wait for.
        sent: what goes; kept, because its memory must not be used for anything else before it has gone.
    """

    arriving: torch.Tensor
    works: list[Any]
    sent: torch.Tensor


@dataclass(frozen=True, slots=True)
class Ring:
    """The processes that share a sequence.

    Args:
        group: their process group, or None for one process alone.
    """

    group: Any = None

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def place(self) -> int:
        """This process's number among them."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def start_passing(self, tensor: torch.Tensor) -> Passing:
        """Begin to send a tensor to the next process and to receive one like it from the process before.

        Returns:
            what will have arrived once `finish` was called on the pair.
        """
        arriving = torch.empty_like(tensor)
        after, before = ((self.place + step) % self.size for step in (1, -1))
        operations = [
            dist.P2POp(dist.isend, tensor, dist.get_global_rank(self.group, after), self.group),
            dist.P2POp(dist.irecv, arriving, dist.get_global_rank(self.group, before), self.group),
        ]
        return Passing(arriving, dist.batch_isend_irecv(operations), tensor)

    @staticmethod
    def finish(passing: Passing) -> torch.Tensor:
        """Wait until the tensor has arrived."""
        for work in passing.works:
            work.wait()
        return passing.arriving


@dataclass(frozen=True, kw_only=True, slots=True)
class RingShape:
    """What ring attention needs beside the tensors.

    Args:
        ring: the processes.
        tokens_per_sequence: of the whole sequence.
        document_starts: where documents begin in it, ascending from 0.
        heads: N.
        rope_dim: R.
        value_dim: V.
        softmax_scale: factor on the scores.
    """

    ring: Ring
    tokens_per_sequence: int
    document_starts: Sequence[int]
    heads: int
    rope_dim: int
    value_dim: int
    softmax_scale: float


def ring_attention(
    q: torch.Tensor, rows: torch.Tensor, up_projection: torch.Tensor, shape: RingShape
) -> torch.Tensor:
    """Causal attention of this process's queries to all keys of the sequence.

    Args:
        q: `[T, N, QK]`, queries of this process's tokens, in the order of `layout.local_tokens`.
        rows: `[T, C + R]`, latent rows of the same tokens, in q's dtype.
        up_projection: `[N (P + V), C]`, `kv_b_proj`'s weight, in q's dtype.
        shape: the rest.

    Returns:
        out `[T, N, V]` in q's dtype. Gradients flow to all three; that of `up_projection` is this process's share
        of a sum over the ring.
    """
    return _RingAttention.apply(q, rows, up_projection, shape)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, rows: torch.Tensor, up_projection: torch.Tensor, shape: RingShape
    ) -> torch.Tensor:
        # merged in float32: rounding after every hop would add up
        out = torch.empty(*q.shape[:2], shape.value_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        ring, arrived = shape.ring, rows.contiguous()
        for hop in range(ring.size):
            passing = ring.start_passing(arrived) if hop + 1 < ring.size else None
            pairs = _pairs(shape, hop)
            key, value = expand(arrived, up_projection, shape) if pairs else (arrived, arrived)
            # every query sees itself, in the first hop: those blocks begin its sum, and cover all queries
            for pair in sorted(pairs, key=lambda pair: not pair.lengths):
                queries, keys = pair.queries, pair.keys
                part_out, part_lse = block_forward(
                    *(q[queries], key[keys], value[keys]),
                    softmax_scale=shape.softmax_scale,
                    lengths=pair.lengths,
                )
                if pair.lengths:
                    out[queries], lse[:, queries] = part_out, part_lse
                else:
                    merge_attention_(out[queries], lse[:, queries], part_out, part_lse)
            arrived = arrived if passing is None else ring.finish(passing)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, rows, up_projection, out, lse)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, rows, up_projection, out, lse = ctx.saved_tensors
        shape: RingShape = ctx.shape
        d_out = grad_outputs[0].contiguous()
        d_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        d_up = torch.zeros(up_projection.shape, dtype=torch.float32, device=q.device)
        ring, arrived = shape.ring, rows.contiguous()
        passing_gradient: Passing | None = None
        d_rows = torch.zeros(rows.shape, dtype=torch.float32, device=q.device)
        for hop in range(ring.size):
            passing = ring.start_passing(arrived) if hop + 1 < ring.size else None
            d_rows = _add_hop(arrived, up_projection, shape, hop, (q, out, lse, d_out), (d_q, d_up))
            if passing_gradient is not None:
                # what the processes before this one have added for the same rows
                d_rows += ring.finish(passing_gradient)
            if ring.size > 1:
                passing_gradient = ring.start_passing(d_rows)
            arrived = arrived if passing is None else ring.finish(passing)
        if passing_gradient is not None:
            d_rows = ring.finish(passing_gradient)
        return d_q.to(q.dtype), d_rows.to(rows.dtype), d_up.to(up_projection.dtype), None


def _add_hop(
    arrived: torch.Tensor,
    up_projection: torch.Tensor,
    shape: RingShape,
    hop: int,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    sums: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Add one hop to the gradients of q and of the up-projection; its gradient of the rows that arrived."""
    (q, out, lse, d_out), (d_q, d_up) = saved, sums
    pairs = _pairs(shape, hop)
    if not pairs:
        return torch.zeros(arrived.shape, dtype=torch.float32, device=q.device)
    key, value = expand(arrived, up_projection, shape)
    d_key = torch.zeros(key.shape, dtype=torch.float32, device=q.device)
    d_value = torch.zeros(value.shape, dtype=torch.float32, device=q.device)
    for pair in pairs:
        queries, keys = pair.queries, pair.keys
        part_q, part_key, part_value = block_backward(
            *(d_out[queries], q[queries], key[keys], value[keys], out[queries], lse[:, queries]),
            softmax_scale=shape.softmax_scale,
            lengths=pair.lengths,
        )
        d_q[queries] += part_q
        d_key[keys] += part_key
        d_value[keys] += part_value
    nope = key.shape[-1] - shape.rope_dim
    latent = arrived[:, : -shape.rope_dim]
    d_expanded = torch.cat((d_key[..., :nope], d_value), dim=-1).flatten(1)
    product_dtype = arrived.dtype
    d_latent = d_expanded.to(product_dtype) @ up_projection
    d_up += d_expanded.to(product_dtype).T @ latent
    return torch.cat((d_latent.float(), d_key[..., nope:].sum(1)), dim=-1)


def expand(
    rows: torch.Tensor, up_projection: torch.Tensor, shape: RingShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys `[T, N, QK]` and values `[T, N, V]` of latent rows."""
    latent, k_rope = rows[:, : -shape.rope_dim], rows[:, -shape.rope_dim :]
    per_head = (latent @ up_projection.T).unflatten(-1, (shape.heads, -1))
    k_nope, value = per_head[..., : -shape.value_dim], per_head[..., -shape.value_dim :]
    return torch.cat((k_nope, k_rope[:, None].expand(-1, shape.heads, -1)), dim=-1), value


def _pairs(shape: RingShape, hop: int) -> list[Any]:
    ring = shape.ring
    other = (ring.place - hop) % ring.size
    return list(block_pairs(shape.tokens_per_sequence, ring.size, ring.place, other, shape.document_starts))
