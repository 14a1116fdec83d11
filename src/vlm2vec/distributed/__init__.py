"""Run embedding and evaluation jobs on a Ray cluster."""
