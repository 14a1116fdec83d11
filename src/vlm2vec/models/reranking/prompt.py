"""The prompt in which a model reads a query and a candidate together."""

from __future__ import annotations

from dataclasses import dataclass

from vlm2vec.errors import UserError
from vlm2vec.models.prompts import PLACEHOLDER, VIDEO_PLACEHOLDER, PromptTemplate
from vlm2vec.types import EmbeddingInput

GENERATION = "{%- set add_generation_prompt = true -%}"


@dataclass(frozen=True)
class RerankPrompt:
    """What the model is asked about a pair.

    The defaults are those of Qwen3-VL-Reranker, whose wording also works for models that were not trained as rerankers.

    Attributes:
        system: The system turn, or the first line where the model has no chat template.
        instruction: What makes a candidate relevant, used where the query brings no instruction of its own.
        body: The user turn; `{instruction}`, `{query}` and `{document}` are replaced.
        suffix: Ends the prompt where the model has no chat template.
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
        """How the pair becomes the model's prompt: by its own chat template, up to where its answer begins."""
        return PromptTemplate(chat=GENERATION + chat) if chat else PromptTemplate()

    def pair(self, query: EmbeddingInput, candidate: EmbeddingInput, has_chat: bool) -> EmbeddingInput:
        """Query and candidate as one input; each image stands where its side of the pair is read.

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
    """The text of one side with its images as placeholders, counted from `begin` + 1."""
    text = item.text or ""
    if PLACEHOLDER.search(text) or VIDEO_PLACEHOLDER in text:
        return PLACEHOLDER.sub(lambda match: f"<|image_{int(match[1]) + begin}|>", text).strip()
    media = [VIDEO_PLACEHOLDER] if item.video is not None else []
    media += [f"<|image_{begin + k}|>" for k in range(1, len(item.images) + 1)]
    return "".join(media) + (" " if media and text else "") + text
