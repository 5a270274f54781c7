"""Evaluation: retrieval from long contexts."""
