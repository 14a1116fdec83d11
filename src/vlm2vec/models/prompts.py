"""How an input becomes the prompt that a model reads; the same rule for every backbone.

A text with the canonical placeholder `<|image_1|>` is the whole prompt, verbatim (MMEB rows are published so).
Any other input is written out by the template: pictures, then instruction, then text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlm2vec.errors import UserError
from vlm2vec.types import EmbeddingInput

PLACEHOLDER = re.compile(r"<\|image_(\d+)\|>")


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """Joins the parts of an input that carries no placeholder.

    Attributes:
        image: What stands before the rest for each picture; `{image}` is the placeholder.
        instruction: Wraps the instruction.
        separator: Between instruction and text.
        suffix: Closes the prompt, text-only ones excepted.
    """

    image: str = "{image}\n"
    instruction: str = "{instruction}"
    separator: str = " "
    suffix: str = "\n"

    def render(self, item: EmbeddingInput) -> str:
        """The canonical prompt: placeholders `<|image_k|>` not yet replaced by a backbone's own token.

        Raises:
            UserError: if placeholders and pictures do not match in number.
        """
        text = item.text or ""
        if PLACEHOLDER.search(text):
            prompt = text
        else:
            pictures = [self.image.format(image=f"<|image_{k}|>") for k in range(1, len(item.images) + 1)]
            instruction = self.instruction.format(instruction=item.instruction) if item.instruction else ""
            words = self.separator.join(part for part in (instruction, text) if part)
            prompt = "".join(pictures) + words + (self.suffix if pictures and words else "")
        named = {int(match) for match in PLACEHOLDER.findall(prompt)}
        if named != set(range(1, len(item.images) + 1)):
            raise UserError(
                f"prompt {prompt[:60]!r} names pictures {sorted(named)} but has {len(item.images)}; "
                "expected one <|image_k|> for each picture, counted from 1"
            )
        return prompt


def split_at_pictures(prompt: str) -> list[str | int]:
    """Cuts a canonical prompt into text pieces (str) and picture positions (int, from 0), in order."""
    parts = PLACEHOLDER.split(prompt)
    pieces: list[str | int] = [int(part) - 1 if i % 2 else part for i, part in enumerate(parts)]
    return [piece for piece in pieces if piece != ""]
