"""`index` on sixty images, killed or run twice at the same time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jobs.test_search_cli import SMALL, refused, typed
from samples import COLORS, draw

from vlm2vec.jobs.stores import only_writer
from vlm2vec.retrieval.open import open_store

KILLED = """
import os, signal, sys
from vlm2vec.cli import app
from vlm2vec.jobs import index_writer
from vlm2vec.retrieval.lance_store import LanceStore

index_writer.FIRST_PART = index_writer.PART = 20
add, parts = LanceStore.add, []

def killed(*arguments):
    parts.append(arguments)
    if len(parts) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    add(*arguments)

LanceStore.add = killed
app(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images of differing content."""
    folder = tmp_path_factory.mktemp("sixty") / "photos"
    for i in range(60):
        draw(folder / f"{i:02}.png", list(COLORS)[i % 4], i)
    return folder


def test_a_killed_index_of_sixty_images_goes_on_and_ends_as_if_it_had_not_been(photos: Path) -> None:
    store, whole = photos.with_name("photos.lance"), photos.with_name("whole.lance")
    command = [sys.executable, "-c", KILLED, "index", "compact", photos, "--store", store, *SMALL]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    said = typed("index", "compact", photos, "--store", store, *SMALL)
    assert "20 new, 0 changed, 40 unchanged, 0 removed; 20 encoded" in said
    assert "60 new" in typed("index", "compact", photos, "--store", whole, *SMALL)
    keys = sorted(str(path) for path in photos.iterdir())
    found, expected = (open_store(str(one)).fetch(keys, vectors=True) for one in (store, whole))
    assert found.keys == expected.keys == keys and found.metadata == expected.metadata
    np.testing.assert_allclose(found.vectors_ND, expected.vectors_ND, atol=1e-6)
    for key in keys[::40]:
        hits = json.loads(typed("search", "--store", store, "--image", key, "-k", 5, "--json"))
        assert hits[0]["score"] > 0.999 and any(hit["key"] == key for hit in hits)


def test_a_second_index_on_a_store_that_is_being_written_is_refused_in_one_line(photos: Path) -> None:
    store = photos.with_name("photos.lance")
    typed("index", "compact", photos, "--store", store, *SMALL)
    with only_writer(open_store(str(store))):
        said = refused("index", "compact", photos, "--store", store, *SMALL)
        assert f"{store}: another process is writing to it" in said
        assert json.loads(typed("search", "red", "--store", store, "-k", 1, "--json"))
    assert "60 unchanged" in typed("index", "compact", photos, "--store", store, *SMALL)
