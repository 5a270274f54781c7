"""What is to be computed, and with which launch parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ic_model.ops.launch import launch_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is attended to, beside the tensors, which are `[batch, tokens, heads, dim]`.

    Args:
        cu_q: `[sequences + 1]` integer where the sequences are packed into a batch of 1; None in a dense batch.
        cu_k: the same of the keys.
        softmax_scale: factor on the scores.
        causal: bottom-right aligned.
        gluon: whether the forward pass is the kernel for Hopper.
        by_name: whether that kernel was asked for, so that no other stands in for its backward pass.
    """

    cu_q: torch.Tensor | None
    cu_k: torch.Tensor | None
    softmax_scale: float
    causal: bool
    gluon: bool = False
    by_name: bool = False

    @property
    def packed(self) -> bool:
        """Whether `cu_q` says where sequences begin."""
        return self.cu_q is not None

    def num_seqs(self, batch: int) -> int:
        """Sequences in all."""
        return batch if self.cu_q is None else self.cu_q.shape[0] - 1

    def blocks(self, batch: int, tokens: int, block_tokens: int) -> int:
        """Blocks that hold all sequences of `tokens` tokens in all, wherever they begin; see `locate`."""
        if self.cu_q is None:
            return batch * triton.cdiv(tokens, block_tokens)
        return tokens // block_tokens + self.num_seqs(batch)


def kernel_parameters(kernel: str, q: torch.Tensor, v: torch.Tensor) -> dict[str, int]:
    """Launch parameters of "forward", "gluon", "gluon_backward", "backward_keys" or "backward_queries".

    Args:
        kernel: which.
        q: for its dimension, dtype and device.
        v: for its dimension.
    """
    return launch_parameters(
        "mla_prefill",
        q.device,
        kernel=kernel,
        qk_dim=q.shape[-1],
        v_dim=v.shape[-1],
        element_bytes=q.itemsize,
    )


def widths(qk_dim: int, v_dim: int) -> dict[str, int]:
    """The constants of the kernels that say how wide tiles are.

    Args:
        qk_dim: of a query; taken as its largest power of two, and the rest rounded up to one.
        v_dim: of a value.
    """
    first = 1 << (qk_dim.bit_length() - 1)
    rest = qk_dim - first
    return {
        "QK_DIM": qk_dim,
        "BLOCK_QK_0": first,
        "BLOCK_QK_1": triton.next_power_of_2(rest) if rest else 0,
        "V_DIM": v_dim,
        "BLOCK_V": triton.next_power_of_2(v_dim),
    }


def precision(element: torch.dtype | str) -> str:
    """How `tl.dot` multiplies: float32 as it is, since whoever passes it wants it exact.

    Args:
        element: of the inputs, as PyTorch's or Triton's type.
    """
    return "ieee" if element in (torch.float32, "fp32") else "tf32"
