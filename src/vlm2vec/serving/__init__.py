"""Embeddings and search over HTTP: one model, the dialects of many clients."""
