"""Reads MMEB-V3's GUI trajectory retrieval: queries and a corpus in parquet, with a split for each of the eight tasks.

`gui-tasks/<collection>/` contains the parquet files of the configurations `queries` and `corpus`. The split of a file
follows from its name or folder (`queries/q2t-00000-of-00001.parquet`). Screenshots are in `gui-tasks/<images>/` or in a
zip in that folder. Every query ranks all candidates: the targets of all queries, then the corpus, each id once. The
folder may also have its name on the hub, `gui_tasks`. Source: `eval/gui.yaml`, the GUI loader and
`generate_cand_dataset` of the reference repository (2026).
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm2vec.data.mmeb.images import PUBLISHED, read_parquet
from vlm2vec.data.mmeb.media import Media
from vlm2vec.data.mmeb.quirks import Quirks
from vlm2vec.errors import UserError, shown
from vlm2vec.types import BARE_IMAGE_TOKEN, EmbeddingInput, EvalQuery

FOLDERS = ("gui-tasks", "gui_tasks")
PLACEHOLDER = "<|image_1|>"
QUERY_COLUMNS = ("qry_text", "qry_image_path", "pos_text", "pos_image_path", "pos_id")
CORPUS_COLUMNS = ("cand_text", "cand_image_path", "cand_id")


def gui_files(root: Path, collection: str, part: str, split: str) -> list[Path]:
    """Returns the parquet files of a part ("queries" or "corpus") and split."""
    found = [
        path
        for folder in FOLDERS
        for path in (root / folder / collection).rglob("*.parquet")
        if part in _words(path, root) and split in _words(path, root)
    ]
    return sorted(found)


def read_gui_set(root: Path, collection: str, split: str, quirks: Quirks = PUBLISHED) -> list[EvalQuery]:
    """Reads the queries of a task; they share one candidate tuple.

    Args:
        root: The data folder.
        collection: Name such as "GAE-GUIAct"; its screenshots are in the folder of that name without "GAE-".
        split: Name such as "q2t" (query to trajectory).
        quirks: Controls how rows are converted to inputs.

    Raises:
        UserError: for a missing file or column, or image paths that are not a text or a list of texts.
    """
    images = collection.removeprefix("GAE-")
    media = Media(root, tuple(f"{folder}/{images}" for folder in FOLDERS))
    place: dict[str, int] = {}
    candidates: list[EmbeddingInput] = []
    found: list[tuple[EmbeddingInput, int]] = []

    def position_of(name: str, text: Any, paths: Any, where: str) -> int:
        if name not in place:
            place[name] = len(candidates)
            candidates.append(_input(text, paths, media, where, quirks))
        return place[name]

    for where, row in _rows(root, collection, "queries", split, QUERY_COLUMNS):
        query = _input(row["qry_text"], row["qry_image_path"], media, f"{where}, field qry_image_path", quirks)
        target = (row["pos_text"], row["pos_image_path"], f"{where}, field pos_image_path")
        found.append((query, position_of(str(row["pos_id"]), *target)))
    for where, row in _rows(root, collection, "corpus", split, CORPUS_COLUMNS):
        position_of(str(row["cand_id"]), row["cand_text"], row["cand_image_path"], f"{where}, field cand_image_path")
    everything = tuple(candidates)
    return [EvalQuery(query, everything, (gold,)) for query, gold in found]


def _input(text: Any, paths: Any, media: Media, where: str, quirks: Quirks) -> EmbeddingInput:
    """Builds an input whose n-th image token, always written `<|image_1|>`, refers to its n-th image."""
    words = "" if text is None else str(text)
    names = _image_paths(paths, where)
    if not names:
        bare = BARE_IMAGE_TOKEN if quirks.missing_image == "published" else ""
        return EmbeddingInput(words.replace(PLACEHOLDER, bare))
    rules = quirks.rules("image")
    images = tuple(replace(media.image(name, where), rules=rules) for name in names)
    parts = words.split(PLACEHOLDER)
    if len(parts) - 1 not in (0, len(images)):
        raise UserError(f"{where}: {len(images)} images but {len(parts) - 1} {PLACEHOLDER} in the text")
    numbered = [f"<|image_{k}|>{part}" for k, part in enumerate(parts[1:], start=1)]
    return EmbeddingInput("".join([parts[0], *numbered]) or None, images)


def _image_paths(value: Any, where: str) -> list[str]:
    """Parses a list of paths, a single path, or a list written as text (`['a.png', 'b.png']`); drops empty paths."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise UserError(f"{where}: expected a list of image paths, found {shown(value)}") from error
    paths = [value] if isinstance(value, str) else list(value or [])
    if not all(path is None or isinstance(path, str) for path in paths):
        raise UserError(f"{where}: expected image paths, found {shown(paths)}")
    return [path for path in paths if path]


def _rows(
    root: Path, collection: str, part: str, split: str, columns: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    files = gui_files(root, collection, part, split)
    if not files:
        place = root / FOLDERS[0] / collection
        raise UserError(f"{place}: no {part} of split {split} found; `vlm2vec data check` prints how to download it")
    for file in files:
        table = read_parquet(file)
        for column in columns:
            if column not in table.schema.names:
                raise UserError(f"{file}: column {column} is missing; expected {', '.join(columns)}")
        for number, row in enumerate(table.select(list(columns)).to_pylist()):
            yield f"{file}, row {number}", row


def _words(path: Path, root: Path) -> set[str]:
    """Returns the parts of a path and of its file name: {"gui-tasks", "GAE-GUIAct", "queries", "q2t", …}."""
    folders = path.relative_to(root).parts[:-1]
    return {*folders, *itertools.chain.from_iterable(name.split("-") for name in path.stem.split("_"))}
