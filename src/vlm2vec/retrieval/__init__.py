"""Embedding cache, vector stores and exact ranking."""
