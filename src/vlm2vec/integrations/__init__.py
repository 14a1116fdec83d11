"""Adapters: an `Embedder` as the embedding class of other libraries; each module needs its library alone."""
