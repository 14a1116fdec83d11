"""Long work on many inputs: reading them, embedding, indexing, searching."""
