"""The prompt that combines a query and a candidate for a reranker."""

from __future__ import annotations

from dataclasses import dataclass

from vlm2vec.errors import UserError
from vlm2vec.models.prompts import PLACEHOLDER, VIDEO_PLACEHOLDER, PromptTemplate
from vlm2vec.types import EmbeddingInput

GENERATION = "{%- set add_generation_prompt = true -%}"
DOCUMENT = "<|document|>"
"""Where the candidate begins in the text of a pair, for chat templates with turns for both."""
# Turns the user's turn into one of the query and one of the document, as CrossEncoder's chat templates expect them.
ROLES = f"""\
{{%- set ns = namespace(system=[], query=[], document=[], after=false) -%}}
{{%- for message in messages -%}}
{{%- if message.role == 'system' -%}}{{%- set ns.system = [message] -%}}
{{%- else -%}}
{{%- for part in message.content -%}}
{{%- if part.type == 'text' and '{DOCUMENT}' in part.text -%}}
{{%- set sides = part.text.split('{DOCUMENT}') -%}}
{{%- set ns.after = true -%}}
{{%- if sides[0] -%}}{{%- set ns.query = ns.query + [dict(part, text=sides[0])] -%}}{{%- endif -%}}
{{%- if sides[1] -%}}{{%- set ns.document = [dict(part, text=sides[1])] -%}}{{%- endif -%}}
{{%- elif ns.after -%}}{{%- set ns.document = ns.document + [part] -%}}
{{%- else -%}}{{%- set ns.query = ns.query + [part] -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- set pair = [{{'role': 'query', 'content': ns.query}}, {{'role': 'document', 'content': ns.document}}] -%}}
{{%- set messages = ns.system + pair -%}}
"""


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
        chat: A Jinja chat template with the roles "query" and "document", as those of CrossEncoder. It then writes the
            whole prompt: the system turn is the instruction, and system, body and suffix have no effect. Empty: the
            model's own chat template with one user turn.
    """

    system: str = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".'
    )
    instruction: str = "Retrieve images or text relevant to the user's query."
    body: str = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    suffix: str = "\nAnswer:"
    answers: tuple[str, str] = ("yes", "no")
    chat: str = ""

    def template(self, chat: str) -> PromptTemplate:
        """Returns the template of the pair: the model's own chat template, up to the start of its answer."""
        if self.chat:
            return PromptTemplate(chat=ROLES + self.chat, keeps_order=True)
        return PromptTemplate(chat=GENERATION + chat) if chat else PromptTemplate()

    def pair(self, query: EmbeddingInput, candidate: EmbeddingInput, has_chat: bool) -> EmbeddingInput:
        """Combines query and candidate to one input, with each image at its position in the query or candidate.

        Raises:
            UserError: if both have a video.
        """
        if query.video is not None and candidate.video is not None:
            raise UserError("rerank: query and candidate both have a video; at most one of them may")
        instruction = query.instruction or self.instruction
        images = (*query.images, *candidate.images)
        video = query.video or candidate.video
        sides = (_side(query, 0), _side(candidate, len(query.images)))
        if self.chat:
            return EmbeddingInput(DOCUMENT.join(sides), images, instruction or None, video)
        body = self.body.format(instruction=instruction, query=sides[0], document=sides[1])
        if has_chat:
            return EmbeddingInput(body, images, self.system, video)
        opening = f"{self.system}\n" if self.system else ""
        return EmbeddingInput(f"{opening}{body}{self.suffix}", images, None, video)


def _side(item: EmbeddingInput, begin: int) -> str:
    """Returns the text of query or candidate with its images as placeholders, numbered from `begin` + 1."""
    text = item.text or ""
    if PLACEHOLDER.search(text) or VIDEO_PLACEHOLDER in text:
        return PLACEHOLDER.sub(lambda match: f"<|image_{int(match[1]) + begin}|>", text).strip()
    media = [VIDEO_PLACEHOLDER] if item.video is not None else []
    media += [f"<|image_{begin + k}|>" for k in range(1, len(item.images) + 1)]
    parts = (text, "".join(media)) if item.text_first else ("".join(media), text)
    return " ".join(part for part in parts if part)
