"""The demo benchmark emoji-mmeb: its tasks, and its preparation."""
