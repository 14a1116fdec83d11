"""The `loss` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from vlm2vec.losses import LOSSES, Hardness


class Section(BaseModel):
    """Settings whose unknown keys are errors, as are numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class LossSettings(Section):
    """The loss; its temperature is `train.temperature`."""

    kind: str = "info_nce"
    """A name from `vlm2vec.losses.LOSSES`. `info_nce`: softmax over the batch; with several positives per query, the
    mean over them, where no positive is a negative of another. `supcon`, `mil_nce`: variants for several positives from
    the papers of these names. `sigmoid`: the SigLIP loss, binary classification of every pair."""
    also: dict[str, float] = {}
    """Additional losses with their weights, computed from queries to targets: `soft_labels` for data with scores,
    `distillation` with a `teacher`."""
    hardness_alpha: float = Field(default=0.0, ge=0)
    """Hardness weighting: the term of a negative is multiplied by exp(alpha * cosine), that is, alpha * cosine is added
    to its logit. LLaVE trains with 9 (arXiv 2503.04812). 0: off."""
    hardness_mode: Hardness = "all_negatives"
    """Negatives to weight: in-batch negatives, the query's own hard negatives, or all."""
    guide: str | None = None
    """A model that masks likely false negatives (GISTEmbed): targets that it rates closer to the query than the
    positive are not negatives. null: off."""
    guide_margin: float = Field(default=0.0, ge=-2, le=2)
    """Margin by which the guide's cosine must exceed that of the positive."""
    teacher: str | None = None
    """A model whose similarities (`also: {distillation: 1}`) or embeddings (`distill_vectors`) are the training target.
    null: none."""
    teacher_temperature: float = Field(default=0.02, gt=0)
    """Divisor of the teacher's cosines."""
    distill_vectors: float = Field(default=0.0, ge=0)
    """Weight of 1 - cosine(own embedding, teacher's embedding); requires a teacher with the same dimension. 0: off."""
    score_temperature: float = Field(default=1.0, gt=0)
    """Divisor of the data's scores before their softmax; used by `soft_labels`."""
    directions: Literal["query", "both"] = "query"
    """Direction of the loss. "query": from queries to targets, as in VLM2Vec; "both": the mean over both directions."""
    learn_temperature: bool = False
    """Learn the temperature, starting at `train.temperature`."""
    bias: float = -10.0
    """Initial bias of the sigmoid loss; -10 as in SigLIP."""
    learn_bias: bool = True
    """Learn the bias of the sigmoid loss."""
    matryoshka_dims: list[PositiveInt] | None = None
    """Dimensions to which embeddings may be truncated later; the loss is the mean over them. null: full dimension."""
    mask_equal_queries: bool = True
    """Exclude the targets of equal queries from the negatives."""
    mask_margin: float | None = Field(default=None, ge=-2, le=2)
    """Mask targets whose cosine exceeds the positive's by more than this, as likely unlabelled positives. null: off."""

    @property
    def losses(self) -> dict[str, float]:
        """All losses by name with their weights."""
        return {self.kind: 1.0, **self.also}

    @model_validator(mode="after")
    def _consistent(self) -> LossSettings:
        for name in self.losses:
            if name not in LOSSES:
                raise ValueError(f"{name!r} is not a loss; expected one of {', '.join(LOSSES)}")
        if self.kind in self.also:
            raise ValueError(f"also: {self.kind} is already the kind; remove it from also")
        if self.hardness_alpha and self.kind == "sigmoid":
            raise ValueError("hardness_alpha has no effect on the sigmoid loss; set it to 0 or choose another kind")
        distills = self.distill_vectors > 0 or "distillation" in self.losses
        if distills != (self.teacher is not None):
            raise ValueError("teacher and a distillation loss (also.distillation or distill_vectors) need each other")
        return self
