"""The kernels of decoding for Hopper on the CPU; what that checks, and what not, says hopper_emulation.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gluon_emulation import GL
from hopper_emulation import REPLACED, EmulatedHopper, Ring, advance, barriers, copy_tile, patch_language
from test_mla_decode import FP8, check, problem

from ic_model.ops.mla_decode import hopper, hopper_rows, launch

pytestmark = pytest.mark.interpreter


def ring(dtype, slots, step, parts, columns):
    poison = np.nan if dtype.kind == "f" else 0x7F
    return tuple(
        Ring(np.full((slots * places, step, width), poison, dtype))
        for places, width in ((parts, columns), (1, 64))
    )


@pytest.fixture
def decode(monkeypatch):
    """Check a problem with the kernels' stand-ins."""
    patch_language(monkeypatch)
    monkeypatch.setattr(GL, "float8e4nv", np.dtype("uint8"), raising=False)
    monkeypatch.setattr(GL, "static_assert", lambda held, said: None, raising=False)
    monkeypatch.setattr(GL, "NVMMASharedLayout", lambda *args: None, raising=False)
    monkeypatch.setattr(GL, "SwizzledSharedLayout", lambda *args: None, raising=False)
    found = launch.launch_parameters
    replaced = {
        **REPLACED,
        "advance": advance,
        "tile_ring": ring,
        "ring_barriers": lambda slots, readers: (barriers(slots, 1), barriers(slots, readers)),
        "async_load": copy_tile,
        "gdc_wait": lambda: None,
        "gdc_launch_dependents": lambda: None,
    }
    for module, name in ((hopper, "decode_hopper_kernel"), (hopper_rows, "decode_hopper_rows_kernel")):
        monkeypatch.setattr(module, name, EmulatedHopper(getattr(module, name), replaced))
    monkeypatch.setattr(launch, "hopper_refuses", lambda *args, **others: None)

    def run(made, **changed):
        fp8 = made.kv_cache.dtype == FP8
        sizes = {"block_rows": 16, "slots": 2, "wide_slots": 2, "messages": 2, "step": 32 if fp8 else 64}
        # more rows than one crew takes
        sizes["gathers"] = int(changed.get("block_rows", 16) > 64)
        sizes |= {"value_registers": 0, "widen_warps": 4, "max_registers": 0, "num_warps": 4} | changed
        # the CPU counts as another chip
        monkeypatch.setattr(
            launch,
            "launch_parameters",
            lambda *args, kernel, **shape: (
                sizes if kernel == "hopper" else found(*args, kernel=kernel, **shape)
            ),
        )
        check(made, "hopper")

    return run


def latent_problem(lens, **options):
    return problem(lens, device="cpu", dtype=torch.float16, rope_dim=64, page_tokens=64, **options)


@pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
@pytest.mark.parametrize("query_tokens", [1, 5])
def test_lengths(decode, block_rows, query_tokens):
    """Lengths about tiles, an empty sequence, more rows than a block and fewer, splits and whole sequences."""
    made = latent_problem([65, 0, 1, 700, 128, 63], heads=13, query_tokens=query_tokens)
    decode(made, block_rows=block_rows)


@pytest.mark.parametrize("block_rows", [16, 64, 128])
def test_a_query_in_two_tensors(decode, block_rows):
    decode(latent_problem([65, 0, 200], heads=13, query_tokens=2).apart(), block_rows=block_rows)


@pytest.mark.parametrize("messages", [1, 2, 3])
@pytest.mark.parametrize("slots", [1, 3])
def test_rings_of_any_size(decode, slots, messages):
    decode(latent_problem([500, 130]), slots=slots, messages=messages)


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("heads", [12, 48])
def test_two_crews_of_rows(decode, heads, slots):
    """Rows of one crew and of three; queries that see a tile more or less than their neighbours."""
    decode(latent_problem([500, 130, 3, 66], heads=heads, query_tokens=4), block_rows=128, slots=slots)


@pytest.mark.parametrize("query_tokens", [1, 4])
def test_two_crews_of_values(decode, query_tokens):
    decode(latent_problem([200, 70], rank=512, heads=32, query_tokens=query_tokens), block_rows=64)


@pytest.mark.parametrize("step", [32, 64])
@pytest.mark.parametrize("block_rows", [16, 64])
def test_fp8_rows(decode, block_rows, step):
    decode(latent_problem([300, 64, 0, 10], kv_dtype=FP8), block_rows=block_rows, slots=3, step=step)


def test_equal_lengths_are_not_split(decode):
    decode(latent_problem([256] * 4))
