"""Preference pairs about facts in long contexts: made, stored once per context, read by training."""
