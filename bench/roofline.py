"""What the device can do at most, measured in the same run as the ops: bandwidths and the matrix peak.

Datasheet numbers are reached by nothing; a share of what a plain copy, a plain read and a large matrix product
reach on the same card minutes before says how far an op is from its bound.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from bench.timing import measure

if TYPE_CHECKING:
    from bench.cases.common import Work

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """Measured ceilings of a device.

    Args:
        read_gb_per_s: a kernel that reads 2 GiB and writes next to nothing; GB are 10**9 bytes.
        copy_gb_per_s: a device-to-device copy of 2 GiB, bytes read plus bytes written.
        bf16_tflops: a bfloat16 matrix product of 8192 x 8192 x 8192 on random numbers, 10**12 per second.
        read_kernel: what read fastest.
    """

    read_gb_per_s: float
    copy_gb_per_s: float
    bf16_tflops: float
    read_kernel: str

    def bound_us(self, work: Work) -> float:
        """Shortest possible time of an op: the longer of its bytes at full bandwidth and its FLOP at the peak."""
        # what writes is held to the same: PyTorch copies by the copy engines, which kernels outrun
        bandwidth = (
            self.read_gb_per_s if work.traffic == "read" else max(self.read_gb_per_s, self.copy_gb_per_s)
        )
        return max(work.bytes / bandwidth / 1e3, work.flop / self.bf16_tflops / 1e6)

    def fields(self) -> dict[str, Any]:
        """As a mapping, for the result."""
        return asdict(self)


def measure_roofline(device: torch.device, *, samples: int = 20) -> Roofline:
    """Measure a device's ceilings.

    Args:
        device: on a CPU sizes are small, and the numbers serve only to exercise the code.
        samples: per number.
    """
    on_gpu = device.type == "cuda"
    num_bytes, width = (2 * GIB, 8192) if on_gpu else (2**22, 128)
    source = torch.randn(num_bytes // 4, device=device)
    copied_us = _copy_us(source, device, samples)
    reads = {"torch.sum": measure([source.sum], device=device, samples=samples).median_us}
    if on_gpu:
        reads |= _triton_reads(source, device, samples)
    fastest = min(reads, key=reads.__getitem__)
    left, right = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = measure([lambda: left @ right], device=device, samples=samples)
    return Roofline(
        read_gb_per_s=num_bytes / reads[fastest] / 1e3,
        copy_gb_per_s=2 * num_bytes / copied_us / 1e3,
        bf16_tflops=2 * width**3 / product.median_us / 1e6,
        read_kernel=fastest,
    )


def _copy_us(source: torch.Tensor, device: torch.device, samples: int) -> float:
    target = torch.empty_like(source)
    return measure([lambda: target.copy_(source)], device=device, samples=samples).median_us


def _triton_reads(source: torch.Tensor, device: torch.device, samples: int) -> dict[str, float]:
    """Times of a reduction with several shapes of programs: which one saturates the memory depends on the chip."""
    from bench.read_kernel import read_launch

    return {
        f"triton {block} x {warps} warps": measure(
            [read_launch(source, block=block, num_warps=warps)], device=device, samples=samples
        ).median_us
        for block, warps in ((4096, 4), (8192, 8), (16384, 8), (32768, 8))
    }
