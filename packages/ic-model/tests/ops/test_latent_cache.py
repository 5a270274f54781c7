"""Rows into the latent cache: the kernel against the reference, float8 against PyTorch's conversion."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from ic_model.ops.latent_cache import latent_cache
from ic_model.ops.latent_cache.reference import latent_cache as reference
from ic_model.ops.latent_cache.reference import quantize
from ic_model.ops.launch import overriding
from ic_model.testing import assert_close

EPSILON = 1e-6
FP8 = torch.float8_e4m3fn

# how far a result in this dtype is from the float32 reference on the same numbers
BOUNDS = {
    torch.float32: "fp32_peer",
    torch.float16: "fp16_rounded",
    torch.bfloat16: "bf16_rounded",
    FP8: "fp8_rounded",
}

SLOTS = [13, -1, 0, 40, 7, -9, 63, 25, 12, 1, 62]


@dataclass(kw_only=True)
class Inputs:
    """Arguments of the op; `cache` is a view into `memory`, of which nothing else may change."""

    latent: torch.Tensor
    k_rope: torch.Tensor
    weight: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    memory: torch.Tensor
    cache: torch.Tensor
    slots: torch.Tensor
    kv_scale: float = 1.0

    def run(self, function=latent_cache, **more):
        arguments = {
            "norm_weight": self.weight,
            "epsilon": EPSILON,
            "cos": self.cos,
            "sin": self.sin,
            "kv_cache": self.cache,
            "slot_mapping": self.slots,
            "kv_scale": self.kv_scale,
        }
        return function(self.latent, self.k_rope, **(arguments | more))

    def expected_rows(self) -> torch.Tensor:
        """`[T, C + R]` float32, unrounded."""
        wide = replace(
            self,
            latent=self.latent.float(),
            k_rope=self.k_rope.float(),
            weight=None if self.weight is None else self.weight.float(),
            cache=torch.zeros(1, 1, self.cache.shape[2], device=self.cache.device),
            slots=torch.full_like(self.slots, -1),
            kv_scale=1.0,
        )
        return torch.cat(wide.run(reference, return_rows=True), dim=-1)

    def rows(self) -> torch.Tensor:
        """`[written, C + R]` float32, what the cache holds for the tokens that are not padding."""
        slots, page_tokens = self.slots[self.slots >= 0], self.cache.shape[1]
        # bytes, since PyTorch does not index float8 everywhere
        stored = self.cache.view(torch.uint8) if self.cache.dtype == FP8 else self.cache
        rows = stored[slots // page_tokens, slots % page_tokens].view(self.cache.dtype)
        return rows.float() * self.kv_scale

    def untouched(self) -> bool:
        """Whether everything that belongs to no token still is as `inputs` left it."""
        page_tokens = self.cache.shape[1]
        copy = self.memory.clone()
        view = copy.as_strided(self.cache.shape, self.cache.stride(), self.cache.storage_offset())
        slots = self.slots[self.slots >= 0]
        blank = torch.full(view.shape[2:], torch.nan, device=view.device).to(self.memory.dtype)
        for slot in slots.tolist():
            view[slot // page_tokens, slot % page_tokens] = blank
        return bool(copy.float().isnan().all())


def inputs(
    device: str,
    dtype: torch.dtype,
    *,
    kv_dtype: torch.dtype | None = None,
    rank: int = 48,
    rotary: int = 16,
    page_tokens: int = 16,
    slots: list[int] = SLOTS,
    norm: bool = True,
    kv_scale: float = 1.0,
) -> Inputs:
    """Views of one projection; pages, rows and ends of rows of the cache are apart; all else is NaN."""
    tokens, row_dim = len(slots), rank + rotary
    projection = torch.full((tokens, 8 + row_dim + 4), torch.nan)
    projection[:, 8 : 8 + row_dim] = 2 * torch.randn(tokens, row_dim)
    projection = projection.to(device, dtype)
    # the inputs of padding are garbage as well
    projection[[index for index, slot in enumerate(slots) if slot < 0]] = torch.nan
    latent, k_rope = projection[:, 8 : 8 + row_dim].split([rank, rotary], dim=1)
    angles = 6.28 * torch.rand(tokens, rotary // 2)
    pages = -(-64 // page_tokens)
    memory = torch.full((pages, 2, page_tokens + 1, row_dim + 16), torch.nan, device=device)
    memory = memory.to(kv_dtype or dtype)
    return Inputs(
        latent=latent,
        k_rope=k_rope,
        weight=(1 + 0.3 * torch.randn(rank)).to(device, dtype) if norm else None,
        cos=angles.cos().to(device),
        sin=angles.sin().to(device),
        memory=memory,
        cache=memory[:, 1, 1:, 16:],
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
        kv_scale=kv_scale,
    )


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize(("rank", "rotary"), [(256, 64), (512, 64), (48, 16), (33, 10)], ids=str)
def test_rows(device, dtype, rank, rotary, norm):
    given = inputs(device, dtype, rank=rank, rotary=rotary, norm=norm)
    assert given.run(implementation="triton") is None
    written = given.slots >= 0
    assert_close(given.rows(), given.expected_rows()[written], BOUNDS[dtype])
    if not norm:
        assert_close(given.rows()[:, :rank], given.latent[written].float(), "exact")
    assert given.untouched()


@pytest.mark.parametrize("kv_scale", [1.0, 0.037])
@pytest.mark.parametrize(("rank", "rotary"), [(256, 64), (512, 64), (33, 10)], ids=str)
def test_float8_rows(device, dtype, rank, rotary, kv_scale):
    given = inputs(device, dtype, kv_dtype=FP8, rank=rank, rotary=rotary, kv_scale=kv_scale)
    normed, rotated = given.run(implementation="triton", return_rows=True)
    written = given.slots >= 0
    assert_close(given.rows(), given.expected_rows()[written], "fp8_rounded")
    # from the rounded rows on, every bit is determined
    stored = quantize(torch.cat((normed, rotated), dim=-1), kv_scale).float() * kv_scale
    assert_close(given.rows(), stored[written], "exact")
    assert given.untouched()


@pytest.mark.parametrize("kv_dtype", [None, FP8], ids=["same dtype", "float8"])
def test_returned_rows(device, dtype, kv_dtype):
    """Before they are quantised, and of padding too: a prompt's attention needs them wherever they go."""
    given = inputs(device, dtype, kv_dtype=kv_dtype)
    padding = given.slots < 0
    given.latent[padding], given.k_rope[padding] = 1.5, 0.5
    normed, rotated = given.run(implementation="triton", return_rows=True)
    assert normed.dtype == rotated.dtype == dtype and normed.is_contiguous() and rotated.is_contiguous()
    assert_close(torch.cat((normed, rotated), dim=-1), given.expected_rows(), BOUNDS[dtype])
    if kv_dtype is None:
        assert_close(given.rows(), torch.cat((normed, rotated), dim=-1)[~padding].float(), "exact")
    assert given.untouched()


def test_the_same_as_the_ops_one_by_one(device, dtype):
    """Prefill reads what the norm's and the rotation's own ops give, decoding what is in the cache."""
    from ic_model.ops.rms_norm import rms_norm
    from ic_model.ops.rope import rope

    given = inputs(device, dtype, rank=256, rotary=64)
    normed, rotated = given.run(implementation="triton", return_rows=True)
    kept = given.slots >= 0
    one_by_one = rms_norm(given.latent, given.weight, epsilon=EPSILON, implementation="triton")
    assert_close(normed[kept], one_by_one[kept], BOUNDS[dtype])
    one_by_one = rope(given.k_rope[:, None], given.cos, given.sin, implementation="triton")[:, 0]
    assert_close(rotated[kept], one_by_one[kept], BOUNDS[dtype])


@pytest.mark.parametrize("page_tokens", [1, 7, 64])
@pytest.mark.parametrize("launch", [(1, 1), (1, 4), (4, 4), (8, 2)], ids=str)
def test_launches_and_pages(device, launch, page_tokens):
    given = inputs(device, torch.float32, page_tokens=page_tokens)
    with overriding("latent_cache", dict(zip(("block_tokens", "num_warps"), launch, strict=True))):
        given.run(implementation="triton")
    assert_close(given.rows(), given.expected_rows()[given.slots >= 0], "fp32_peer")
    assert given.untouched()


def test_nothing_to_write(device):
    given = inputs(device, torch.float16, slots=[-1, -5, -(2**40)])
    for implementation in ("triton", "reference"):
        given.run(implementation=implementation)
        assert given.memory.isnan().all()
    given = inputs(device, torch.float16, slots=[])
    for implementation in ("triton", "reference"):
        normed, rotated = given.run(implementation=implementation, return_rows=True)
        assert normed.shape == (0, 48) and rotated.shape == (0, 16) and given.memory.isnan().all()


def test_float32_weight(device, dtype):
    given = inputs(device, dtype)
    given.weight = given.weight.float() + 1e-4
    given.run(implementation="triton")
    assert_close(given.rows(), given.expected_rows()[given.slots >= 0], BOUNDS[dtype])


def test_a_token_of_nan_stays_alone(device, dtype):
    given = inputs(device, dtype, kv_dtype=FP8)
    given.latent[2, 3] = torch.nan
    given.run(implementation="triton")
    rows = given.rows()
    # token 2 is the second that is written; its key is not normed
    assert rows[1, :48].isnan().all() and rows[1, 48:].isfinite().all()
    assert rows[[0, *range(2, len(rows))]].isfinite().all()


TOKENS, RANK = 32, 2048


def all_float16(device: str) -> torch.Tensor:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    return bits.view(torch.float16).to(device).reshape(TOKENS, RANK)


def stored_as_float8(values: torch.Tensor, kv_scale: float) -> torch.Tensor:
    """`[TOKENS, RANK]` as the kernel stores latents that are not normed."""
    device = values.device
    cache = torch.full((TOKENS, 1, RANK + 2), torch.nan, device=device).to(FP8)
    angles = torch.zeros(TOKENS, 1, device=device)
    latent_cache(
        values,
        torch.ones(TOKENS, 2, device=device, dtype=values.dtype),
        norm_weight=None,
        epsilon=EPSILON,
        cos=angles.cos(),
        sin=angles.sin(),
        kv_cache=cache,
        slot_mapping=torch.arange(TOKENS, device=device),
        kv_scale=kv_scale,
        implementation="triton",
    )
    return cache[:, 0, :RANK]


# signalling NaN are among the numbers
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("kv_scale", [1.0, 0.037, 2.0**-7, 2.0**8])
@pytest.mark.parametrize("computed", [True, False], ids=["computed", "as on this device"])
def test_all_float16_to_float8(device, computed, kv_scale, monkeypatch):
    """Subnormals, halves, saturation and NaN: what PyTorch's own conversion makes of every float16."""
    from ic_model.ops.latent_cache import kernel

    if computed:
        monkeypatch.setattr(kernel, "converts_fp8", lambda device: False)
    values = all_float16(device)
    found = stored_as_float8(values, kv_scale)
    scaled = (values.float().cpu() * (1.0 / kv_scale)).clamp(-448.0, 448.0)
    expected = scaled.to(FP8)
    nan = values.isnan().cpu()
    assert found.cpu().float().isnan().equal(nan)
    assert found.cpu().view(torch.uint8)[~nan].equal(expected.view(torch.uint8)[~nan])


@pytest.mark.parametrize("computed", [True, False], ids=["computed", "as on this device"])
def test_float32_to_float8(device, computed, monkeypatch):
    """A float32 next to a border between two float8 goes to its own side."""
    from ic_model.ops.latent_cache import kernel

    if computed:
        monkeypatch.setattr(kernel, "converts_fp8", lambda device: False)
    finite = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    borders = (finite[1:] + finite[:-1]) / 2
    below, above = (torch.nextafter(borders, torch.tensor(end)) for end in (-torch.inf, torch.inf))
    tiny = torch.tensor([1e-45, 1e-38, 2.0**-10, 2.0**-10 + 2.0**-33, 449.0, 464.0, 480.0, 3e38, torch.inf])
    values = torch.cat((finite, borders, below, above, tiny))
    values = torch.cat((values, -values))
    values = (
        torch.nn.functional.pad(values, (0, TOKENS * RANK - len(values))).reshape(TOKENS, RANK).to(device)
    )
    found = stored_as_float8(values, 1.0)
    expected = values.cpu().clamp(-448.0, 448.0).to(FP8)
    assert found.cpu().view(torch.uint8).equal(expected.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [None, FP8], ids=["bfloat16", "float8"])
def test_graph_with_other_slots(kv_dtype):
    """A captured launch reads numbers and slots when it is replayed; padding comes and goes."""
    given = inputs("cuda", torch.bfloat16, kv_dtype=kv_dtype, rank=256, rotary=64)
    # compiled before the capture
    given.run(implementation="triton", return_rows=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = given.run(implementation="triton", return_rows=True)
    for slots in (SLOTS[::-1], [-1, 3, 2, 1, 60, 61, -7, 63, 8, 9, 10], [-1] * 11):
        new = inputs("cuda", torch.bfloat16, kv_dtype=kv_dtype, rank=256, rotary=64, slots=slots)
        for name in ("latent", "k_rope", "cos", "sin", "slots", "weight"):
            getattr(given, name).copy_(getattr(new, name))
        given.memory.copy_(new.memory)
        graph.replay()
        written = given.slots >= 0
        expected = given.expected_rows()
        assert_close(torch.cat(returned, dim=-1), expected, "bf16_rounded")
        assert_close(given.rows(), expected[written], BOUNDS[kv_dtype or torch.bfloat16])
        assert given.untouched()


@pytest.mark.gpu
def test_pages_beyond_two_to_the_31_bytes():
    pages, page_tokens, row_dim = 59_000, 64, 576
    memory = torch.zeros(pages * page_tokens * row_dim, dtype=torch.uint8, device="cuda").view(FP8)
    assert memory.numel() > 2**31
    given = inputs(
        "cuda", torch.bfloat16, rank=512, rotary=64, slots=[pages * page_tokens - 1, 5, -1, 2**31 // 576 + 1]
    )
    given.cache = memory.view(pages, page_tokens, row_dim)
    given.run(implementation="triton")
    assert_close(given.rows(), given.expected_rows()[[0, 1, 3]], "fp8_rounded")
    given.cache.view(torch.uint8).flatten(0, 1)[given.slots[given.slots >= 0]] = 0
    assert not memory.view(torch.uint8).any()


@pytest.mark.gpu
def test_slots_beyond_two_to_the_31():
    """Rows that overlap, one byte apart: enough of them in little memory."""
    slot, row_dim = 2**31 + 5, 64
    memory = torch.zeros(slot + row_dim + 8, dtype=torch.uint8, device="cuda").view(FP8)
    given = inputs("cuda", torch.bfloat16, slots=[slot])
    given.cache = memory.as_strided((slot + 8, 1, row_dim), (1, row_dim, 1))
    given.run(implementation="triton")
    assert_close(memory[slot : slot + row_dim].float()[None], given.expected_rows(), "fp8_rounded")
    assert not memory.view(torch.uint8)[:slot].any()


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_reference_token_by_token(norm):
    """Against the model's own modules, one token after the other."""
    from ic_model.attention import ICRMSNorm
    from ic_model.rope import apply_interleaved_rope

    given = inputs("cpu", torch.float32, norm=norm)
    given.run(implementation="reference")
    module = ICRMSNorm(48, EPSILON)
    for token, slot in enumerate(SLOTS):
        if slot < 0:
            continue
        latent = given.latent[token]
        if given.weight is not None:
            module.weight.data.copy_(given.weight)
            latent = module(latent)
        rotated = apply_interleaved_rope(given.k_rope[token], given.cos[token], given.sin[token])
        assert_close(given.cache[slot // 16, slot % 16], torch.cat((latent, rotated)), "fp32_peer")
    assert given.untouched()


def test_reference_of_float8():
    values = torch.tensor([0.0, 1.0, -1.0625, 1.1875, 447.0, 500.0, -1e9, torch.inf, 2.0**-10, 3 * 2.0**-10])
    expected = torch.tensor([0.0, 1.0, -1.0, 1.25, 448.0, 448.0, -448.0, 448.0, 0.0, 2.0**-8])
    assert torch.equal(quantize(values, 1.0).float(), expected)
    assert torch.equal(quantize(values * 0.25, 0.25).float(), expected)
    assert quantize(torch.tensor([torch.nan]), 1.0).float().isnan().all()
    given = inputs("cpu", torch.float32, kv_dtype=FP8, kv_scale=0.25)
    given.run(implementation="reference")
    assert_close(given.rows(), given.expected_rows()[given.slots >= 0], "fp8_rounded")
    assert given.untouched()


@pytest.mark.interpreter
def test_what_the_kernel_refuses():
    given = inputs("cpu", torch.float32, rank=4098, rotary=2, slots=[3])
    with pytest.raises(ValueError, match=r"rows have 4098 \+ 2 numbers, the kernel takes up to 4096 \+ 512"):
        given.run(implementation="triton")
    given.run()
    assert_close(given.rows(), given.expected_rows(), "fp32_peer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": torch.ones(11, 6, 8)}, r"latent is torch.float32 of shape \[11, 6, 8\]; accepted: \[T, C\]"),
        ({"latent": torch.ones(11, 48).double()}, "latent is torch.float64"),
        ({"k_rope": torch.ones(10, 16)}, r"k_rope has shape \[10, 16\]; accepted: \[11, R\] with an even R"),
        ({"k_rope": torch.ones(11, 15)}, r"k_rope has shape \[11, 15\]"),
        ({"k_rope": torch.ones(11, 16).half()}, "k_rope is torch.float16; accepted: torch.float32 as latent"),
        ({"weight": torch.ones(47)}, r"norm_weight is torch.float32 of shape \[47\]; accepted: \[48\]"),
        ({"weight": torch.ones(48).half()}, "norm_weight is torch.float16"),
        ({"cos": torch.ones(11, 16)}, r"cos is torch.float32 of shape \[11, 16\]; accepted: \[11, 8\] float32"),
        ({"sin": torch.ones(11, 8).half()}, "sin is torch.float16 of shape"),
        ({"cache": torch.ones(4, 16, 63)}, r"kv_cache has shape \[4, 16, 63\]; accepted: \[pages, "),
        ({"cache": torch.ones(0, 16, 64)}, r"kv_cache has shape \[0, 16, 64\]"),
        ({"cache": torch.ones(4, 64, 16).mT}, "kv_cache has stride 16 in its last dimension; accepted: 1"),
        ({"cache": torch.ones(4, 16, 64).half()}, "kv_cache is torch.float16; accepted: torch.float32 as latent"),
        ({"slots": torch.ones(11, dtype=torch.int32)}, r"slot_mapping is torch.int32 of shape \[11\]"),
        ({"slots": torch.ones(10, dtype=torch.int64)}, r"slot_mapping is torch.int64 of shape \[10\]"),
        ({"slots": torch.ones(11, dtype=torch.int64, device="meta")}, "the tensors are on cpu, meta"),
        ({"kv_scale": 0.0}, "kv_scale is 0.0; accepted: positive numbers"),
        ({"kv_scale": 0.5}, "kv_scale is 0.5 and kv_cache torch.float32; accepted: 1 but for float8_e4m3fn"),
        ({"weight": torch.ones(48, requires_grad=True)}, "an argument needs a gradient"),
    ],
)  # fmt: skip
def test_callers_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        replace(inputs("cpu", torch.float32), **change).run()


def test_more_mistakes():
    given = inputs("cpu", torch.float32)
    with pytest.raises(
        ValueError, match="implementation is 'cuda'; latent_cache accepts 'triton', 'reference'"
    ):
        given.run(implementation="cuda")
    for epsilon in (-1.0, float("inf")):
        with pytest.raises(ValueError, match=f"epsilon is {epsilon}; accepted: numbers from 0 on"):
            given.run(epsilon=epsilon)
    given.weight.requires_grad_()
    with torch.no_grad():
        given.run()
