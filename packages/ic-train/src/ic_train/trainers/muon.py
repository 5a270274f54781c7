"""Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# orthogonalised updates of embeddings and of vectors have no meaning (Jordan et al. 2024, "Muon")
_NOT_HIDDEN = ("embed_tokens", "lm_head")


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` behind the interface of one optimizer.

    Muon's step is scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982, eq. 4), so that both take
    the same learning rate and weight decay. Parameters have to be whole: sharded ones are not supported.

    Args:
        model: its two-dimensional parameters go to Muon, except embedding and output projection.
        lr: learning rate of both.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of both, decoupled.
    """

    def __init__(
        self, model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        hidden = [
            parameter
            for name, parameter in named
            if parameter.ndim == 2 and not any(part in name for part in _NOT_HIDDEN)
        ]
        chosen = {id(parameter) for parameter in hidden}
        others = [parameter for _, parameter in named if id(parameter) not in chosen]
        self.muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__([*hidden, *others], {"lr": lr})
        self._share_groups()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step with both.

        Raises:
            ValueError: a closure was given.
        """
        if closure is not None:
            raise ValueError("closure is given; MuonWithAdamW takes its gradients from backward() only")
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters."""
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The states of both, by name."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self._share_groups()

    def _share_groups(self) -> None:
        # the very same dictionaries: a scheduler that sets a learning rate here sets it in both
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
