"""Loss, gradients, gradient checkpointing, masks and position jumps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import YARN, random_ids, tiny_config, tiny_model
from torch.nn import functional as F

from ic_model import LatentCache
from ic_model.rope import apply_interleaved_rope, inverse_frequencies, rope_tables
from ic_model.testing import assert_close


def test_loss_is_the_shifted_cross_entropy() -> None:
    model = tiny_model()
    ids = random_ids(2, 19)
    labels = ids.clone()
    labels[0, :7] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert_close(output.loss, expected, "fp32_peer", what="loss")
    summed = model(ids, labels=labels, num_items_in_batch=10).loss
    count = (labels[:, 1:] != -100).sum()
    assert_close(summed, expected * count / 10, "fp32_peer", what="loss over a given number of tokens")


def test_logits_to_keep() -> None:
    model = tiny_model()
    ids = random_ids(2, 19)
    with torch.no_grad():
        logits = model(ids).logits
        assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:], "fp32_peer", what="last logits")
        kept = torch.tensor([2, 5])
        assert_close(
            model(ids, logits_to_keep=kept).logits, logits[:, kept], "fp32_peer", what="chosen logits"
        )


def test_training_makes_no_cache() -> None:
    model = tiny_model().train()
    assert model(random_ids(1, 5)).past_key_values is None
    assert type(model.eval()(random_ids(1, 5)).past_key_values) is LatentCache


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant: bool) -> None:
    ids = random_ids(2, 33)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(q_lora_rank=12, rope_parameters=YARN).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected, "exact", what=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "fields", [{}, {"q_lora_rank": 12, "kv_latent_norm": False, "rope_parameters": YARN}]
)
def test_gradients_equal_finite_differences(fields: dict[str, Any], attention: str) -> None:
    """Along one random unit direction per parameter, in float64."""
    model = tiny_model(**fields, attn_implementation=attention).double().train()
    ids = random_ids(1, 13)

    def loss() -> torch.Tensor:
        # not the model's own loss, which is float32
        return F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    step = 0.01
    for name, parameter in model.named_parameters():
        direction = F.normalize(
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64).flatten(), dim=0
        )
        direction = direction.view_as(parameter)
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = loss().item()
            parameter.add_(direction, alpha=-2 * step)
            below = loss().item()
            parameter.add_(direction, alpha=step)
        slope = (above - below) / (2 * step)
        # norms and RoPE compute in float32: a loss has noise of about 1e-7, a slope of 1e-5
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=1e-4), name


def test_gradients_through_a_forward_pass_that_fills_a_cache() -> None:
    model = tiny_model()
    ids = random_ids(1, 13)
    gradients = []
    for use_cache in (False, True):
        model.zero_grad()
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected, "fp32_gradient", what=name)


def test_rope_is_a_rotation_by_complex_numbers() -> None:
    config = tiny_config()
    x = torch.randn(2, 5, 8)
    positions = torch.tensor([[0, 1, 7, 4095, 1_048_575], [3, 3, 2, 1, 0]])
    rotated = apply_interleaved_rope(x, *rope_tables(config, positions))
    # the angle is rounded to float32 by all implementations alike; from there on in double precision
    angles = (positions[..., None].float() * inverse_frequencies(config)).double()
    expected = torch.view_as_complex(x.double().unflatten(-1, (4, 2))) * torch.polar(
        torch.ones_like(angles), angles
    )
    assert_close(rotated, torch.view_as_real(expected).flatten(-2), "fp32_peer", what="rotated pairs")


def test_rope_tables_survive_another_default_device() -> None:
    config = tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 54321.0})
    with torch.device("meta"):
        rope_tables(config, torch.zeros(1, 1, dtype=torch.long, device="cpu"))
    cos, _ = rope_tables(config, torch.zeros(1, 1, dtype=torch.long))
    assert cos.tolist() == [[[1.0] * 4]]


def test_rope_tables_made_in_inference_mode_can_train() -> None:
    config = tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    with torch.inference_mode():
        rope_tables(config, torch.arange(3)[None])
    weight = torch.ones(1, 3, 8, requires_grad=True)
    apply_interleaved_rope(weight, *rope_tables(config, torch.arange(3)[None])).sum().backward()
    assert weight.grad is not None


def jumping_positions() -> torch.Tensor:
    """Two sequences of 20 tokens whose positions jump, at different places."""
    positions = torch.arange(20).repeat(2, 1)
    positions[0, 5:] += 100
    positions[0, 12:] += 3000
    positions[1, 17:] += 1_000_000
    return positions


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_position_jumps_leave_the_mask_causal(attention: str) -> None:
    """transformers reads a jump as the start of another document; for position skipping it must not."""
    model = tiny_model(attn_implementation=attention)
    ids, positions = random_ids(2, 20), jumping_positions()
    causal = torch.zeros(2, 1, 20, 20).masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), -torch.inf)
    with torch.no_grad():
        # only without a cache does transformers look for jumps
        found = model(ids, position_ids=positions, use_cache=False).logits
        expected = model(ids, position_ids=positions, attention_mask=causal, use_cache=False).logits
        assert_close(found, expected, "fp32_peer", what="logits under an explicit causal mask")
        # the last token sees the first one across all jumps
        other = ids.clone()
        other[:, 0] = (other[:, 0] - 2 + 1) % 95 + 2
        moved = (model(other, position_ids=positions, use_cache=False).logits - found)[:, -1].abs().amax(-1)
    assert (moved > 1e-3).all()


def test_only_differences_of_positions_matter() -> None:
    model = tiny_model()
    ids, positions = random_ids(2, 20), jumping_positions()
    positions[1, 17:] -= 999_000
    with torch.no_grad():
        found = model(ids, position_ids=positions + 64).logits
        assert_close(
            found, model(ids, position_ids=positions).logits, "fp32_gradient", what="shifted positions"
        )


def test_padding_changes_no_other_token() -> None:
    model = tiny_model()
    ids = random_ids(1, 12)
    padded = F.pad(ids, (0, 4))
    with torch.no_grad():
        logits = model(padded, attention_mask=(padded != 0).long()).logits[:, :12]
        assert_close(logits, model(ids).logits, "fp32_peer", what="logits before right padding")


def test_packed_documents_with_an_explicit_mask() -> None:
    model = tiny_model()
    parts = [random_ids(1, 8, seed=1), random_ids(1, 5, seed=2)]
    block = torch.block_diag(*[torch.ones(part.shape[1], part.shape[1]).tril() for part in parts]).bool()
    positions = torch.cat([torch.arange(part.shape[1])[None] for part in parts], dim=1)
    with torch.no_grad():
        packed = model(torch.cat(parts, 1), position_ids=positions, attention_mask=block[None, None]).logits
        alone = torch.cat([model(part).logits for part in parts], dim=1)
    assert_close(packed, alone, "fp32_peer", what="logits of packed documents")


def test_one_training_step_lowers_the_loss() -> None:
    model = tiny_model().train()
    ids = random_ids(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
