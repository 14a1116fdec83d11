"""From an input to the prompt of a model, by the same rules for every backbone.

If the text contains the canonical placeholder `<|image_1|>`, it is used verbatim as the prompt (MMEB rows are published
this way). Otherwise the template builds the prompt: images, then instruction, then text. A template may instead be a
Jinja chat template, as published embedding models have one; a placeholder then marks the position of an image in the
turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vlm2vec.errors import UserError, shown
from vlm2vec.media.images import ImageRef
from vlm2vec.types import EmbeddingInput

VIDEO_PLACEHOLDER = "<|video_1|>"
PLACEHOLDER = re.compile(r"<\|image_(\d+)\|>")
CHAT_IMAGE = "<|image_{{ part.index }}|>"  # where a chat template of ours, written for any backbone, has an image


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """Joins the parts of an input that carries no placeholder.

    Attributes:
        image: Written before the rest for each image; `{image}` is the placeholder.
        instruction: Wraps the instruction.
        separator: Between instruction and text.
        suffix: Closes the prompt, text-only ones excepted.
        chat: A Jinja chat template that writes the whole prompt; its image tokens are the backbone's own or
            `CHAT_IMAGE`. Empty: the four parts above do.
        keeps_order: Whether a chat turn has text and images in the order in which the input gives them. Default: images
            first, as the published models are trained.
        instruction_turn: Where a chat template gets the instruction: "system", or "user" (before the text, with
            `separator` between them).
    """

    image: str = "{image}\n"
    instruction: str = "{instruction}"
    separator: str = " "
    suffix: str = "\n"
    chat: str = ""
    keeps_order: bool = False
    instruction_turn: str = "system"

    def settings(self) -> dict[str, Any]:
        """The fields as JSON values. Those added later are left out at their default, so older hashes stay valid."""
        added = ("keeps_order", "instruction_turn")
        plain = type(self)()
        return {
            name: value for name, value in asdict(self).items() if name not in added or value != getattr(plain, name)
        }

    def render(self, item: EmbeddingInput) -> str:
        """The canonical prompt, with placeholders `<|image_k|>` instead of the backbone's image tokens.

        Raises:
            UserError: if placeholders and images do not match.
        """
        text = item.text or ""
        if self.chat:
            prompt = self.render_chat(item, {})[0]
        elif PLACEHOLDER.search(text):
            prompt = text
        else:
            images = [self.image.format(image=f"<|image_{k}|>") for k in range(1, len(item.images) + 1)]
            instruction = self.instruction.format(instruction=item.instruction) if item.instruction else ""
            words = self.separator.join(part for part in (instruction, text) if part)
            prompt = "".join(images) + words + (self.suffix if images and words else "")
        _check_placeholders(prompt, len(item.images))
        return prompt

    def render_chat(
        self, item: EmbeddingInput, special_tokens: dict[str, Any], image_token: str = CHAT_IMAGE
    ) -> tuple[str, list[int]]:
        """Renders the prompt with the chat template; returns it with the indices of its images, in order.

        Args:
            item: Its instruction is the system turn, unless `instruction_turn` says otherwise; the rest is the user's.
            special_tokens: Variables of the template, such as `bos_token`.
            image_token: Replaces `CHAT_IMAGE`.

        Raises:
            UserError: if placeholders and images do not match, or the template refuses the input.
        """
        from jinja2.exceptions import TemplateError

        from vlm2vec.models.transformers_internals import render_chat

        if item.instruction and self.instruction_turn == "user" and not PLACEHOLDER.search(item.text or ""):
            words = self.separator.join(part for part in (item.instruction, item.text) if part)
            item = replace(item, text=words, instruction=None)
        messages, images = chat_messages(item, self.keeps_order)
        try:
            chat = self.chat.replace(CHAT_IMAGE, image_token)
            return render_chat(messages, chat, special_tokens), images
        except TemplateError as error:
            raise UserError(f"input {shown(item.text or '')}: the chat template refuses it: {error}") from error


def with_variables(chat: str, variables: Mapping[str, Any]) -> str:
    """A chat template with fixed values of its variables, such as `add_generation_prompt`.

    Args:
        chat: A Jinja chat template.
        variables: JSON values by name.

    Raises:
        UserError: for a variable that the template does not use.
    """
    from jinja2 import TemplateSyntaxError

    from vlm2vec.models.transformers_internals import template_variables

    try:
        used = template_variables(chat) if variables else set()
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid Jinja: {error}") from error
    if unknown := sorted(set(variables) - used):
        raise UserError(f"setting {unknown[0]} of the chat template: the template has no such variable")
    # One statement a line: the line breaks after statements are dropped, as transformers sets Jinja up.
    lines = [f"{{% set {name} = {_literal(value)} %}}\n" for name, value in variables.items()]
    return "".join(lines) + chat


def _literal(value: Any) -> str:
    """A JSON value as a Jinja expression."""
    if value is None or isinstance(value, bool | int | float):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(part)}' for key, part in value.items())}}}"
    return repr(str(value))


def chat_messages(item: EmbeddingInput, keep_order: bool = False) -> tuple[list[dict[str, Any]], list[int]]:
    """An input as chat turns (instruction: system; the rest: user), and its images' positions in order.

    Args:
        item: The input.
        keep_order: Puts the text first where the input gives it first; otherwise the images come first.

    Raises:
        UserError: if placeholders and images do not match in number.
    """
    text = item.text or ""
    words: list[str | int] = [text] if text else []
    images: list[str | int] = list(range(len(item.images)))
    pieces = words + images if keep_order and item.text_first else images + words
    if PLACEHOLDER.search(text):
        _check_placeholders(text, len(item.images))
        pieces = [piece if isinstance(piece, int) else piece.strip() for piece in split_at_images(text)]
    content = [
        {"type": "image", "index": piece + 1} if isinstance(piece, int) else {"type": "text", "text": piece}
        for piece in pieces
        if piece != ""
    ]
    system = [{"role": "system", "content": [{"type": "text", "text": item.instruction}]}] if item.instruction else []
    return [*system, {"role": "user", "content": content}], [piece for piece in pieces if isinstance(piece, int)]


def place_video(item: EmbeddingInput, slots: Sequence[ImageRef]) -> EmbeddingInput:
    """An input with these images in the place of its video: before the others, or where the text says.

    Raises:
        UserError: if the text has placeholders of images but not of the video.
    """
    text = item.text
    if text and (VIDEO_PLACEHOLDER in text or PLACEHOLDER.search(text)):
        if text.count(VIDEO_PLACEHOLDER) != 1:
            raise UserError(
                f"prompt {shown(text)}: expected {VIDEO_PLACEHOLDER} exactly once, at the position of the video"
            )
        text = PLACEHOLDER.sub(lambda match: f"<|image_{int(match[1]) + len(slots)}|>", text)
        text = text.replace(VIDEO_PLACEHOLDER, "".join(f"<|image_{k}|>" for k in range(1, len(slots) + 1)))
    return replace(item, text=text, images=(*slots, *item.images), video=None)


def _check_placeholders(prompt: str, num_images: int) -> None:
    named = {int(match) for match in PLACEHOLDER.findall(prompt)}
    if named != set(range(1, num_images + 1)):
        raise UserError(
            f"prompt {shown(prompt)} has placeholders of images {sorted(named)} but {num_images} images; "
            "expected one <|image_k|> for each image, counted from 1"
        )


def split_at_images(prompt: str) -> list[str | int]:
    """Splits a canonical prompt into text pieces (str) and image positions (int, from 0), in order."""
    parts = PLACEHOLDER.split(prompt)
    pieces: list[str | int] = [int(part) - 1 if i % 2 else part for i, part in enumerate(parts)]
    return [piece for piece in pieces if piece != ""]


def order_of_images(prompt: str) -> list[int]:
    """Positions (from 0) of the images in a canonical prompt, in the order of their placeholders."""
    return [piece for piece in split_at_images(prompt) if isinstance(piece, int)]
