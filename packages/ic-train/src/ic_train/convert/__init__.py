"""Conversion of pretrained attention to Multi-Head Latent Attention: see docs/conversion.md."""
