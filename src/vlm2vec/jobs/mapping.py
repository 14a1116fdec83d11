"""A map of a vector store: every row as a point in two dimensions, as one HTML page that needs no network.

The layout is t-SNE (van der Maaten and Hinton, 2008; Barnes-Hut, as scikit-learn computes it) of the first 50 principal
components: near points have near vectors, while distances between groups mean little.

Shapes: N rows, D embedding dim.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from vlm2vec.errors import UserError
from vlm2vec.files import write_text
from vlm2vec.jobs.searching import image_ref, with_images
from vlm2vec.jobs.sheet import link_of, name_of
from vlm2vec.retrieval.metadata import PREFIX
from vlm2vec.retrieval.vector_store import Hit, VectorStore

TEMPLATE = Path(__file__).with_name("templates") / "map.html.j2"
COMPONENTS = 50
PERPLEXITY = 30
FEWEST = 4
MOST_GROUPS = 10
"""Colors that can be told apart; further values share the color of "others"."""
NUM_BINS = 6
PIXELS = 88
BLOCK = 256
SEED = 0


@dataclass(frozen=True)
class Groups:
    """The color of each row: a position in `names` for each of N rows."""

    title: str
    names: list[str]
    of_N: list[int]


def write_map(
    path: Path,
    store: VectorStore,
    *,
    color: str | None = None,
    where: str | None = None,
    limit: int = 10_000,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Writes the page: points to hover, zoom and filter by name; thumbnails replace the points where there is space.

    Args:
        path: The HTML file, about 2 kB an image.
        store: Its vectors are read into memory.
        color: Field of the metadata that colors the points; None: clusters of the vectors (k-means).
        where: Only the rows of this filter.
        limit: Rows on the map; of a larger store, rows spread evenly by key.
        progress: Called with the number of rows done since the last call.

    Returns:
        The number of points.

    Raises:
        UserError: if scikit-learn is missing, the field is unknown, or there are fewer than four rows.
    """
    keys, vectors_ND = _rows(store, where, limit)
    if len(keys) < FEWEST:
        raise UserError(f"{store.uri}: {len(keys)} rows: expected at least {FEWEST} for a map")
    groups = cluster(vectors_ND) if color is None else None
    places_N2 = layout(vectors_ND)
    hits: list[Hit] = []
    points: list[dict[str, Any]] = []
    for start in range(0, len(keys), BLOCK):
        rows = store.fetch(keys[start : start + BLOCK])
        part = [Hit(key, 0.0, about) for key, about in zip(rows.keys, rows.metadata, strict=True)]
        hits += part
        with ThreadPoolExecutor() as pool:
            points += pool.map(lambda hit: _point(hit, path.parent), with_images(store, part))
        progress(len(part))
    groups = groups or by_field(color or "", [hit.metadata for hit in hits], store.uri)
    for point, (x, y), group in zip(points, places_N2, groups.of_N, strict=True):
        point |= {"x": round(float(x), 4), "y": round(float(y), 4), "g": group}
    write_text(path, _page(store, groups, points))
    return len(points)


def layout(vectors_ND: np.ndarray) -> np.ndarray:
    """Places in the unit square, [N, 2], which they fill; equal for equal vectors on the same machine."""
    manifold, decomposition = _sklearn("manifold"), _sklearn("decomposition")
    size = min(COMPONENTS, *vectors_ND.shape)
    reduced = decomposition.PCA(size, random_state=SEED).fit_transform(vectors_ND)
    perplexity = min(PERPLEXITY, (len(vectors_ND) - 1) / 3)
    places = manifold.TSNE(perplexity=perplexity, init="pca", random_state=SEED).fit_transform(reduced)
    low, high = places.min(axis=0), places.max(axis=0)
    square: np.ndarray = (places - low) / np.maximum(high - low, 1e-9)
    return square


def cluster(vectors_ND: np.ndarray) -> Groups:
    """Clusters by k-means, the largest first; more of them for more rows, at most `MOST_GROUPS`."""
    number = int(np.clip(round((len(vectors_ND) / 8) ** 0.5), 2, MOST_GROUPS))
    found = _sklearn("cluster").KMeans(number, n_init=4, random_state=SEED).fit_predict(vectors_ND)
    ordered = [label for label, _ in Counter(found.tolist()).most_common()]
    position = {label: i for i, label in enumerate(ordered)}
    return Groups("cluster", [f"cluster {i + 1}" for i in range(len(ordered))], [position[x] for x in found.tolist()])


def by_field(color: str, metadata: Sequence[dict[str, Any]], uri: str) -> Groups:
    """Colors by a field: its most frequent values, or ranges of a number with many values.

    Raises:
        UserError: if no row has the field.
    """
    own = f"{PREFIX}{color}"
    values = [about.get(color, about.get(own)) for about in metadata]
    known = [value for value in values if value is not None]
    if not known:
        names = sorted({name.removeprefix(PREFIX) for about in metadata for name in about})
        raise UserError(f"{uri}: no row has a field {color}; fields: {', '.join(names)}")
    if all(isinstance(value, int | float) for value in known) and len(set(known)) > MOST_GROUPS:
        edges = np.unique(np.quantile(known, np.linspace(0, 1, NUM_BINS + 1)))
        labels = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
        last = len(labels) - 1
        places = [
            len(labels) if value is None else min(int(np.searchsorted(edges, value, "right")) - 1, last)
            for value in values
        ]
        return Groups(color, [*labels, "unknown"] if len(known) < len(values) else labels, places)
    texts = ["unknown" if value is None else str(value) for value in values]
    common = [text for text, _ in Counter(texts).most_common(MOST_GROUPS)]
    position = {text: i for i, text in enumerate(common)}
    rest = [*common, "others"] if len(set(texts)) > len(common) else common
    return Groups(color, rest, [position.get(text, len(common)) for text in texts])


def _rows(store: VectorStore, where: str | None, limit: int) -> tuple[list[str], np.ndarray]:
    """Keys in order and their vectors; at most `limit`, spread evenly."""
    keys: list[str] = []
    blocks = [np.zeros((0, store.facts.dim), np.float32)]
    for rows in store.scan([], where, vectors=True):
        keys += rows.keys
        blocks.append(np.zeros((0, store.facts.dim), np.float32) if rows.vectors_ND is None else rows.vectors_ND)
    vectors_ND = np.concatenate(blocks).astype(np.float32)
    order = sorted(range(len(keys)), key=keys.__getitem__)
    if len(order) > limit:
        order = [order[i * len(order) // limit] for i in range(limit)]
    return [keys[row] for row in order], vectors_ND[order]


def _point(hit: Hit, folder: Path) -> dict[str, Any]:
    """Name, thumbnail and link of a row."""
    text = str(hit.metadata.get(f"{PREFIX}text", ""))[:160]
    return {"n": name_of(hit), "f": link_of(hit, folder), "t": text, "i": _small(hit)}


def _small(hit: Hit) -> str:
    """A thumbnail as base64 WebP; empty for a row without a readable image."""
    image = image_ref(hit.metadata)
    if image is None:
        return ""
    try:
        small = image.load()
    except UserError:
        return ""
    small.thumbnail((PIXELS, PIXELS), Image.Resampling.BILINEAR)
    encoded = io.BytesIO()
    small.save(encoded, format="WEBP", quality=60, method=2)
    return base64.b64encode(encoded.getvalue()).decode()


def _page(store: VectorStore, groups: Groups, points: list[dict[str, Any]]) -> str:
    counts = Counter(groups.of_N)
    data = {
        "points": points,
        "groups": [f"{name} ({counts[i]})" for i, name in enumerate(groups.names)],
        "many": len(groups.names) > MOST_GROUPS,
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"Map of {Path(store.uri).name}",
        about=f"{len(points):,} rows, colored by {groups.title}; model {store.facts.model}",
        # "<" would let a name end the script element.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _sklearn(module: str) -> Any:
    """A module of scikit-learn.

    Raises:
        UserError: if it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise UserError("the map requires scikit-learn; install it with: pip install 'vlm2vec[map]'") from error
