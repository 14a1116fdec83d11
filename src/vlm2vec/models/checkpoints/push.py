"""Uploads a saved folder to the hub, in one commit.

Token and endpoint are huggingface_hub's: `HF_TOKEN` or `hf auth login`, and `HF_ENDPOINT`.
"""

from __future__ import annotations

from pathlib import Path

from vlm2vec.errors import UserError
from vlm2vec.models.checkpoints.card import CARD_FILE, MARK, card
from vlm2vec.models.checkpoints.folder import EMBEDDER_FILE
from vlm2vec.models.st_folder import RERANKER_FILE

LEFT_OUT = ("checkpoints",)  # step checkpoints of a run


def push_folder(
    folder: Path, repo_id: str, *, private: bool = True, pull_request: bool = False, message: str | None = None
) -> str:
    """Uploads a folder that `save_pretrained` or `vlm2vec train` wrote; step checkpoints and hidden files stay here.

    Args:
        folder: With `embedder.json` or `reranker.json`. Its model card gets the hub id, unless a person has changed it.
        repo_id: `owner/name`; created if it does not exist.
        private: Visibility of a new repository. An existing one keeps its own.
        pull_request: Opens a pull request instead of committing to the main branch.
        message: Commit message.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        UserError: if the folder is not a saved model, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if not any((folder / name).is_file() for name in (EMBEDDER_FILE, RERANKER_FILE)):
        raise UserError(f"{folder}: no {EMBEDDER_FILE}; expected a folder that save_pretrained or vlm2vec train wrote")
    operations = [CommitOperationAdd(name, _content(folder, name, repo_id)) for name in _files(folder)]
    api = HfApi(library_name="vlm2vec")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.create_commit(
            repo_id, operations, commit_message=message or "Upload with vlm2vec", create_pr=pull_request
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{repo_id}: not uploaded: {reason}; check the id and HF_TOKEN (hf auth login)") from error
    return str(done.pr_url or done.commit_url)


def _files(folder: Path) -> list[str]:
    """Paths of the files to upload, relative to the folder."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        path.as_posix()
        for path in paths
        if path.parts[0] not in LEFT_OUT and not any(part.startswith(".") for part in path.parts)
    ]


def _content(folder: Path, name: str, repo_id: str) -> bytes | str:
    """A file's path; the text of a card that this package wrote."""
    path = folder / name
    if name == CARD_FILE and MARK in path.read_text(encoding="utf-8"):
        return card(folder, repo_id).encode()
    return str(path)
