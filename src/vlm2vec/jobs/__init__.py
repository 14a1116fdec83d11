"""Jobs on many inputs: embed, index, search, classify, find duplicates."""
