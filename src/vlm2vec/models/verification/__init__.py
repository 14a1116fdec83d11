"""Whether a model gives the vectors it should: golden vectors, fingerprints, comparisons, exports."""
