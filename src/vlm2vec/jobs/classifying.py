"""Zero-shot classification: each input gets the label with the nearest vector.

Inputs of a folder are encoded as queries. Rows of a vector store are not encoded again; only the labels are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np

from vlm2vec.errors import UserError, shown
from vlm2vec.jobs.records import Record
from vlm2vec.jobs.searching import PRESETS
from vlm2vec.retrieval.vector_store import VectorStore
from vlm2vec.types import EmbeddingInput

PART = 256


class LabelEncoder(Protocol):
    """Computes the vectors."""

    def encode_query(self, inputs: list[EmbeddingInput], **kwargs: Any) -> np.ndarray:
        """Unit-norm vectors [N, D] in input order; `on_error(position, error)` is called for an unreadable input."""
        ...

    def encode_document(self, inputs: list[EmbeddingInput], **kwargs: Any) -> np.ndarray:
        """Unit-norm vectors [N, D] in input order."""
        ...


@dataclass(frozen=True)
class Verdict:
    """The nearest label of an input.

    Attributes:
        key: Key of the record or row.
        label: The nearest label; None if the input could not be read.
        score: Cosine of the label.
        margin: Difference to the cosine of the second label; a small margin is a guess.
        error: Why there is no label.
    """

    key: str
    label: str | None
    score: float = 0.0
    margin: float = 0.0
    error: str | None = None


class Labels:
    """Labels as vectors [M, D].

    Args:
        encoder: The model.
        names: At least two distinct labels.
        template: A sentence with `{}` for the label, such as "a photo of a {}".

    Raises:
        UserError: for fewer than two labels, a repeated label, or a template without `{}`.
    """

    def __init__(self, encoder: LabelEncoder, names: Sequence[str], template: str = "{}") -> None:
        self.names = [name.strip() for name in names if name.strip()]
        if len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise UserError(
                f"labels {shown(', '.join(names))}: expected at least two different labels, such as cat,dog"
            )
        if "{}" not in template:
            raise UserError(
                f"template {shown(template)}: expected {{}} where the label goes, such as 'a photo of a {{}}'"
            )
        texts = [EmbeddingInput(template.replace("{}", name)) for name in self.names]
        self.vectors_MD = np.asarray(encoder.encode_document(texts), np.float32)

    def verdicts(self, keys: Sequence[str], vectors_ND: np.ndarray) -> Iterator[Verdict]:
        """The nearest label of every vector."""
        for key, scores in zip(keys, np.asarray(vectors_ND, np.float32) @ self.vectors_MD.T, strict=True):
            first, second = np.argsort(-scores, kind="stable")[:2]
            yield Verdict(key, self.names[first], float(scores[first]), float(scores[first] - scores[second]))


def classify_source(
    encoder: LabelEncoder,
    records: Iterable[Record],
    labels: Labels,
    instruction: str | None = "classification",
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Verdict]:
    """Labels the inputs of a source, in order; an unreadable input has a verdict with its reason.

    Args:
        encoder: The model.
        records: Records of a `vlm2vec.jobs.sources.Source`.
        labels: Labels encoded by the same model.
        instruction: Instruction of the inputs: a name of `PRESETS`, or a sentence.
        progress: Called with the number of inputs done since the last call.
    """
    task = PRESETS.get(instruction or "", instruction)
    stream = iter(records)
    while part := list(islice(stream, PART)):
        yield from _verdicts(encoder, part, labels, task)
        progress(len(part))


def classify_store(store: VectorStore, labels: Labels, where: str | None = None) -> Iterator[Verdict]:
    """Labels the rows of a store by their stored vectors."""
    for rows in store.scan([], where, vectors=True):
        if rows.vectors_ND is not None:
            yield from labels.verdicts(rows.keys, rows.vectors_ND)


def _verdicts(encoder: LabelEncoder, part: list[Record], labels: Labels, task: str | None) -> list[Verdict]:
    reasons = {place: record.error or "no input" for place, record in enumerate(part) if record.item is None}
    places = [place for place in range(len(part)) if place not in reasons]

    def on_error(position: int, error: UserError) -> None:
        reasons[places[position]] = str(error)

    items = [record.item for record in part if record.item is not None]
    if items:
        vectors_ND = encoder.encode_query(items, instruction=task, on_error=on_error)
        good = [row for row, place in enumerate(places) if place not in reasons]
        named = labels.verdicts([part[places[row]].key for row in good], vectors_ND[good])
    else:
        named = iter(())
    return [
        Verdict(record.key, None, error=reasons[place]) if place in reasons else next(named)
        for place, record in enumerate(part)
    ]
