from tiny.checkpoints import adapter, merged  # noqa: F401
from tiny.fixtures import tiny_vlm  # noqa: F401
