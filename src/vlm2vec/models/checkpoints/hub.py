"""Downloads hub checkpoints that describe their vectors.

Token, cache and offline mode are configured by the environment variables of huggingface_hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm2vec.models.checkpoints.folder import EMBEDDER_FILE
from vlm2vec.models.st_folder import MODULES_FILE, RERANKER_FILE


def local_folder(source: str, revision: str | None = None) -> Path:
    """Returns the folder of `source`: the folder itself, or the local copy of a hub id with `embedder.json`,
    `reranker.json` or `modules.json`.

    Other ids are returned unchanged; transformers loads them and reports unreachable ids.

    Args:
        source: A folder or hub id.
        revision: Branch, tag or commit of the hub.
    """
    if Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        return Path(source)
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    where: dict[str, Any] = {"repo_id": source, "revision": revision, "local_files_only": False}
    for name in (EMBEDDER_FILE, RERANKER_FILE, MODULES_FILE):
        try:
            hf_hub_download(filename=name, **where)
        except LocalEntryNotFoundError:  # no network: each further request would be repeated for half a minute
            where["local_files_only"] = True
            continue
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, HFValidationError, OSError):
            break
        return Path(snapshot_download(ignore_patterns=["*.bin", "*.pt", "*.pth", "*.ckpt"], **where))
    return Path(source)
