"""Two optimizers behave as one: who gets which parameter, one learning rate, a state that can be restored."""

import io

import pytest
import torch
from ic_model import ICConfig, ICForCausalLM

from ic_train.trainers import MuonWithAdamW

CONFIG = ICConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=None,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
)


def model_and_optimizer() -> tuple[ICForCausalLM, MuonWithAdamW]:
    torch.manual_seed(0)
    model = ICForCausalLM(CONFIG)
    return model, MuonWithAdamW(model, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)


def train(model: ICForCausalLM, optimizer: MuonWithAdamW, steps: int) -> list[float]:
    ids = torch.arange(24).view(2, 12)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_everything_else() -> None:
    model, optimizer = model_and_optimizer()
    muon = {id(parameter) for group in optimizer.muon.param_groups for parameter in group["params"]}
    adamw = {id(parameter) for group in optimizer.adamw.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        hidden = ".layers." in name and "norm" not in name
        assert (id(parameter) in muon, id(parameter) in adamw) == (hidden, not hidden), name


def test_it_learns() -> None:
    losses = train(*model_and_optimizer(), steps=30)
    assert losses[-1] < 0.5 * losses[0]


def test_a_scheduler_sets_the_learning_rate_of_both_also_after_a_restore() -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25)
    for inner in (optimizer.muon, optimizer.adamw):
        assert [group["lr"] for group in inner.param_groups] == [0.0025]


def test_a_restored_state_continues_exactly() -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    # through a file, as a checkpoint goes: the optimizer's own tensors would go on changing
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    expected = train(model, optimizer, 3)
    other, fresh = model_and_optimizer()
    other.load_state_dict(weights)
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    assert train(other, fresh, 3) == expected


def test_a_closure_is_refused() -> None:
    _, optimizer = model_and_optimizer()
    with pytest.raises(ValueError, match="closure is given"):
        optimizer.step(lambda: 0.0)
