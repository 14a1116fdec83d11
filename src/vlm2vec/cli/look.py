"""Commands that show what vectors hold: map, explain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm2vec.cli.options import OptionsOption, PickleOption, StoreArgument, open_vector_store, settings_of
from vlm2vec.progress import progress_bar, say


def map_store(
    store: StoreArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file.")] = Path("map.html"),
    color: Annotated[
        str | None, typer.Option(help="Field of the metadata that colors the points; default: clusters.")
    ] = None,
    where: Annotated[str | None, typer.Option(help="Only rows that match this SQL condition.")] = None,
    limit: Annotated[int, typer.Option(min=4, help="Number of rows; of a larger store, spread evenly.")] = 10_000,
) -> None:
    """Draw a vector store as a 2-D map (t-SNE) with thumbnails: one HTML file that needs no network.

    Example: vlm2vec map photos.lance -o map.html --color kind
    """
    from vlm2vec.jobs.mapping import write_map

    opened = open_vector_store(store)
    with progress_bar(f"map of {store}", min(opened.count(where), limit)) as advance:
        count = write_map(output, opened, color=color, where=where, limit=limit, progress=advance)
    opened.close()
    say(f"Map: {output}, {count} rows")


def explain(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint folder, a hub id or a built-in model.")],
    query: Annotated[str, typer.Option(help="Text of the query.")],
    image: Annotated[Path, typer.Option(help="The image that the query is compared with.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file.")] = Path("explain.html"),
    grid: Annotated[int, typer.Option(help="Cells on a side; (grid - 1)² encodings.")] = 8,
    option: OptionsOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Show which regions of an image carry its match with a query, by occlusion, as an overlay.

    Example: vlm2vec explain compact --query "a dog" --image photos/1.jpg -o explain.html
    """
    from vlm2vec.jobs.explaining import WINDOW, explain, write_explanation
    from vlm2vec.media.images import ImageRef
    from vlm2vec.models.embedder import Embedder
    from vlm2vec.types import EmbeddingInput

    candidate = ImageRef(path=str(image))
    candidate.load()  # an unreadable image is refused before a model is loaded
    embedder = Embedder.from_pretrained(model, **settings_of(option, allow_pickle))  # type: ignore[arg-type]
    with progress_bar(f"covering {image.name}", max(grid - WINDOW + 1, 0) ** 2) as advance:
        found = explain(embedder, EmbeddingInput(query), candidate, grid, advance)
    write_explanation(output, f"“{query}” in {image.name}", candidate, found)
    say(f"Cosine {found.cosine:.3f}; largest change {abs(found.drops_GG).max():.3f}. Page: {output}")
