"""Backbones, prompts, pooling, checkpoints: everything between an input and its vector."""
