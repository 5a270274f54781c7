"""Exact attention as an operator of a compiled graph: what PyTorch asks of operators, and the same numbers."""

from __future__ import annotations

import pytest
import torch

from ic_model.ops.mla_prefill import mla_prefill_dense
from ic_model.ops.mla_prefill.compiled import compiled_attention, takes_compiled
from ic_model.testing import assert_close

DIMS = (48, 32)


def leaves(device, dtype=torch.float32):
    """Query, key and value, which is a slice of wider rows."""
    q, k, wide = (torch.randn(2, 20, 2, dim, device=device).to(dtype) for dim in (48, 48, 80))
    return [part.detach().requires_grad_() for part in (q, k, wide[..., 48:])]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
def test_output_and_gradients(device, packed, compiled):
    tensors = leaves(device)
    starts = torch.tensor([0, 20, 40], dtype=torch.int32, device=device) if packed else None

    def attend(q, k, v):
        return compiled_attention(q, k, v, softmax_scale=0.2, cu_seqlens=starts, implementation="triton")

    run = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    out = run(*tensors)
    d_out = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, tensors, d_out)]
    q, k, v = (part.transpose(1, 2) for part in tensors)
    out = mla_prefill_dense(q, k, v, softmax_scale=0.2, implementation="reference").transpose(1, 2)
    for one, other in zip(found, [out, *torch.autograd.grad(out, tensors, d_out)], strict=True):
        assert one.is_contiguous()
        assert_close(one, other, "fp32_attention")


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_what_pytorch_asks_of_operators(device, packed):
    tensors = [part[:1] if packed else part for part in leaves(device)]
    starts = torch.tensor([0, 7, 20], dtype=torch.int32, device=device) if packed else None
    operator = torch.ops.ic_model.mla_prefill.default
    torch.library.opcheck(operator, (*tensors, starts, 0.2, "triton"))


def test_which_tensors_go_to_our_kernels(device):
    where = torch.device(device)
    assert takes_compiled(where, torch.float32, *DIMS, "triton")
    assert not takes_compiled(where, torch.float32, *DIMS, "reference")
    assert not takes_compiled(where, torch.float32, *DIMS, "gluon")
    assert not takes_compiled(torch.device("meta"), torch.float32, *DIMS, None)
