"""Recipes, gradient caching, the trainer, the alignment of the built-in model."""
