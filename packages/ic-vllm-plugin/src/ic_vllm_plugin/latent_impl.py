"""What the attention of one layer is on every device: its dimensions, what it refuses, keys and values of latents.

Letters: S tokens, N heads, C kv_lora_rank, R qk_rope_head_dim, P qk_nope_head_dim, V v_head_dim.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ic_vllm_plugin import compat


class LatentImplBase(compat.MLAAttentionImpl):
    """Base of our attentions. MLAAttention builds one per layer and passes all that any backend may want.

    Raises:
        ValueError: an argument asks for what none of ours can.
    """

    # of the subclass
    kv_cache_dtypes: ClassVar[tuple[str, ...]]
    supports_pcp: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        *,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        kv_b_proj: torch.nn.Module,
        **other_mla_args: Any,
    ) -> None:
        unsupported = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
            "indexer": other_mla_args.get("indexer"),
        }
        for name, value in unsupported.items():
            if value is not None:
                raise ValueError(f"{name} is {value!r}; InfiniteContext's attention accepts None only")
        if attn_type != compat.AttentionType.DECODER:
            raise ValueError(f"attn_type is {attn_type!r}; accepted: {compat.AttentionType.DECODER!r}")
        if kv_cache_dtype not in self.kv_cache_dtypes:
            raise ValueError(
                f"kv_cache_dtype is {kv_cache_dtype!r}; accepted: {', '.join(self.kv_cache_dtypes)}"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads, kv_cache_dtype
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.kv_b_proj = kv_b_proj

    def _expand(self, latents: torch.Tensor, rope_keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `[S, C]` and rotated keys `[S, R]` to keys `[S, N, P + R]` and values `[S, N, V]`."""
        expanded = self.kv_b_proj(latents.contiguous())[0]
        expanded = expanded.view(-1, self.num_heads, self.qk_nope_head_dim + self.v_head_dim)
        nope, values = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        keys = nope.new_empty(*nope.shape[:2], self.qk_nope_head_dim + self.qk_rope_head_dim)
        keys[..., : self.qk_nope_head_dim] = nope
        keys[..., self.qk_nope_head_dim :] = rope_keys.unsqueeze(1)
        return keys, values
