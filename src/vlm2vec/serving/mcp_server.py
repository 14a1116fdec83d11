"""A vector store for agents: read-only tools of the Model Context Protocol (MCP).

The tools search by text, by image or by both, find rows similar to a row, show an image, and list the fields that a
filter may use. Nothing is written, no path outside the store is read, and images come from the store or the request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from mcp.server import MCPServer
from mcp.server.mcpserver import Image
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import BaseModel

from vlm2vec import __version__
from vlm2vec.errors import UserError
from vlm2vec.jobs.indexing import thumbnail
from vlm2vec.jobs.searching import PRESETS, Query, Searcher, image_ref, with_images
from vlm2vec.jobs.sheet import name_of
from vlm2vec.media.data_uris import base64_bytes, data_uri_bytes, is_data_uri
from vlm2vec.media.images import ImageRef
from vlm2vec.retrieval.vector_store import Hit
from vlm2vec.serving.fields import filter_fields, visible
from vlm2vec.serving.guards import InputLimits
from vlm2vec.serving.settings import ServeSettings

MAX_RESULTS = 100
PIXELS = 960  # longer side of a shown image
READ_ONLY = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False)
R = TypeVar("R")


class Row(BaseModel):
    """A row of the store: its key, a readable name, its cosine to the query and its metadata."""

    key: str
    name: str
    score: float
    metadata: dict[str, Any]


class Found(BaseModel):
    """The nearest rows, best first."""

    rows: list[Row]


class StoreAbout(BaseModel):
    """Size and model of the store, and the fields that `where` may use."""

    rows: int
    model: str
    dimensions: int
    fields: dict[str, str]
    filter_examples: list[str]
    tasks: dict[str, str]


def build_server(searcher: Searcher, name: str) -> MCPServer[Any]:
    """The MCP server of a store.

    Args:
        searcher: The store and its model.
        name: Name of the store, shown to the client.
    """
    tools = StoreTools(searcher)
    server: MCPServer[Any] = MCPServer(
        "vlm2vec",
        title=f"vlm2vec: {name}",
        version=__version__,
        instructions=f"Search {name} by meaning. describe_store lists the filter fields, show_image shows a result.",
        log_level="WARNING",
    )
    for tool in (tools.search, tools.similar, tools.show_image, tools.describe_store):
        server.add_tool(tool, annotations=READ_ONLY)
    return server


class StoreTools:
    """The tools of a store.

    Args:
        searcher: The store and its model.
    """

    def __init__(self, searcher: Searcher) -> None:
        self.searcher, self.store = searcher, searcher.store
        self._limits = InputLimits.of(ServeSettings.model_validate({"model": "store"}))
        self._turn = threading.Lock()  # tools run in threads; the model and the store serve one at a time

    def search(
        self,
        text: str | None = None,
        image: str | None = None,
        like: str | None = None,
        where: str | None = None,
        k: int = 10,
        task: str | None = None,
    ) -> Found:
        """Find the rows nearest to a text, an image, or both together ("this dress but in red").

        Args:
            text: What to look for.
            image: An image as a data URI or base64.
            like: Key of a row whose image is the query image.
            where: Filter on the fields of describe_store, such as "width > 600".
            k: Number of rows, 1 to 100.
            task: A task of describe_store, or an instruction for the model.
        """
        return self._answer(lambda: self._search(text, image, like, where, k, task))

    def similar(self, key: str, where: str | None = None, k: int = 10) -> Found:
        """Find the rows nearest to a row of the store.

        Args:
            key: Key of the row.
            where: Filter on the fields of describe_store.
            k: Number of rows, 1 to 100.
        """
        return self._answer(lambda: self._found(self.searcher.similar(key, _checked(k), where or None)))

    def show_image(self, key: str) -> Image:
        """Show the image of a row.

        Args:
            key: Key of the row.
        """
        return self._answer(lambda: Image(data=thumbnail(self._image(key), PIXELS), format="jpeg"))

    def describe_store(self) -> StoreAbout:
        """List size, model and filter fields of the store."""
        return self._answer(self._about)

    def _search(
        self, text: str | None, image: str | None, like: str | None, where: str | None, k: int, task: str | None
    ) -> Found:
        if image and like:
            raise UserError("image and like: expected one of them")
        query_image = self._image(like) if like else self._decoded(image) if image else None
        return self._found(self.searcher.search(Query(text, query_image, task), _checked(k), where or None))

    def _found(self, hits: list[Hit]) -> Found:
        return Found(rows=[_row(hit) for hit in hits])

    def _image(self, key: str) -> ImageRef:
        rows = self.store.fetch([key])
        if not rows.keys:
            raise UserError(f"key {key}: the store has no such row")
        image = image_ref(with_images(self.store, [Hit(key, 0.0, rows.metadata[0])])[0].metadata)
        if image is None:
            raise UserError(f"key {key}: the row has no image")
        return image

    def _decoded(self, text: str) -> ImageRef:
        data = data_uri_bytes(text) if is_data_uri(text) else base64_bytes(text)
        if data is None:
            raise UserError("image: expected a data URI or base64")
        if refusal := self._limits.check_image(data):
            raise UserError(f"image: {refusal.message}")
        return ImageRef(data=data, origin="image of the query")

    def _about(self) -> StoreAbout:
        return StoreAbout(
            rows=self.store.count(),
            model=self.store.facts.model,
            dimensions=self.store.facts.dim,
            fields=filter_fields(self.store),
            filter_examples=["width > 600", "path LIKE '%beach%' AND width > height"],
            tasks=PRESETS,
        )

    def _answer(self, call: Callable[[], R]) -> R:
        """The result of a call; a mistake of the caller becomes an error that the client shows."""
        try:
            with self._turn:
                return call()
        except UserError as error:
            raise ToolError(str(error)) from error


def _checked(k: int) -> int:
    if not 1 <= k <= MAX_RESULTS:
        raise UserError(f"k {k}: expected 1 to {MAX_RESULTS}")
    return k


def _row(hit: Hit) -> Row:
    plain = {
        name: value if isinstance(value, str | int | float | bool | None) else str(value)
        for name, value in visible(hit.metadata).items()
    }
    return Row(key=hit.key, name=name_of(hit), score=round(float(hit.score), 4), metadata=plain)
