"""What all tests of ic-model run under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# threads cost more than they give on tensors this small: with them the tests take ten times as long
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Let PyTorch fill new memory with NaN: what is read before it was written shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
