"""A checkpoint on the hub that says how its vectors are made, as a local folder.

Token, cache and offline mode are huggingface_hub's, by its environment variables.
"""

from __future__ import annotations

from pathlib import Path

from vlm2vec.models.checkpoints.folder import EMBEDDER_FILE
from vlm2vec.models.st_folder import MODULES_FILE


def local_folder(source: str, revision: str | None = None) -> Path:
    """The folder of `source`: itself, or the hub's copy of an id with `embedder.json` or `modules.json`.

    Any other id is left to transformers, and so are the errors of one that cannot be reached.

    Args:
        source: A folder or hub id.
        revision: Branch, tag or commit of the hub.
    """
    if Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        return Path(source)
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for name in (EMBEDDER_FILE, MODULES_FILE):
        try:
            hf_hub_download(source, name, revision=revision)
        except (EntryNotFoundError, LocalEntryNotFoundError):
            continue
        except (HfHubHTTPError, HFValidationError, OSError):
            break
        return Path(snapshot_download(source, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.ckpt"]))
    return Path(source)
