"""Which tokens of a sequence each process has, and which of its tokens attend to which of another's.

A sequence is cut into twice as many chunks as there are processes, and process r has chunks r and 2 n - 1 - r
("zigzag"): with a causal mask early chunks see little and late ones much, and so every process has the same
work at every hop of the ring. Documents are runs of tokens that see only themselves.

Letters: T tokens of the whole sequence, n processes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Queries that attend to keys: runs of one process's own tokens, and of the tokens that came by the ring.

    Args:
        queries: first and last + 1 of the queries, counted in the process's own tokens.
        keys: the same of the keys, counted in the other process's tokens.
        lengths: of the documents within, in tokens, where queries and keys are the same tokens and the mask is
            causal; empty where every query sees every key.
    """

    queries: slice
    keys: slice
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """Where documents begin in the sequences of a batch.

    Args:
        tokens_per_sequence: T.
        document_starts: for each sequence, places in tokens at which documents begin that nothing after them sees
            across, from 0; None: all of a sequence is one document.
        device_starts: what `on` made, for layers that are compiled; None: those go through an uncompiled function.
    """

    tokens_per_sequence: int
    document_starts: Sequence[Sequence[int]] | None = None
    device_starts: torch.Tensor | None = field(default=None, compare=False, repr=False)
    # compiled layers look at this one: what they read of the lists, they would be compiled anew for
    packed: bool = field(init=False, compare=False, repr=False)
    _cumulative: dict[torch.device, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "packed", self.document_starts is not None)

    def on(self, device: torch.device) -> SequenceLayout:
        """The same layout for layers that are compiled, which can make no tensor of lists: it is made here.

        Args:
            device: that the layers run on.
        """
        if self.document_starts is None:
            return self
        starts = self.cumulative_lengths(device)
        # every batch has another number of documents, and all of them are to have one graph
        torch._dynamo.mark_dynamic(starts, 0)
        return replace(self, device_starts=starts)

    def cumulative_lengths(self, device: torch.device) -> torch.Tensor:
        """`[documents + 1]` int32: where each document begins in the flattened batch, and the end of the last."""
        if device not in self._cumulative:
            starts = self.document_starts or []
            length = self.tokens_per_sequence
            flat = [number * length + start for number, places in enumerate(starts) for start in places]
            ends = torch.tensor([*flat, len(starts) * length], dtype=torch.int32)
            self._cumulative[device] = ends.to(device, non_blocking=True)
        return self._cumulative[device]

    def attended_pairs(self) -> int:
        """Pairs of a query and a key that it sees: of the whole batch, or of one sequence without documents."""
        if self.document_starts is None:
            return _pairs(self.tokens_per_sequence)
        total = 0
        for places in self.document_starts:
            ends = [*places[1:], self.tokens_per_sequence]
            total += sum(_pairs(end - start) for start, end in zip(places, ends, strict=True))
        return total


def local_tokens(tokens_per_sequence: int, parts: int, part: int) -> torch.Tensor:
    """Places `[T / n]` int64 of the tokens that a process has, in their order.

    Args:
        tokens_per_sequence: T, a multiple of 2 n.
        parts: n.
        part: which process.

    Raises:
        ValueError: T is no multiple of 2 n.
    """
    chunk = chunk_tokens(tokens_per_sequence, parts)
    first, second = part * chunk, (2 * parts - 1 - part) * chunk
    return torch.cat((torch.arange(first, first + chunk), torch.arange(second, second + chunk)))


def chunk_tokens(tokens_per_sequence: int, parts: int) -> int:
    """Tokens of a chunk.

    Raises:
        ValueError: the sequence cannot be cut into chunks of equal length.
    """
    if tokens_per_sequence % (2 * parts):
        raise ValueError(
            f"tokens_per_sequence is {tokens_per_sequence}; with context_parallel_size {parts} it must be a "
            f"multiple of {2 * parts}: every process takes two chunks of the same length"
        )
    return tokens_per_sequence // (2 * parts)


def block_pairs(
    tokens_per_sequence: int, parts: int, part: int, other: int, starts: Sequence[int]
) -> Iterator[Pair]:
    """What one process's queries attend to among another's keys.

    Args:
        tokens_per_sequence: T.
        parts: n.
        part: the process with the queries.
        other: the process with the keys.
        starts: where documents begin in the whole sequence, ascending from 0.
    """
    chunk = chunk_tokens(tokens_per_sequence, parts)
    for half, mine in enumerate((part, 2 * parts - 1 - part)):
        begin = mine * chunk
        document = starts[bisect_right(starts, begin) - 1]
        following = bisect_right(starts, begin)
        end = min(starts[following] if following < len(starts) else begin + chunk, begin + chunk)
        for other_half, theirs in enumerate((other, 2 * parts - 1 - other)):
            key_begin = theirs * chunk
            if mine == theirs:
                inside = [start - begin for start in starts if begin < start < begin + chunk]
                edges = [0, *inside, chunk]
                lengths = tuple(right - left for left, right in zip(edges, edges[1:], strict=False))
                yield Pair(
                    queries=slice(half * chunk, (half + 1) * chunk),
                    keys=slice(other_half * chunk, (other_half + 1) * chunk),
                    lengths=lengths,
                )
            elif theirs < mine and document < begin and document < key_begin + chunk:
                # only the document that reaches into this chunk from before it sees anything earlier
                skipped = max(document - key_begin, 0)
                yield Pair(
                    queries=slice(half * chunk, half * chunk + end - begin),
                    keys=slice(other_half * chunk + skipped, (other_half + 1) * chunk),
                )


def _pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2
