"""Readers of the layouts in which MMEB is published: images, videos, documents, corpora."""
