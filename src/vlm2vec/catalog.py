"""The list behind `vlm2vec models`: built-in models, known checkpoints and bases, with size, license and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vlm2vec.models.checkpoints.known import KnownCheckpoint, table
from vlm2vec.planning.cost import GIB, Inputs, encoding_memory, parameters
from vlm2vec.planning.geometry import geometry_of, known_configs

BUILT_IN = {
    "compact": (29_496_922, 384),
    "compact-dual": (28_629_080, 384),
}
"""Number of parameters and embedding dimension by name."""


@dataclass(frozen=True)
class CatalogRow:
    """A model that can be named in a command.

    Attributes:
        model: Name of a built-in model, or hub id.
        kind: "built in", "embedding", or "base" for a model to train.
        parameters: Number of parameters; None if the package has no configuration of the model.
        dim: Embedding dimension; None as above.
        license: As recorded in `known_checkpoints.yaml`; None if not recorded.
        memory_gib: Computed peak memory to encode with bfloat16 weights; None as above. Float32 needs twice as much.
    """

    model: str
    kind: str
    parameters: int | None = None
    dim: int | None = None
    license: str | None = None
    memory_gib: float | None = None

    def fits(self, available_gib: float, bytes_per_weight: int) -> bool | None:
        """Whether the memory suffices to encode; None if the need is unknown."""
        return None if self.memory_gib is None else self.memory_gib * bytes_per_weight / 2 <= available_gib


def catalog(batch_tokens: int) -> list[CatalogRow]:
    """Built-in models, then known checkpoints, then bases; checkpoints that this package cannot load are left out.

    Args:
        batch_tokens: Size of a batch for which memory is computed; see `vlm2vec.models.encoding.pipeline.BATCH_TOKENS`.
    """
    built_in = [
        CatalogRow(name, "built in", count, dim, "Apache-2.0", 1.0 + 2.0 * count / GIB)
        for name, (count, dim) in BUILT_IN.items()
    ]
    known = [
        row
        for checkpoint in table().checkpoints
        if not checkpoint.not_loaded
        for row in _rows(checkpoint, batch_tokens)
    ]
    return [*built_in, *known, *(_sized(name, "base", name, None, batch_tokens) for name in known_configs())]


def _rows(checkpoint: KnownCheckpoint, batch_tokens: int) -> Iterator[CatalogRow]:
    bases: list[str | None] = [*checkpoint.bases] or [None] * len(checkpoint.ids)
    for name, base in zip(checkpoint.ids, bases, strict=True):
        yield _sized(name, "embedding", base, checkpoint.license, batch_tokens)


def _sized(name: str, kind: str, base: str | None, license_name: str | None, batch_tokens: int) -> CatalogRow:
    if base is None:
        return CatalogRow(name, kind, license=license_name)
    model = geometry_of(base)
    memory = encoding_memory(model, batch_tokens, Inputs()).total / GIB
    return CatalogRow(name, kind, sum(parameters(model).values()), model.decoder.hidden, license_name, memory)
