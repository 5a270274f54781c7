"""What all tests of ic-model run under."""

from __future__ import annotations

from typing import Any

import pytest
import torch

# threads cost more than they give on tensors this small: with them the tests take ten times as long
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` returns with NaN: memory that is read before it is written shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
