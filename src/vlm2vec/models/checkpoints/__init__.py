"""Checkpoint folders, adapters, hub files and the table of published models."""
