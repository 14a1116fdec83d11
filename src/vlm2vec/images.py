"""Former place of `vlm2vec.media.images`, kept for one version."""

from __future__ import annotations

import warnings

from vlm2vec.media.images import ImageRef as ImageRef

warnings.warn("vlm2vec.images is now vlm2vec.media.images", DeprecationWarning, stacklevel=2)
