"""Absorbed attention over cached latent rows."""

from ic_model.ops.mla_decode.reference import latent_attention, mla_decode

__all__ = ["latent_attention", "mla_decode"]
