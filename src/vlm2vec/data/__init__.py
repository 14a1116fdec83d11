"""Reads rows, draws batches and collates them into tensors."""
