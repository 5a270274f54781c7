"""Norms and rotations inside the model: kernels and formulas give the same loss and the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import random_ids, tiny_model

from ic_model import attention
from ic_model.testing import assert_close

NEVER = 2**40


class Calls:
    """Counts what goes through to an op."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = {"rms_norm": 0, "rope": 0}
        for name in self.counts:
            monkeypatch.setattr(attention, name, self._counting(name, getattr(attention, name)))

    def _counting(self, name: str, op: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            return op(*args, **kwargs)

        return counted


def loss_and_gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("shape", [{}, {"q_lora_rank": 24}], ids=["whole queries", "query latents"])
def test_loss_and_gradients(device, monkeypatch, shape):
    model, ids = tiny_model(**shape).to(device).train(), random_ids(2, 9).to(device)
    calls = Calls(monkeypatch)
    monkeypatch.setattr(attention, "KERNEL_ROWS", NEVER)
    expected, wanted = loss_and_gradients(model, ids)
    assert not any(calls.counts.values())
    monkeypatch.setattr(attention, "KERNEL_ROWS", 18)
    loss, gradients = loss_and_gradients(model, ids)
    layers, last_norm = 3, 1
    # before attention, after it, of the latents
    norms = 4 if shape else 3
    assert calls.counts == {"rms_norm": layers * norms + last_norm, "rope": layers * 2}
    assert_close(loss, expected, "fp32_peer")
    for name, gradient in gradients.items():
        assert_close(gradient, wanted[name], "fp32_peer")


def test_autocast_adds_16_bits_to_32(device, monkeypatch):
    """Projections give 16 bits then, and the sum that they are added to has 32."""
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    model, ids = tiny_model().to(device), random_ids(2, 9).to(device)
    found = {}
    for rows in (NEVER, 1):
        monkeypatch.setattr(attention, "KERNEL_ROWS", rows)
        with torch.no_grad(), torch.autocast(device, dtype):
            found[rows] = model.model(ids).last_hidden_state
    assert found[1].dtype == found[NEVER].dtype == torch.float32
    assert_close(found[1], found[NEVER], "fp16_rounded" if device == "cpu" else "bf16_rounded")


def test_few_rows_and_the_compiler_have_formulas(device, monkeypatch):
    calls = Calls(monkeypatch)
    norm = attention.ICRMSNorm(48, 1e-6).to(device)
    norm(torch.ones(attention.KERNEL_ROWS - 1, 48, device=device))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    norm(torch.ones(attention.KERNEL_ROWS, 48, device=device))
    assert not calls.counts["rms_norm"]
    monkeypatch.undo()
    calls = Calls(monkeypatch)
    norm(torch.ones(attention.KERNEL_ROWS, 48, device=device))
    assert calls.counts["rms_norm"] == 1
