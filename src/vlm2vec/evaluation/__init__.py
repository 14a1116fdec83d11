"""Benchmarks, scores and reports."""
