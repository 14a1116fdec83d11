"""A separate process for `test_ui_reranking.py`: `python reranked_page.py STORE` serves the page until stdin closes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from vlm2vec import Embedder
from vlm2vec.errors import UserError
from vlm2vec.jobs.searching import Searcher
from vlm2vec.models.reranking.reranker import Ranked
from vlm2vec.models.reranking.scores import with_cosine
from vlm2vec.retrieval.open import open_store
from vlm2vec.types import EmbeddingInput


class Greenness:
    """Ranks images by how green they are, whatever the query is; the weighted cosine is added as by `Reranker`."""

    def rank(
        self,
        query: EmbeddingInput,
        candidates: Sequence[EmbeddingInput],
        on_error: Callable[[int, UserError], None],
        progress: Callable[[int], None] | None = None,
        cosines: Sequence[float] = (),
        cosine_weight: float = 0.0,
    ) -> list[Ranked]:
        pixels = [item.images[0].load().resize((1, 1)).getpixel((0, 0)) for item in candidates]
        scores = [(green - max(red, blue)) / 255 for red, green, blue in pixels]
        scores = with_cosine(scores, cosines, cosine_weight).tolist()
        return [Ranked(index, scores[index], 0.0) for index in sorted(range(len(scores)), key=lambda i: -scores[i])]


def main(store: str) -> None:
    from vlm2vec.serving.ui import build_page, launch_page

    embedder = Embedder.from_pretrained("compact", num_layers=1, visual_tokens=4, image_size=64)
    searcher = Searcher(embedder, open_store(store))
    page = build_page(searcher, "photos", ranker=Greenness())  # type: ignore[arg-type]
    sys.stdout.write(f"Page: {launch_page(page, searcher)}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
