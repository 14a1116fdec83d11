"""The prompt that a model family reads of an input, written without weights or a processor.

Prompts are shown before the family's processor expands each image or video token into visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm2vec.errors import UserError, did_you_mean
from vlm2vec.files import read_object
from vlm2vec.media.images import ImageRef
from vlm2vec.media.videos import VideoRef
from vlm2vec.models import st_reading
from vlm2vec.models.checkpoints import adapters, hub, known
from vlm2vec.models.checkpoints.folder import EMBEDDER_FILE, read_embedder_file
from vlm2vec.models.checkpoints.replaced import refuse_replaced
from vlm2vec.models.prompts import PLACEHOLDER, PromptTemplate, place_video
from vlm2vec.models.registry import BUILT_IN, families_with_tokens, media_tokens
from vlm2vec.planning.geometry import config_of
from vlm2vec.types import BARE_IMAGE_TOKEN, EmbeddingInput

DEFAULT_FAMILY = "qwen2_vl"
NUM_FRAMES = 8
SLOT = ImageRef()  # takes the place of a native video among the images


@dataclass(frozen=True)
class PromptFormat:
    """How a family writes an input.

    Attributes:
        family: `model_type` of its configuration, or a built-in name.
        template: For inputs without placeholders.
        num_frames: Frames of a video that is not sampled yet.
        special_tokens: Variables of a chat template, such as `bos_token`.
        tokens: Image token and video token; video None: frames are read as images. Default: those of the family.
    """

    family: str = DEFAULT_FAMILY
    template: PromptTemplate = field(default_factory=PromptTemplate)
    num_frames: int = NUM_FRAMES
    special_tokens: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[str, str | None] | None = None

    @cached_property
    def media_tokens(self) -> tuple[str, str | None]:
        """Image token and video token.

        Raises:
            UserError: for a family whose folders name its tokens.
        """
        if found := self.tokens or media_tokens(self.family):
            return found
        known = families_with_tokens()
        near = did_you_mean(self.family, known) or ";"
        raise UserError(
            f"family {self.family}: its image tokens are unknown{near} give --model with a folder, "
            f"or one of the families {', '.join(known)}"
        )

    def write(self, item: EmbeddingInput) -> tuple[str, list[ImageRef | VideoRef]]:
        """The prompt with the family's tokens, and the images and videos in their order.

        Raises:
            UserError: if placeholders and images do not match in number.
        """
        image_token, video_token = self.media_tokens
        placed, video = item, item.video
        if video is not None:
            slots = [SLOT] if video_token else video.sample(self.num_frames).images
            placed = place_video(item, slots)
        prompt, order = self._canonical(placed)
        if not placed.images:
            prompt = prompt.replace(BARE_IMAGE_TOKEN, image_token.format(k=1))
        media = [placed.images[position] for position in order]
        if video is None or video_token is None:
            return PLACEHOLDER.sub(lambda found: image_token.format(k=found[1]), prompt), list(media)
        prompt = prompt.replace("<|image_1|>", video_token)
        return PLACEHOLDER.sub(image_token, prompt), [video if ref is SLOT else ref for ref in media]

    def _canonical(self, item: EmbeddingInput) -> tuple[str, list[int]]:
        if self.template.chat:
            image_token, prompt_and_order = self.media_tokens[0], self.template.render_chat(item, self.special_tokens)
            prompt, order = prompt_and_order
            if not PLACEHOLDER.search(prompt):  # the template of another library writes the family's own token
                pieces = prompt.split(image_token)
                named = [f"<|image_{position + 1}|>" for position in order]
                prompt = pieces[0] + "".join(a + b for a, b in zip(named, pieces[1:], strict=False))
            return prompt, order
        prompt = self.template.render(item)
        return prompt, [int(number) - 1 for number in PLACEHOLDER.findall(prompt)]


def format_of(model: str) -> PromptFormat:
    """The prompt format of a model: a built-in, a checkpoint folder or the hub id of a known checkpoint.

    Raises:
        UserError: if its configuration is not at hand, or its family's tokens are not known.
    """
    refuse_replaced(model)
    folder = hub.local_folder(model)
    if (folder / EMBEDDER_FILE).is_file():
        saved = read_embedder_file(folder)
        family = _family_of(saved.base if saved.adapter or saved.base in BUILT_IN else str(folder))
        return _format(family, PromptTemplate(**saved.template), folder, saved.options)
    row = known.find(model)
    if row is not None:
        return _format(row.family, known.template_of(row, _chat_of(folder)) or PromptTemplate(), folder, row.options)
    if st_reading.read_folder(folder):
        raise UserError(f"{folder}: a sentence-transformers folder, whose prompts are written while it encodes")
    adapter = adapters.find_adapter(str(folder))
    return _format(_family_of(adapters.base_of(adapter)[0] if adapter else str(folder)), PromptTemplate(), folder, {})


def _chat_of(folder: Path) -> str:
    """The chat template of a folder; "" if it has no file of its own."""
    file = folder / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _format(family: str, template: PromptTemplate, folder: Path, options: dict[str, Any]) -> PromptFormat:
    settings = read_object(folder / "tokenizer_config.json")
    special = {name: value for name, value in settings.items() if name.endswith("_token") and isinstance(value, str)}
    return PromptFormat(family, template, int(options.get("num_frames", NUM_FRAMES)), special)


def _family_of(base: str) -> str:
    if base in BUILT_IN:
        return base
    row = known.find(base)
    return row.family if row else str(config_of(base).get("model_type"))
