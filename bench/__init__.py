"""Benchmarks: what is measured, how, and the tables and plots made from the results. See README.md."""
