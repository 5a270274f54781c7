"""Continued training on long text: context extension, packing, mixtures by length."""
