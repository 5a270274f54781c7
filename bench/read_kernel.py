"""A Triton kernel that only reads, for the measured read bandwidth; imported on a GPU only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl


@triton.jit
def _sum_blocks(source, sums, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    program = tl.program_id(0).to(tl.int64)
    numbers = tl.load(source + program * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums + program, tl.sum(numbers, axis=0))


def read_launch(source: torch.Tensor, *, block: int, num_warps: int) -> Callable[[], None]:
    """A launch that reads all of a tensor once and writes one number per block.

    Args:
        source: float32, contiguous, a multiple of `block` numbers.
        block: numbers per program, a power of two.
        num_warps: warps per program.

    Raises:
        ValueError: the tensor is not a multiple of `block`; some of it would be left unread.
    """
    if source.numel() % block:
        raise ValueError(f"source has {source.numel()} numbers; it must have a multiple of {block}")
    programs = source.numel() // block
    sums = torch.empty(programs, device=source.device)

    def launch() -> None:
        _sum_blocks[(programs,)](source, sums, BLOCK=block, num_warps=num_warps)

    return launch
