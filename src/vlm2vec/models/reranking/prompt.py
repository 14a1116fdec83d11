"""The prompt that combines a query and a candidate for a reranker."""

from __future__ import annotations

from dataclasses import dataclass

from vlm2vec.errors import UserError
from vlm2vec.models.prompts import PLACEHOLDER, VIDEO_PLACEHOLDER, PromptTemplate
from vlm2vec.types import EmbeddingInput

GENERATION = "{%- set add_generation_prompt = true -%}"


@dataclass(frozen=True)
class RerankPrompt:
    """Wording of the reranking prompt.

    The defaults are those of Qwen3-VL-Reranker, which also work for models that were not trained as rerankers.

    Attributes:
        system: The system turn, or the first line if the model has no chat template.
        instruction: Definition of relevance, used if the query has no instruction.
        body: The user turn; `{instruction}`, `{query}` and `{document}` are replaced.
        suffix: End of the prompt if the model has no chat template.
        answers: The words whose logits are compared, positive first. Each must be one token.
    """

    system: str = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".'
    )
    instruction: str = "Retrieve images or text relevant to the user's query."
    body: str = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    suffix: str = "\nAnswer:"
    answers: tuple[str, str] = ("yes", "no")

    def template(self, chat: str) -> PromptTemplate:
        """Returns the template of the pair: the model's own chat template, up to the start of its answer."""
        return PromptTemplate(chat=GENERATION + chat) if chat else PromptTemplate()

    def pair(self, query: EmbeddingInput, candidate: EmbeddingInput, has_chat: bool) -> EmbeddingInput:
        """Combines query and candidate to one input, with each image at its position in the query or candidate.

        Raises:
            UserError: if both have a video.
        """
        if query.video is not None and candidate.video is not None:
            raise UserError("rerank: query and candidate both have a video; at most one of them may")
        body = self.body.format(
            instruction=query.instruction or self.instruction,
            query=_side(query, 0),
            document=_side(candidate, len(query.images)),
        )
        images = (*query.images, *candidate.images)
        video = query.video or candidate.video
        if has_chat:
            return EmbeddingInput(body, images, self.system, video)
        return EmbeddingInput(f"{self.system}\n{body}{self.suffix}", images, None, video)


def _side(item: EmbeddingInput, begin: int) -> str:
    """Returns the text of query or candidate with its images as placeholders, numbered from `begin` + 1."""
    text = item.text or ""
    if PLACEHOLDER.search(text) or VIDEO_PLACEHOLDER in text:
        return PLACEHOLDER.sub(lambda match: f"<|image_{int(match[1]) + begin}|>", text).strip()
    media = [VIDEO_PLACEHOLDER] if item.video is not None else []
    media += [f"<|image_{begin + k}|>" for k in range(1, len(item.images) + 1)]
    return "".join(media) + (" " if media and text else "") + text
