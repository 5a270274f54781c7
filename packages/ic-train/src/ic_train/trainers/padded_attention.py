"""Scaled dot-product attention for values narrower than keys, by the fast kernels that want equal widths.

PyTorch's flash attention takes keys and values of one width only. In latent attention keys are wider by their
rotary part, and without padding the slower memory-efficient kernel is chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PADDED_SDPA = "sdpa_padded"


def padded_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' "sdpa" with values `[B, N, S, V]` padded to the keys' width, and the output cut to theirs."""
    width = value.shape[-1]
    padded = F.pad(value, (0, key.shape[-1] - width))
    output, _ = sdpa_attention_forward(module, query, key, padded, attention_mask, **kwargs)
    return output[..., :width], None


def register_padded_sdpa() -> None:
    """Make `attn_implementation="sdpa_padded"` known to transformers."""
    ALL_ATTENTION_FUNCTIONS.register(PADDED_SDPA, padded_sdpa)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PADDED_SDPA, sdpa_mask)
