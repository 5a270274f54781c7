"""RMS norm: the kernel against the reference, the reference against the model's module."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from ic_model.ops.launch import overriding
from ic_model.ops.rms_norm import rms_norm
from ic_model.ops.rms_norm.reference import rms_norm as reference
from ic_model.testing import assert_close

EPSILON = 1e-5

# how far a result in this dtype is from the float32 reference on the same numbers
BOUNDS = {torch.float32: "fp32_peer", torch.float16: "fp16_rounded", torch.bfloat16: "bf16_rounded"}

SHAPES = [(7, 96), (1, 2048), (3, 5, 256), (33, 65), (2, 512), (130, 64), (2, 5000), (1, 16384)]

# each walks over its tiles in another way
LAUNCHES = [
    {"block_rows": 1, "programs_per_processor": 0, "num_stages": 1},
    {"block_rows": 4, "programs_per_processor": 0, "num_stages": 1},
    {"block_rows": 1, "programs_per_processor": 1, "num_stages": 3},
    {"block_rows": 2, "programs_per_processor": 2, "num_stages": 1},
]


def numbers(*shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """The same numbers on every device."""
    return (scale * torch.randn(*shape)).to(device, dtype)


def weights(dim: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return (1 + 0.3 * torch.randn(dim)).to(device, dtype)


def gradients(outputs, grads, inputs):
    """Gradients of the inputs; an output whose gradient is None is not used."""
    used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    outputs, grads = zip(*used, strict=True)
    return torch.autograd.grad(outputs, inputs, grads, allow_unused=True)


def float_leaves(*tensors):
    return [None if tensor is None else tensor.detach().float().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(device, dtype, shape):
    x, weight = numbers(*shape, device=device, dtype=dtype, scale=3), weights(shape[-1], device, dtype)
    out = rms_norm(x, weight, epsilon=EPSILON, implementation="triton")
    assert out.dtype == dtype and out.is_contiguous()
    assert_close(out, reference(x.float(), weight.float(), epsilon=EPSILON), BOUNDS[dtype])


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_forward_with_residual(device, dtype, shape):
    x, residual = (numbers(*shape, device=device, dtype=dtype) for _ in range(2))
    weight = weights(shape[-1], device, dtype)
    out, total = rms_norm(x, weight, epsilon=EPSILON, residual=residual, implementation="triton")
    assert_close(total, x + residual, "exact", what="sum")
    # of the rounded sum: that is what the next residual is added to
    assert_close(out, reference(total.float(), weight.float(), epsilon=EPSILON), BOUNDS[dtype])


def test_rounds_where_the_reference_does(device, dtype):
    """Nearly all elements have the reference's very bits; statistics in another order move a few by a bit."""
    x, weight = numbers(64, 512, device=device, dtype=dtype), weights(512, device, dtype)
    out = rms_norm(x, weight, epsilon=EPSILON, implementation="triton")
    expected = reference(x, weight, epsilon=EPSILON)
    assert dtype == torch.float32 or (out == expected).float().mean() > 0.99
    assert_close(out, expected, BOUNDS[dtype])


def test_epsilon_and_rows_of_zeros(device):
    x = torch.zeros(3, 64, device=device)
    x[1] = 1e-3
    out = rms_norm(x, torch.ones(64, device=device), epsilon=1e-6, implementation="triton")
    expected = torch.tensor([0.0, 0.5**0.5, 0.0], device=device)[:, None].expand(3, 64)
    assert_close(out, expected, "fp32_peer")


def test_a_row_of_nan_stays_alone(device, dtype):
    x, weight = numbers(6, 96, device=device, dtype=dtype), weights(96, device, dtype)
    x[2, 7] = torch.nan
    out = rms_norm(x, weight, epsilon=EPSILON, implementation="triton")
    assert out[2].isnan().all() and out[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("cut", ["columns", "rows", "transposed", "repeated"])
def test_strided(device, dtype, cut):
    wide = torch.full((4, 10, 120), torch.nan, device=device, dtype=dtype)
    x = {
        "columns": wide[..., 8:104],
        "rows": wide[:, ::2, :96],
        "transposed": torch.full((4, 96, 10), torch.nan, device=device, dtype=dtype).transpose(1, 2),
        "repeated": wide[:, :1, :96].expand(4, 10, 96),
    }[cut]
    (x[:, :1] if cut == "repeated" else x).copy_(
        numbers(4, 1 if cut == "repeated" else x.shape[1], 96, device=device, dtype=dtype)
    )
    weight, grad = weights(96, device, dtype), numbers(*x.shape, device=device, dtype=dtype)
    x.requires_grad_()
    weight.requires_grad_()
    out = rms_norm(x, weight, epsilon=EPSILON, residual=x, implementation="triton")
    leaves = float_leaves(x, weight)
    expected = reference(leaves[0], leaves[1], epsilon=EPSILON, residual=leaves[0])
    assert_close(out[0], expected[0], BOUNDS[dtype])
    found = gradients(out, (grad, None), (x, weight))
    wanted = gradients(expected, (grad.float(), None), leaves)
    for name, left, right in zip(("x", "weight"), found, wanted, strict=True):
        assert_close(left, right, BOUNDS[dtype], what=name)


@pytest.mark.parametrize("shape", [(7, 96), (3, 5, 256), (1, 2048), (67, 65), (3, 16384)], ids=str)
def test_gradients(device, dtype, shape):
    x, weight = numbers(*shape, device=device, dtype=dtype, scale=2), weights(shape[-1], device, dtype)
    grad = numbers(*shape, device=device, dtype=dtype)
    x.requires_grad_()
    weight.requires_grad_()
    out = rms_norm(x, weight, epsilon=EPSILON, implementation="triton")
    found = torch.autograd.grad(out, (x, weight), grad)
    leaves = float_leaves(x, weight)
    wanted = torch.autograd.grad(reference(*leaves, epsilon=EPSILON), leaves, grad.float())
    for name, left, right in zip(("x", "weight"), found, wanted, strict=True):
        assert left.dtype == dtype
        assert_close(left, right, BOUNDS[dtype], what=name)


@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)], ids=["both", "out", "sum"])
def test_gradients_with_residual(device, dtype, used):
    x, residual = (numbers(9, 96, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    weight = weights(96, device, dtype).requires_grad_()
    grads = [numbers(9, 96, device=device, dtype=dtype) if use else None for use in used]
    outputs = rms_norm(x, weight, epsilon=EPSILON, residual=residual, implementation="triton")
    found = gradients(outputs, grads, (x, weight, residual))
    # the float32 reference starts from the rounded sum, whose gradient x and residual both have
    leaves = float_leaves(outputs[1], weight)
    expected = (reference(*leaves, epsilon=EPSILON), leaves[0] * 1.0)
    wanted = gradients(expected, [None if grad is None else grad.float() for grad in grads], leaves)
    for name, left, right in zip(("x", "weight", "residual"), found, (*wanted, wanted[0]), strict=True):
        assert (left is None) == (right is None) == (name == "weight" and not used[0])
        if right is not None:
            assert_close(left, right, BOUNDS[dtype], what=name)


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_launches(device, launch):
    """However rows are dealt to programs, and wherever the last tile ends."""
    x, residual = (numbers(21, 130, device=device, dtype=torch.float32).requires_grad_() for _ in range(2))
    weight = weights(130, device, torch.float32).requires_grad_()
    grads = [numbers(21, 130, device=device, dtype=torch.float32) for _ in range(2)]
    with ExitStack() as stack:
        for kernel in ("forward", "backward"):
            stack.enter_context(overriding("rms_norm", launch, kernel=kernel))
        stack.enter_context(overriding("rms_norm", {"block_programs": 4}, kernel="weight"))
        outputs = rms_norm(x, weight, epsilon=EPSILON, residual=residual, implementation="triton")
        found = gradients(outputs, grads, (x, weight, residual))
    expected = reference(x, weight, epsilon=EPSILON, residual=residual)
    for left, right in zip(outputs, expected, strict=True):
        assert_close(left, right, "fp32_peer")
    for left, right in zip(found, gradients(expected, grads, (x, weight, residual)), strict=True):
        assert_close(left, right, "fp32_peer")


def test_float32_weight(device, dtype):
    """The product has the wider dtype, as in the modules of transformers."""
    x, weight = numbers(5, 96, device=device, dtype=dtype), weights(96, device, torch.float32)
    x.requires_grad_()
    weight.requires_grad_()
    out = rms_norm(x, weight, epsilon=EPSILON, implementation="triton")
    expected = reference(x, weight, epsilon=EPSILON)
    assert out.dtype == expected.dtype == torch.float32
    assert_close(out, expected, BOUNDS[dtype])
    found, wanted = (torch.autograd.grad(part.square().sum(), (x, weight)) for part in (out, expected))
    for left, right in zip(found, wanted, strict=True):
        assert left.dtype == right.dtype
        assert_close(left, right, BOUNDS[dtype])


def test_only_what_needs_a_gradient_gets_one(device):
    x, weight = numbers(5, 96, device=device, dtype=torch.float32), weights(96, device, torch.float32)
    frozen = rms_norm(x.requires_grad_(), weight, epsilon=EPSILON, implementation="triton")
    wanted = torch.autograd.grad(reference(x, weight, epsilon=EPSILON).sum(), x)
    assert_close(torch.autograd.grad(frozen.sum(), x)[0], wanted[0], "fp32_peer")
    assert rms_norm(x.detach(), weight, epsilon=EPSILON, implementation="triton").grad_fn is None
    with torch.no_grad():
        assert rms_norm(x, weight, epsilon=EPSILON, implementation="triton").grad_fn is None


def test_same_bits_in_every_run(device):
    x, grad = (numbers(61, 256, device=device, dtype=torch.float16) for _ in range(2))
    weight = weights(256, device, torch.float16).requires_grad_()
    x.requires_grad_()
    runs = []
    for _ in range(2):
        out = rms_norm(x, weight, epsilon=EPSILON, implementation="triton")
        runs.append([out, *torch.autograd.grad(out, (x, weight), grad)])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_no_rows(device):
    x, weight = torch.empty(0, 96, device=device, requires_grad=True), weights(96, device, torch.float32)
    weight.requires_grad_()
    out, total = rms_norm(x, weight, epsilon=EPSILON, residual=x.detach(), implementation="triton")
    assert out.shape == total.shape == (0, 96)
    d_x, d_weight = torch.autograd.grad(out.sum(), (x, weight))
    assert d_x.shape == (0, 96) and not d_weight.any()


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers():
    rows, dim, last = 2**20 + 3, 2048, slice(2**20, None)
    x = torch.zeros(rows, dim, device="cuda", dtype=torch.bfloat16)
    x[last] = numbers(3, dim, device="cuda", dtype=torch.bfloat16)
    weight = weights(dim, "cuda", torch.bfloat16).requires_grad_()
    x.requires_grad_()
    grad = torch.zeros_like(x)
    grad[last] = 1.0
    out = rms_norm(x, weight, epsilon=EPSILON, implementation="triton")
    found = torch.autograd.grad(out, (x, weight), grad)
    leaves = float_leaves(x[last], weight)
    expected = reference(*leaves, epsilon=EPSILON)
    wanted = torch.autograd.grad(expected.sum(), leaves)
    assert_close(out[last], expected, "bf16_rounded")
    assert_close(found[0][last], wanted[0], "bf16_rounded")
    assert_close(found[1], wanted[1], "bf16_rounded")
    assert not out[: 2**20].any() and not found[0][: 2**20].any()


def test_reference_is_the_models_norm():
    from ic_model.attention import ICRMSNorm

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        norm = ICRMSNorm(96, EPSILON).to(dtype)
        norm.weight.data.copy_(weights(96, "cpu", dtype))
        x = numbers(5, 96, device="cpu", dtype=dtype)
        assert_close(reference(x, norm.weight, epsilon=EPSILON), norm(x), "exact")


def test_reference_with_residual():
    x, residual = (numbers(5, 96, device="cpu", dtype=torch.float16) for _ in range(2))
    weight = weights(96, "cpu", torch.float16)
    out, total = rms_norm(x, weight, epsilon=EPSILON, residual=residual, implementation="reference")
    assert torch.equal(total, x + residual)
    assert torch.equal(out, rms_norm(x + residual, weight, epsilon=EPSILON, implementation="reference"))


@pytest.mark.interpreter
def test_kernel_refuses_wider_rows():
    x, weight = torch.ones(2, 16385), torch.ones(16385)
    with pytest.raises(ValueError, match="rows have 16385 numbers, the kernel takes up to 16384"):
        rms_norm(x, weight, epsilon=EPSILON, implementation="triton")
    assert_close(rms_norm(x, weight, epsilon=0.0), x, "fp32_peer")


X = torch.ones(3, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X.double()}, "x is torch.float64; accepted: float32, float16, bfloat16"),
        ({"x": torch.ones(3, 0)}, r"x has shape \[3, 0\]"),
        ({"weight": torch.ones(63)}, r"weight has shape \[63\]; accepted: \[64\]"),
        ({"weight": torch.ones(64).half()}, "weight is torch.float16; accepted: torch.float32 as x"),
        ({"residual": X.half()}, r"residual is torch.float16 of shape \[3, 64\]; accepted: torch.float32"),
        ({"residual": X[:2]}, r"residual is torch.float32 of shape \[2, 64\]"),
        ({"residual": X.to("meta")}, "residual is on meta and x on cpu; accepted: one device"),
        ({"epsilon": -1e-6}, "epsilon is -1e-06; accepted: numbers from 0 on"),
        ({"implementation": "cuda"}, "implementation is 'cuda'; rms_norm accepts 'triton', 'reference'"),
    ],
)
def test_callers_mistakes(change, message):
    arguments = {"x": X, "weight": torch.ones(64), "epsilon": EPSILON} | change
    with pytest.raises(ValueError, match=message):
        rms_norm(arguments.pop("x"), arguments.pop("weight"), **arguments)
