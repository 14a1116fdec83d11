"""Computes the cost of a job (parameters, memory, FLOPs, time) from a model's configuration, without weights."""
