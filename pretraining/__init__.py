"""Builds the model that ships as `compact`: training data, pretraining, packaging. Not part of the wheel."""
