"""Rotary embedding: the kernel against the reference, the reference against the model's function."""

from __future__ import annotations

import pytest
import torch

from ic_model.ops.launch import overriding
from ic_model.ops.rope import rope
from ic_model.ops.rope.reference import rope as reference
from ic_model.testing import assert_close

# how far a result in this dtype is from the float32 reference on the same numbers
BOUNDS = {torch.float32: "fp32_peer", torch.float16: "fp16_rounded", torch.bfloat16: "bf16_rounded"}

# YaRN's ratio of mscales multiplies both tables
TABLE_SCALE = 1.37

# x, tables without the last dimension
SHAPES = [
    ((7, 3, 64), (7,)),
    ((1, 32, 64), (1,)),
    ((5, 33, 10), (5,)),
    ((9, 1, 64), (9,)),
    ((2, 5, 3, 24), (5,)),
    ((2, 5, 3, 24), (1, 5)),
    ((2, 5, 3, 24), (2, 5)),
    ((3, 1, 4, 2), (1,)),
    ((2, 2, 3, 5, 8), (3,)),
]


def numbers(*shape: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape).to(device, dtype)


def tables(*shape: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    angles = 6.28 * torch.rand(*shape)
    return (TABLE_SCALE * angles.cos()).to(device), (TABLE_SCALE * angles.sin()).to(device)


@pytest.mark.parametrize(("shape", "lead"), SHAPES, ids=str)
def test_forward(device, dtype, shape, lead):
    x, (cos, sin) = numbers(*shape, device=device, dtype=dtype), tables(*lead, shape[-1] // 2, device=device)
    out = rope(x, cos, sin, implementation="triton")
    assert out.dtype == dtype and out.shape == x.shape and out.is_contiguous()
    assert_close(out, reference(x.float(), cos, sin), BOUNDS[dtype])


@pytest.mark.parametrize("launch", [(1, 1, 1), (4, 2, 4), (1, 8, 2), (8, 16, 8)], ids=str)
def test_launches(device, launch):
    x, (cos, sin) = numbers(11, 13, 24, device=device, dtype=torch.float32), tables(11, 12, device=device)
    with overriding("rope", dict(zip(("block_tokens", "block_heads", "num_warps"), launch, strict=True))):
        out = rope(x, cos, sin, implementation="triton")
    assert_close(out, reference(x, cos, sin), "fp32_peer")


def test_view_of_queries(device, dtype):
    """The last R of a query's P + R numbers, and batches whose heads come before their tokens."""
    query = torch.full((2, 7, 5, 16 + 24), torch.nan, device=device, dtype=dtype)
    query[..., 16:] = numbers(2, 7, 5, 24, device=device, dtype=dtype)
    cos, sin = tables(7, 12, device=device)
    x = query[..., 16:]
    expected = reference(x.float(), cos, sin)
    assert_close(rope(x, cos, sin, implementation="triton"), expected, BOUNDS[dtype])
    head_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(rope(head_first, cos, sin, implementation="triton"), expected, BOUNDS[dtype])
    apart = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert_close(rope(apart, cos, sin, implementation="triton"), expected, BOUNDS[dtype])


def test_tables_side_by_side(device):
    x, (both, _) = numbers(7, 3, 16, device=device, dtype=torch.float32), tables(7, 16, device=device)
    cos, sin = both.chunk(2, dim=-1)
    assert_close(rope(x, cos, sin, implementation="triton"), reference(x, cos, sin), "fp32_peer")
    sin = sin.contiguous()
    assert_close(rope(x, cos, sin, implementation="triton"), reference(x, cos, sin), "fp32_peer")


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_in_place_and_into_another(device, dtype, implementation):
    query = numbers(6, 5, 16 + 24, device=device, dtype=dtype)
    original = query.clone()
    cos, sin = tables(6, 12, device=device)
    expected = reference(original[..., 16:].float(), cos, sin)
    returned = rope(query[..., 16:], cos, sin, out=query[..., 16:], implementation=implementation)
    assert returned.data_ptr() == query[..., 16:].data_ptr()
    assert_close(query[..., 16:], expected, BOUNDS[dtype])
    assert torch.equal(query[..., :16], original[..., :16])

    other = torch.full((6, 7, 24 + 8), -5.0, device=device, dtype=dtype)
    rope(original[..., 16:], cos, sin, out=other[:, 1:6, :24], implementation=implementation)
    assert_close(other[:, 1:6, :24], expected, BOUNDS[dtype])
    assert (other[:, [0, 6]] == -5).all() and (other[..., 24:] == -5).all()


@pytest.mark.parametrize(("shape", "lead"), [SHAPES[0], SHAPES[2], SHAPES[4], SHAPES[8]], ids=str)
def test_gradient(device, dtype, shape, lead):
    x, (cos, sin) = numbers(*shape, device=device, dtype=dtype), tables(*lead, shape[-1] // 2, device=device)
    grad = numbers(*shape, device=device, dtype=dtype)
    x.requires_grad_()
    (found,) = torch.autograd.grad(rope(x, cos, sin, implementation="triton"), x, grad)
    leaf = x.detach().float().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(leaf, cos, sin), leaf, grad.float())
    assert found.dtype == dtype
    assert_close(found, wanted, BOUNDS[dtype])


@pytest.mark.parametrize("layout", ["heads first", "wider rows", "one number"])
def test_gradient_of_any_layout(device, layout):
    """What flows back may be strided in any way: from a sum, every number is the same one."""
    x = numbers(2, 5, 3, 16, device=device, dtype=torch.float32).requires_grad_()
    grad = {
        "heads first": numbers(2, 3, 5, 16, device=device, dtype=torch.float32).transpose(1, 2),
        "wider rows": numbers(2, 5, 3, 24, device=device, dtype=torch.float32)[..., 8:],
        "one number": torch.ones(1, 1, 1, 1, device=device).expand(2, 5, 3, 16),
    }[layout]
    cos, sin = tables(5, 8, device=device)
    (found,) = torch.autograd.grad(rope(x, cos, sin, implementation="triton"), x, grad)
    (wanted,) = torch.autograd.grad(reference(x, cos, sin), x, grad)
    assert_close(found, wanted, "fp32_peer")


def test_back_and_forth_is_the_square_of_the_scale(device):
    from ic_model.ops.rope.kernel import rotate

    x, (cos, sin) = numbers(7, 3, 64, device=device, dtype=torch.float32), tables(7, 32, device=device)
    returned = rotate(rotate(x, cos, sin), cos, sin, back=True)
    assert_close(returned, x * TABLE_SCALE**2, "fp32_peer")


def test_no_tokens(device):
    x, table = torch.empty(0, 3, 16, device=device), torch.empty(0, 8, device=device)
    assert rope(x, table, table, implementation="triton").shape == (0, 3, 16)


@pytest.mark.gpu
def test_more_than_two_to_the_31_numbers():
    tokens, step = 3, 2**30 + 64
    memory = torch.zeros(2 * step + 4 * 64, device="cuda", dtype=torch.bfloat16)
    x = memory.as_strided((tokens, 4, 64), (step, 64, 1))
    x.copy_(numbers(tokens, 4, 64, device="cuda", dtype=torch.bfloat16))
    cos, sin = tables(tokens, 32, device="cuda")
    expected = reference(x.float(), cos, sin)
    assert_close(rope(x, cos, sin, implementation="triton"), expected, "bf16_rounded")
    rope(x, cos, sin, out=x, implementation="triton")
    assert_close(x, expected, "bf16_rounded")
    assert not memory[4 * 64 : step].any() and not memory[step + 4 * 64 : 2 * step].any()


def test_reference_is_the_models_rope():
    from ic_model.rope import apply_interleaved_rope

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, (cos, sin) = numbers(2, 5, 3, 16, device="cpu", dtype=dtype), tables(2, 5, 8, device="cpu")
        expected = apply_interleaved_rope(x, cos[:, :, None], sin[:, :, None])
        assert_close(rope(x, cos, sin, implementation="reference"), expected, "exact")


def test_on_the_cpu_the_reference_is_chosen_or_the_kernel_agrees():
    x, (cos, sin) = numbers(5, 3, 16, device="cpu", dtype=torch.float32), tables(5, 8, device="cpu")
    assert_close(rope(x, cos, sin), reference(x, cos, sin), "fp32_peer")


@pytest.mark.interpreter
def test_what_the_kernel_refuses():
    x, table = torch.ones(2, 1, 1026), torch.ones(2, 513)
    with pytest.raises(ValueError, match="heads have 1026 numbers, the kernel takes up to 1024"):
        rope(x, table, table, implementation="triton")
    apart, table = torch.ones(2, 8, 3).transpose(1, 2), torch.ones(2, 4)
    with pytest.raises(ValueError, match="out has stride 3 in its last dimension"):
        rope(apart, table, table, out=apart, implementation="triton")
    deep = torch.ones(2, 4, 2, 3, 16)[..., 8:]
    with pytest.raises(ValueError, match="out has 5 dimensions and is not contiguous"):
        rope(
            deep,
            table[:, None, None].expand(2, 4, 2, 4),
            table.new_ones(2, 4, 2, 4),
            out=deep,
            implementation="triton",
        )


X, TABLE = torch.ones(5, 3, 16), torch.ones(5, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X.double()}, "x is torch.float64; accepted"),
        ({"x": X[0]}, r"x has shape \[3, 16\]; accepted: \[..., tokens, heads, R\]"),
        ({"x": X[..., :15]}, r"x has shape \[5, 3, 15\]"),
        ({"cos": TABLE.half()}, "cos is torch.float16; accepted: float32"),
        ({"sin": TABLE.to("meta")}, "sin is on meta and x on cpu"),
        ({"cos": TABLE[:4]}, r"cos has shape \[4, 8\]; accepted: \[..., 8\], broadcasting to \[5, 8\]"),
        ({"sin": TABLE[:, :4]}, r"sin has shape \[5, 4\]"),
        ({"cos": TABLE[None]}, r"cos has shape \[1, 5, 8\]"),
        ({"cos": TABLE[:1]}, r"cos has shape \[1, 8\] and sin \[5, 8\]; accepted: one shape"),
        ({"out": X[:4]}, r"out is torch.float32 of shape \[4, 3, 16\] on cpu; accepted: torch.float32"),
        ({"out": X.half()}, "out is torch.float16"),
        ({"x": X.clone().requires_grad_(), "out": X}, "out is given and a gradient is needed"),
        ({"implementation": "cuda"}, "implementation is 'cuda'; rope accepts 'triton', 'reference'"),
    ],
)
def test_callers_mistakes(change, message):
    arguments = {"x": X, "cos": TABLE, "sin": TABLE} | change
    with pytest.raises(ValueError, match=message):
        rope(arguments.pop("x"), arguments.pop("cos"), arguments.pop("sin"), **arguments)
