"""Cases of each op: shapes, inputs, the least work, and the reference's outputs. One file per op."""

from __future__ import annotations

from importlib import import_module

from bench.cases.common import OpBench

OPS = ("mla_decode", "mla_prefill", "latent_cache", "rms_norm", "rope")


def op_bench(op: str) -> OpBench:
    """The benchmark of an op.

    Raises:
        ValueError: there is none for it.
    """
    if op not in OPS:
        raise ValueError(f"op is {op!r}; it must be one of {', '.join(OPS)}")
    return import_module(f"bench.cases.{op}").BENCH
