"""The same jobs on many workers."""
