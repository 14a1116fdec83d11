"""Verifies the vectors of a model: golden vectors, fingerprints, comparison with other libraries, exports."""
