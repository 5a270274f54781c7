"""Training data: text, pass keys hidden in it, positions, and the curriculum that orders them."""
