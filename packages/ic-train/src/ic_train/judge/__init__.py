"""Judges: language models that grade answers, and how far they are to be believed."""
