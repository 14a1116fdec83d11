"""Training examples: a query, its positives and its hard negatives."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from vlm2vec.types import EmbeddingInput

VERBATIM = "<|image_1|>"
"""A text that contains this placeholder is used verbatim as the prompt."""


@dataclass(frozen=True, slots=True)
class TrainExample:
    """A contrastive pair with its hard negatives.

    Attributes:
        query: The query.
        target: The positive.
        negatives: Hard negatives, if any.
        source: Name of the training set, for single-source batches and for messages.
        target_id: Id of the target document, if the data has ids. Targets with equal ids are never negatives of each
            other, even if their content differs.
        origin: File and row of the pair (`file, row 3`), for messages.
        more_targets: Further positives, if any.
        scores: Score of each target, then of each negative, given by a reranker, for example. Empty: no scores.
    """

    query: EmbeddingInput
    target: EmbeddingInput
    negatives: tuple[EmbeddingInput, ...] = ()
    source: str = ""
    target_id: str | None = None
    origin: str = field(default="", compare=False)
    more_targets: tuple[EmbeddingInput, ...] = ()
    scores: tuple[float, ...] = ()

    def without_negatives(self) -> TrainExample:
        """Returns the pair without its negatives and their scores."""
        return dataclasses.replace(self, negatives=(), scores=self.scores[: len(self.targets)])

    def with_target_instruction(self, instruction: str) -> TrainExample:
        """Returns the pair with `instruction` added to targets and negatives that lack one and are not verbatim."""

        def add(item: EmbeddingInput) -> EmbeddingInput:
            if item.instruction is not None or (item.text and VERBATIM in item.text):
                return item
            return dataclasses.replace(item, instruction=instruction)

        return dataclasses.replace(
            self,
            target=add(self.target),
            more_targets=tuple(map(add, self.more_targets)),
            negatives=tuple(map(add, self.negatives)),
        )

    def with_reference_negative(self) -> TrainExample:
        """Returns the pair with one more hard negative: its target with the query's images in place of its own.

        A pair is unchanged if query and target differ in their number of images, have none, or have equal images.
        """
        images = self.query.images
        if len(images) != len(self.target.images) or images == self.target.images:
            return self
        negative = dataclasses.replace(self.target, images=images)
        scores = (*self.scores, math.nan) if self.scores else ()
        return dataclasses.replace(self, negatives=(*self.negatives, negative), scores=scores)

    @property
    def targets(self) -> tuple[EmbeddingInput, ...]:
        """All positives, `target` first."""
        return (self.target, *self.more_targets)
