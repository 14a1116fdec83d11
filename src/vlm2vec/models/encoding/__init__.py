"""Encoding any number of inputs at once: the pipeline behind `Embedder.encode`, and its settings."""
