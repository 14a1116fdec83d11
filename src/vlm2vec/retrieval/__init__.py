"""Exact ranking."""
