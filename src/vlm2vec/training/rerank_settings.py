"""The `rerank` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vlm2vec.training.loss_settings import Section


class PromptSettings(Section):
    """Wording of the prompt that combines query and candidate; null: as in the base, or that of Qwen3-VL-Reranker."""

    system: str | None = None
    """The system turn, or the first line if the model has no chat template."""
    instruction: str | None = None
    """Definition of relevance, for queries without an instruction."""
    body: str | None = None
    """The user turn; `{instruction}`, `{query}` and `{document}` are replaced. Short texts train faster."""
    suffix: str | None = None
    """End of the prompt if the model has no chat template."""
    answers: tuple[str, str] | None = None
    """The words whose logits are compared, positive first; each is one token. Without effect on a scalar head."""


class RerankSettings(Section):
    """Training of a reranker; used if `task` is rerank."""

    loss: Literal["listwise", "pointwise"] = "listwise"
    """"listwise": softmax over the candidates of a query; "pointwise": binary cross entropy of each pair."""
    head: Literal["linear", "product"] = "linear"
    """Head of a model without a language-model head, on states that are pooled as in the base. "linear": a layer;
    "product": also the cosine between query and candidate, for a base that is an embedding model. The prompt's last
    token then follows the query as well (`rerank.prompt.body`)."""
    candidates: int = Field(default=8, ge=2)
    """Candidates of a query in a step: its positives, then its hard negatives (`vlm2vec mine`), then targets of other
    queries of the batch."""
    prompt: PromptSettings = PromptSettings()
