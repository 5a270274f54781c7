"""Barriers of compiled kernels, checked in the compiler's own text."""

from __future__ import annotations

import re
from collections.abc import Iterator


def idle_barriers(ttgir: str) -> Iterator[str]:
    """Barriers in shared memory that are initialised and then used by nothing.

    Their memory is free from then on. What takes it is written by stores, which are not ordered with the
    initialisation: under time-slicing a late one has overwritten a loop's bound for one warp of a program, which
    then waited for ever.

    Args:
        ttgir: a kernel in Triton's GPU dialect.

    Yields:
        what is wrong, a line for each barrier.
    """
    # what each line reads, without what it defines
    lines = [re.sub(r"^\s*(%[\w#:]+ = )?", "", line) for line in ttgir.splitlines()]
    for name in re.findall(r"(%\w+) = ttg\.local_alloc\b[^\n]*memdesc<(?:\d+x)*1xi64", ttgir):
        # itself, where it is handed on whole, and its elements
        names = {name, *re.findall(rf"(%\w+) = ttg\.memdesc_index {name}\[", ttgir)}
        uses = [line for line in lines if names & set(re.findall(r"%\w+", line))]
        if all(line.startswith(("ttng.init_barrier", "ttg.memdesc_index")) for line in uses):
            yield f"barrier {name} is initialised and not used: its memory may be something else's by then"
