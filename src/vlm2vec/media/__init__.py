"""Images, videos, document pages and archive members by reference, decoded on demand."""
