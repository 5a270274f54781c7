"""Decode in plain PyTorch: what a model without a kernel does."""

from __future__ import annotations

from functools import partial

import torch

from bench.cases.common import Prepared, Refused
from bench.cases.mla_decode import DecodeProblem

MAX_GATHERED_BYTES = 4 * 2**30
MAX_SCORES_BYTES = 4 * 2**30


def eager(problem: DecodeProblem) -> Prepared:
    """Gather the rows of all sequences, two batched products, and a softmax in float32 between them."""
    case = problem.case
    tokens = case.batch * case.context_tokens
    if case.lengths:
        raise Refused("the batched products need sequences of one length")
    if problem.kv_scale != 1.0:
        raise Refused("PyTorch multiplies no float8 rows with bfloat16 queries")
    if tokens * case.row_dim * 2 > MAX_GATHERED_BYTES:
        raise Refused(f"more than {MAX_GATHERED_BYTES // 2**30} GiB of gathered rows")
    if tokens * case.query_tokens * case.heads * 4 > MAX_SCORES_BYTES:
        raise Refused(f"more than {MAX_SCORES_BYTES // 2**30} GiB of scores")
    positions = torch.arange(case.context_tokens, device=problem.kv_cache.device)
    last_seen = positions[case.context_tokens - case.query_tokens :].repeat_interleave(case.heads)
    hidden = positions > last_seen[:, None]

    def launch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = problem.kv_cache[problem.block_tables[index]].flatten(1, 2)[:, : case.context_tokens]
        scores = (problem.q[index].flatten(1, 2) @ rows.transpose(1, 2)).float() * problem.softmax_scale
        if case.query_tokens > 1:
            scores = scores.masked_fill(hidden, -torch.inf)
        out = scores.softmax(-1).to(rows.dtype) @ rows[..., : problem.kv_lora_rank]
        return out, scores

    def outputs(returned: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        # the log-sum-exp is not part of what is timed: nothing needs it where all rows are seen at once
        shape = (case.batch, case.query_tokens, case.heads)
        return {
            "out": returned[0].reshape(*shape, problem.kv_lora_rank),
            "lse": returned[1].logsumexp(-1).reshape(shape),
        }

    return Prepared(launches=[partial(launch, index) for index in range(problem.sets)], outputs=outputs)
