from tiny.fixtures import tiny_vlm  # noqa: F401
