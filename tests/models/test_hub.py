"""Looking for the files of a hub checkpoint without a network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from vlm2vec.models.checkpoints.hub import local_folder


def test_without_a_network_the_hub_is_asked_once_and_the_local_copies_after_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def download(filename: str, local_files_only: bool, **_: object) -> str:
        asked.append((filename, local_files_only))
        raise LocalEntryNotFoundError(filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert local_folder("some/model") == Path("some/model")
    assert [offline for _, offline in asked] == [False, True, True]
