"""Decode: few queries per sequence against the paged latent cache. Memory-bound up to about 128 query heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.cases.common import OpBench, Prepared, Work, named
from bench.timing import input_sets

ROPE_DIM = 64
PAGE_TOKENS = 64
# DeepSeek's and ic-1b's: (P + R) ** -0.5 with P = 128
SOFTMAX_SCALE = (128 + ROPE_DIM) ** -0.5
# not a power of two, so that a scale that is dropped or applied twice is seen
FP8_SCALE = 0.06

UNEVEN = (1000, 3000, 10_000, 30_000, 77_777, 150_000, 300_000, 500_000)

DTYPES = {"bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeCase:
    """One shape; `lengths` where sequences differ, and then `context_tokens` is the longest."""

    row_dim: int
    heads: int
    batch: int
    context_tokens: int
    query_tokens: int = 1
    kv_dtype: str = "bfloat16"
    lengths: tuple[int, ...] = ()

    @property
    def sequence_tokens(self) -> tuple[int, ...]:
        """Cached tokens of each sequence."""
        return self.lengths or (self.context_tokens,) * self.batch

    @property
    def label(self) -> str:
        """Short text for progress and messages."""
        uneven = " uneven" if self.lengths else ""
        queries = f" q{self.query_tokens}" if self.query_tokens > 1 else ""
        return (
            f"row {self.row_dim} h{self.heads} {self.batch}x{self.context_tokens}{uneven}{queries}"
            f" {self.kv_dtype}"
        )

    def row(self) -> dict[str, Any]:
        """The fields that identify it in a result."""
        return {
            "row_dim": self.row_dim,
            "heads": self.heads,
            "batch": self.batch,
            "context_tokens": self.context_tokens,
            "query_tokens": self.query_tokens,
            "kv_dtype": self.kv_dtype,
            "total_tokens": sum(self.sequence_tokens),
            "lengths": "uneven" if self.lengths else "even",
            "page_tokens": PAGE_TOKENS,
        }

    def work(self) -> Work:
        """Each cached row, query and output once; two products per query head and row that it sees."""
        element = DTYPES[self.kv_dtype].itemsize
        rank = self.row_dim - ROPE_DIM
        # query t of T sees all but the last T - 1 - t rows
        hidden = self.query_tokens * (self.query_tokens - 1) // 2
        seen = sum(self.query_tokens * tokens - hidden for tokens in self.sequence_tokens)
        queries = self.batch * self.query_tokens * self.heads
        pages = sum(-(-tokens // PAGE_TOKENS) for tokens in self.sequence_tokens)
        # bfloat16 query and output, float32 log-sum-exp, int32 page numbers and lengths
        side = queries * (2 * (self.row_dim + rank) + 4) + 4 * (pages + self.batch)
        return Work(
            bytes=sum(self.sequence_tokens) * self.row_dim * element + side,
            flop=2 * self.heads * seen * (self.row_dim + rank),
            traffic="read",
        )


@dataclass(kw_only=True)
class DecodeProblem:
    """A case's inputs: one pool of pages, and per input set a query and a table of random pages of its own."""

    case: DecodeCase
    kv_cache: torch.Tensor
    q: list[torch.Tensor]
    block_tables: list[torch.Tensor]
    seq_lens: torch.Tensor
    kv_scale: float
    softmax_scale: float = SOFTMAX_SCALE
    work: Work = field(init=False)

    def __post_init__(self) -> None:
        """The work of the case."""
        self.work = self.case.work()

    @property
    def sets(self) -> int:
        """Number of input sets."""
        return len(self.q)

    @property
    def kv_lora_rank(self) -> int:
        """C, numbers of a row that are values too."""
        return self.case.row_dim - ROPE_DIM

    def ours(self, implementation: str) -> Prepared:
        """The op of ic-model."""
        from ic_model.ops.mla_decode import mla_decode

        def launch(index: int) -> Any:
            return mla_decode(
                self.q[index],
                self.kv_cache,
                block_table=self.block_tables[index],
                seq_lens=self.seq_lens,
                kv_lora_rank=self.kv_lora_rank,
                softmax_scale=self.softmax_scale,
                kv_scale=self.kv_scale,
                implementation=named(implementation),
            )

        return Prepared(
            launches=[lambda index=index: launch(index) for index in range(self.sets)],
            outputs=lambda returned: {"out": returned[0], "lse": returned[1]},
        )

    def expected(self) -> Mapping[str, torch.Tensor]:
        """The reference on the first set, from a query in float32."""
        from ic_model.ops.mla_decode.reference import mla_decode

        out, lse = mla_decode(
            self.q[0].float(),
            self.kv_cache,
            block_table=self.block_tables[0],
            seq_lens=self.seq_lens,
            kv_lora_rank=self.kv_lora_rank,
            softmax_scale=self.softmax_scale,
            kv_scale=self.kv_scale,
        )
        return {"out": out, "lse": lse}

    def checked_part(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """All of it."""
        del name
        return output


def build(case: DecodeCase, device: torch.device, *, seed: int = 0, small: bool = False) -> DecodeProblem:
    """Make a case's inputs.

    Args:
        case: the shape.
        device: where.
        seed: of numbers and page order.
        small: one input set on a handful of pages, each used many times.
    """
    generator = torch.Generator(device).manual_seed(seed)
    pages = [-(-tokens // PAGE_TOKENS) for tokens in case.sequence_tokens]
    row_bytes = case.row_dim * DTYPES[case.kv_dtype].itemsize
    sets = 1 if small else input_sets(sum(case.sequence_tokens) * row_bytes, device)
    count = min(64, sum(pages)) if small else sets * sum(pages)
    pool = _pool(count, case, device, seed)
    order = torch.randperm(count, device=device, generator=generator, dtype=torch.int32)
    if small:
        order = order.repeat(-(-sum(pages) // count))
    tables = []
    for index in range(sets):
        # rows of unequal length end with page 0, which a kernel may look up but never reads
        table = torch.zeros(case.batch, max(pages), dtype=torch.int32, device=device)
        start = index * sum(pages)
        for sequence, count in enumerate(pages):
            table[sequence, :count] = order[start : start + count]
            start += count
        tables.append(table)
    shape = (case.batch, case.query_tokens, case.heads, case.row_dim)
    return DecodeProblem(
        case=case,
        kv_cache=pool,
        q=[torch.randn(shape, device=device, generator=generator, dtype=torch.bfloat16) for _ in range(sets)],
        block_tables=tables,
        seq_lens=torch.tensor(case.sequence_tokens, dtype=torch.int32, device=device),
        kv_scale=FP8_SCALE if case.kv_dtype == "fp8_e4m3" else 1.0,
    )


# row_dim, dtype, device: a cache that several cases use; making gigabytes of random numbers anew takes its time
_pools: dict[tuple[Any, ...], torch.Tensor] = {}


def _pool(pages: int, case: DecodeCase, device: torch.device, seed: int) -> torch.Tensor:
    """At least so many pages of random rows."""
    # a multiple of 16, so that no implementation is compiled twice for the sake of the number of pages
    pages = -(-pages // 16) * 16
    key = (case.row_dim, case.kv_dtype, device, seed)
    if key not in _pools or _pools[key].shape[0] < pages:
        _pools.pop(key, None)
        generator = torch.Generator(device).manual_seed(seed + 1)
        dtype = DTYPES[case.kv_dtype]
        pool = torch.empty(pages, PAGE_TOKENS, case.row_dim, dtype=dtype, device=device)
        scale = FP8_SCALE if dtype.itemsize == 1 else 1.0
        for start in range(0, pages, 4096):
            part = pool[start : start + 4096]
            numbers = torch.randn(part.shape, device=device, generator=generator, dtype=torch.bfloat16)
            part.copy_(numbers / scale)
        _pools[key] = pool
    return _pools[key]


def _shapes(row_dim: int, heads: int, *, large: bool = False) -> Iterator[DecodeCase]:
    shapes = [(32, 8192), (128, 8192)]
    if not large:
        shapes = [(1, 131_072), (32, 8192), (1, 1_048_576), (128, 8192), (1, 8192), (4, 32_768)]
    for batch, context in shapes:
        yield DecodeCase(row_dim=row_dim, heads=heads, batch=batch, context_tokens=context)
    if not large:
        yield _uneven(row_dim, heads)


def _uneven(row_dim: int, heads: int) -> DecodeCase:
    return DecodeCase(
        row_dim=row_dim, heads=heads, batch=len(UNEVEN), context_tokens=max(UNEVEN), lengths=UNEVEN
    )


def _full() -> Iterator[DecodeCase]:
    # the two targets first: the shape that has fast rivals, and ic-1b's
    main = [
        case for row, heads in ((576, 16), (320, 32), (320, 16), (576, 32)) for case in _shapes(row, heads)
    ]
    yield from main
    many = [case for row in (576, 320) for case in _shapes(row, 128, large=True)]
    yield from many
    for case in main + many:
        million = sum(case.sequence_tokens) >= 2**20
        if million or (case.batch, case.context_tokens) == (1, 131_072):
            yield dataclasses.replace(case, kv_dtype="fp8_e4m3")
    for row, heads in ((576, 16), (320, 32)):
        for batch, context in ((32, 8192), (1, 131_072)):
            yield DecodeCase(row_dim=row, heads=heads, batch=batch, context_tokens=context, query_tokens=4)


def _quick() -> Iterator[DecodeCase]:
    for row, heads in ((576, 16), (320, 32)):
        for batch, context in ((1, 131_072), (32, 8192), (1, 8192)):
            yield DecodeCase(row_dim=row, heads=heads, batch=batch, context_tokens=context)


_TOY = (
    DecodeCase(row_dim=576, heads=4, batch=1, context_tokens=200),
    DecodeCase(row_dim=320, heads=4, batch=3, context_tokens=150, lengths=(1, 64, 150)),
    DecodeCase(row_dim=320, heads=4, batch=2, context_tokens=100, query_tokens=3),
)


def _implementations() -> tuple[str, ...]:
    """The kernel that this machine's chip has for itself, where it has one, and the one for all chips."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return {(9, 0): ("hopper", "triton"), (7, 5): ("turing", "triton")}.get(capability or (0, 0), ("triton",))


BENCH = OpBench(
    op="mla_decode",
    cases=tuple(_full()),
    quick=tuple(_quick()),
    toy=_TOY,
    build=build,
    implementations=_implementations(),
)
