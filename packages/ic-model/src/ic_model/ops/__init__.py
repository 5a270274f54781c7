"""Operations of Multi-Head Latent Attention, one folder each, with a PyTorch reference beside every kernel."""
