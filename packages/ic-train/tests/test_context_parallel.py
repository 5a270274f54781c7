"""Which tokens a process has, attention by parts, and ring attention's sums, without a second process."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from ic_model import ICForCausalLM
from ic_model.ops.mla_prefill import mla_prefill
from ic_model.testing import assert_close
from training_runs import toy_config

from ic_train.context_parallel import Ring, SequenceLayout, local_tokens, register_attention
from ic_train.context_parallel.attention import latent_ring_attention, mla_prefill_attention
from ic_train.context_parallel.blocks import block_backward, block_forward
from ic_train.context_parallel.layout import block_pairs

DOCUMENTS = ([0], [0, 5, 30, 33], [0, 63], [0, 1, 2, 16, 32, 48])


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("starts", DOCUMENTS)
def test_the_pairs_of_all_hops_are_exactly_what_the_mask_allows(parts: int, starts: list[int]) -> None:
    tokens = 64
    seen = torch.zeros(tokens, tokens, dtype=torch.int)
    work = [0] * parts
    for part, other in itertools.product(range(parts), repeat=2):
        own, theirs = local_tokens(tokens, parts, part), local_tokens(tokens, parts, other)
        for pair in block_pairs(tokens, parts, part, other, starts):
            block = torch.ones(len(own[pair.queries]), len(theirs[pair.keys]), dtype=torch.int)
            if pair.lengths:
                documents = torch.arange(len(pair.lengths)).repeat_interleave(torch.tensor(pair.lengths))
                block = (documents[:, None] == documents) * block.tril()
            seen[own[pair.queries][:, None], theirs[pair.keys]] += block
            work[part] += int(block.sum())
    documents = torch.searchsorted(torch.tensor(starts), torch.arange(tokens), right=True)
    assert torch.equal(seen, (documents[:, None] == documents).int().tril())
    if starts == [0]:
        # zigzag: no process waits for another
        assert max(work) - min(work) <= tokens


def test_a_sequence_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens_per_sequence is 65; with context_parallel_size 2 .* of 4"):
        local_tokens(65, 2, 0)
    assert sorted(torch.cat([local_tokens(64, 4, part) for part in range(4)]).tolist()) == list(range(64))


@pytest.mark.parametrize("lengths", [(), (37,), (5, 1, 31)])
def test_a_blocks_gradients_are_those_of_autograd(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(37, 2, dim, requires_grad=True) for dim in (32, 32, 16))
    starts = torch.tensor([0, *itertools.accumulate(lengths or (37,))], dtype=torch.int32)
    options = {"cu_seqlens_q": starts, "max_seqlen_q": 37, "max_seqlen_k": 37, "softmax_scale": 0.3}
    out, lse = mla_prefill(q, k, v, causal=bool(lengths), return_lse=True, **options)
    d_out = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), d_out)
    with torch.no_grad():
        part_out, part_lse = block_forward(q, k, v, softmax_scale=0.3, lengths=lengths)
        assert torch.equal(part_out, out) and torch.equal(part_lse, lse)
        found = block_backward(d_out, q, k, v, out, lse, softmax_scale=0.3, lengths=lengths)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, "fp32_peer")


INTERPRETED = """
import torch
from ic_train.context_parallel.blocks import _formula_backward, _kernel_backward, block_forward
torch.manual_seed(0)
for queries, lengths in ((20, ()), (37, (5, 1, 31))):
    q, k, v = torch.randn(queries, 2, 192), torch.randn(37, 2, 192), torch.randn(37, 2, 128)
    out, lse = block_forward(q, k, v, softmax_scale=0.1, lengths=lengths)
    # as if other blocks had more keys
    inputs = (torch.randn_like(out), q, k, v, out, lse + 0.3, 0.1, lengths)
    for one, other in zip(_kernel_backward(*inputs), _formula_backward(*inputs), strict=True):
        assert (one - other).norm() < 1e-5 * other.norm(), (queries, lengths)
print("equal")
"""


def test_the_kernels_gradients_of_a_block_are_the_formulas() -> None:
    # Triton decides when it is imported whether it interprets
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert finished.stdout == "equal\n", finished.stderr[-2000:]


def test_rows_that_travel_are_a_fraction_of_what_they_expand_to() -> None:
    from ic_model.presets import preset

    config = preset("ic-1b")
    expanded = config.num_attention_heads * (
        config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    )
    assert (config.latent_dim, expanded) == (320, 10_240)


@pytest.mark.parametrize("starts", [None, [[0, 5, 30, 33], [0, 40]]])
@pytest.mark.parametrize("name", ["mla_prefill", "ring"])
def test_packed_sequences_are_the_documents_alone(starts: list[list[int]] | None, name: str) -> None:
    if name == "ring":
        starts = starts and starts[:1]
    register_attention(Ring())
    torch.manual_seed(0)
    model = ICForCausalLM(toy_config())
    ids = torch.randint(256, (1 if name == "ring" else 2, 64))
    places = starts or [[0]] * len(ids)
    positions = torch.stack(
        [torch.cat([torch.arange(end - start) for start, end in pairs(row, 64)]) for row in places]
    )
    model.set_attn_implementation(name)
    layout = SequenceLayout(64, starts)
    packed = model(input_ids=ids, position_ids=positions, use_cache=False, layout=layout).logits
    wanted = torch.randn_like(packed)
    packed.backward(wanted)
    gradients = {key: value.grad.clone() for key, value in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation("eager")
    for row, document_starts in enumerate(places):
        for start, end in pairs(document_starts, 64):
            alone = model(input_ids=ids[row : row + 1, start:end], use_cache=False).logits
            assert_close(packed[row : row + 1, start:end], alone, "fp32_peer")
            alone.backward(wanted[row : row + 1, start:end])
    for key, value in model.named_parameters():
        assert_close(gradients[key], value.grad, "fp32_peer")


def pairs(starts: list[int], end: int) -> list[tuple[int, int]]:
    return list(zip(starts, [*starts[1:], end], strict=True))


def test_pairs_of_documents_are_counted() -> None:
    assert SequenceLayout(8, None).attended_pairs() == 36
    assert SequenceLayout(8, [[0, 3], [0]]).attended_pairs() == 6 + 15 + 36


def test_what_the_attention_cannot_do_is_refused() -> None:
    q, k, v = (torch.randn(1, 2, 4, dim) for dim in (32, 32, 16))
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 1, 4, 4\]; .* must be None"):
        mla_prefill_attention(torch.nn.Identity(), q, k, v, torch.ones(1, 1, 4, 4), scaling=1.0)
    rows = torch.randn(2, 4, 32)
    layout = SequenceLayout(4)
    with pytest.raises(ValueError, match="per_device_train_batch_size is 2; with ring attention"):
        latent_ring_attention(None, q, q, rows, rows, scaling=1.0, ring=Ring(), layout=layout)
