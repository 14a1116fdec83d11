"""Convert the inputs of every request dialect to `EmbeddingInput`, including their images."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from vlm2vec.media.data_uris import base64_bytes, data_uri_bytes, is_data_uri
from vlm2vec.media.images import ImageRef
from vlm2vec.serving.fetch import Fetcher
from vlm2vec.serving.guards import read_below
from vlm2vec.serving.refusals import Refusal
from vlm2vec.serving.schemas import ImagePart, ImageUrlPart, InputObject, Message, TextPart
from vlm2vec.serving.settings import ServeSettings
from vlm2vec.types import EmbeddingInput

Item = EmbeddingInput | Refusal


class InputReader:
    """Reads the inputs of every dialect.

    Args:
        settings: Limits, and the places from which images may be read.
        tokenizer: The model's tokenizer, for inputs that are token ids; None if the model has none.
        prompts: The model's instructions for "query" and "document".
    """

    def __init__(self, settings: ServeSettings, tokenizer: Any, prompts: dict[str, str]) -> None:
        self.settings, self.tokenizer, self.prompts = settings, tokenizer, prompts
        self.fetcher = Fetcher(settings.allow_urls, settings.max_image_bytes)

    async def all(self, values: Sequence[Any], instruction: str | None, image: bool = False) -> list[Item]:
        """Read a list of strings, token ids or objects.

        Args:
            values: Values from the request.
            instruction: Instruction of inputs without their own.
            image: Whether strings are images instead of text.
        """
        return list(await asyncio.gather(*(self.one(value, instruction, image) for value in values)))

    async def one(self, value: Any, instruction: str | None = None, image: bool = False) -> Item:
        """Read one input: a string, token ids or an object."""
        if isinstance(value, InputObject):
            return await self._object(value, instruction)
        if isinstance(value, list):
            return self._tokens(value, instruction)
        if image or is_data_uri(value):
            return await self._with_images(None, [value], instruction)
        return EmbeddingInput(text=value, instruction=instruction)

    async def messages(self, messages: Sequence[Message], instruction: str | None) -> Item:
        """Read a chat as one input: system turns are the instruction; other turns give text and images."""
        texts: list[str] = []
        told: list[str] = []
        images: list[str] = []
        text_first = False
        for message in messages:
            parts = (
                [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
            )
            for part in parts:
                if isinstance(part, TextPart):
                    if part.text:  # an assistant turn has no text
                        (texts if message.role == "user" else told).append(part.text)
                        text_first = text_first or (message.role == "user" and not images)
                else:
                    images.append(image_of(part))
        text = "\n".join(texts) or None
        return await self._with_images(text, images, "\n".join(told) or instruction, text_first)

    async def parts(self, parts: Iterable[Any], instruction: str | None) -> Item:
        """Read content parts as one input, in Cohere's format."""
        parts = list(parts)
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        images = [image_of(part) for part in parts if not isinstance(part, TextPart)]
        text_first = bool(parts) and isinstance(parts[0], TextPart)
        return await self._with_images("\n".join(texts) or None, images, instruction, text_first)

    def task_instruction(self, task: str | None) -> str | None:
        """Return the model's own instruction for a task name that contains query, document or passage."""
        words = (task or "").lower()
        kind = "query" if "query" in words else "document" if ("document" in words or "passage" in words) else ""
        return self.prompts.get(kind) or None

    async def _object(self, value: InputObject, instruction: str | None) -> Item:
        images = value.images or ([] if value.image is None else [value.image])
        names = [image if isinstance(image, str) else image.url for image in images]
        return await self._with_images(value.text, names, value.instruction or instruction)

    def _tokens(self, ids: list[int], instruction: str | None) -> Item:
        if self.tokenizer is None:
            return Refusal(400, "tokens_not_supported", "this model does not accept token ids; send text")
        if not ids or max(ids) >= len(self.tokenizer):
            return Refusal(
                400,
                "bad_tokens",
                f"token id out of range; expected ids of this model's tokenizer, 0 to {len(self.tokenizer) - 1}",
            )
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return EmbeddingInput(text=text, instruction=instruction)

    async def _with_images(
        self, text: str | None, names: list[str], instruction: str | None, text_first: bool = False
    ) -> Item:
        if len(names) > self.settings.max_images:
            return Refusal(
                413,
                "too_many_images",
                f"the input has {len(names)} images; at most {self.settings.max_images} are allowed",
            )
        images = await asyncio.gather(*map(self._image, names))
        refusal = next((image for image in images if isinstance(image, Refusal)), None)
        found = tuple(image for image in images if isinstance(image, ImageRef))
        return refusal or EmbeddingInput(text, found, instruction, text_first=text_first and bool(text and found))

    async def _image(self, name: str) -> ImageRef | Refusal:
        """Read an image: a data URI, a URL, bare base64, or a path below the media root."""
        scheme, separator, _ = name[:32].strip().partition(":")
        if is_data_uri(name) or (scheme.lower() == "data" and separator):
            data = await asyncio.to_thread(data_uri_bytes, name)
            if data is None:
                return Refusal(400, "bad_data_uri", "not a valid data URI; expected data:image/...;base64,...")
            return ImageRef(data=data)
        if scheme.lower() in ("http", "https") and separator:
            return await self.fetcher.image(name.strip())
        if "://" in name[:32]:
            return Refusal(
                403, "scheme_not_allowed", "unsupported URL scheme of an image; expected data:, http: or https:"
            )
        if (
            len(name) > 64 and (decoded := await asyncio.to_thread(base64_bytes, name)) is not None
        ):  # images are longer than 64 characters; paths rarely are, and rarely parse as base64
            return ImageRef(data=decoded)
        return await asyncio.to_thread(read_below, self.settings.media_root, name, self.settings.max_image_bytes)


def image_of(part: ImageUrlPart | ImagePart) -> str:
    """The data URI, URL or path in a content part."""
    where = part.image_url if isinstance(part, ImageUrlPart) else part.image
    return where if isinstance(where, str) else where.url
