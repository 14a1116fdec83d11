"""`generic`: any vision-language model that transformers loads, with the family's own processor.

Each example is processed on its own. Its token tensors are padded and stacked. All other tensors (pixel values, grids,
sizes) are packed in sequence, and `Batch.rows` records how many rows belong to each example.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import nn

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.media.videos import Frames
from vlm2vec.models import st_folder
from vlm2vec.models.backbones.base import MediaTokens
from vlm2vec.models.backbones.decoder import DecoderBackbone
from vlm2vec.models.backbones.final_norm import set_final_norm
from vlm2vec.models.backbones.hf_processor import current_names, load_processor
from vlm2vec.models.backbones.network import load_network
from vlm2vec.models.backbones.video_frames import FrameProcessor, metadata_of
from vlm2vec.models.checkpoints.tensors import check_weight_files
from vlm2vec.models.prompts import place_video, split_at_images
from vlm2vec.models.vision.host_sizes import sizes_on_host
from vlm2vec.models.vision.raw_pixels import REAL, RawPixels
from vlm2vec.models.vision.resolution import side_of
from vlm2vec.types import BARE_IMAGE_TOKEN, EmbeddingInput

DROPPED = "dropped"  # number of tokens of an example that truncation dropped
SLOT = ImageRef()  # the place of a video among the images
TOKEN_TENSORS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "position_ids",
    "cross_attention_mask",
)


class Generic(DecoderBackbone):
    """A model that AutoModel loads and the processor that its folder names.

    Settings (`options` of `load`; also any setting of the family's image processor, such as `max_pixels`):
        padding_side: "right" (default) or "left".
        image_backend: "pil" (default) or "torchvision", which is faster and resizes a little differently.
        num_frames: Frames sampled from a video (default 8).
        max_length: Truncates texts to this number of tokens, the prompt's end kept; a longer input with images is an
            error. Default: no limit.
        video: "native" (default) uses the family's own video inputs, if it has them; "images" passes frames as images.
        resolution: "low", "mid" or "high" limits images to about 336, 672 or 1344 pixels squared, by settings of
            the family's image processor. `max_pixels` is an alternative. Families with one image size reject both.
        positions: Rotary positions of images in families with multimodal positions (the Qwen-VL line). "text": as
            for text. "vision-start": multimodal if the prompt contains the vision-start token. "multimodal": always,
            as a plain forward of transformers 5. "auto" (default) is resolved at loading: "text" for weights that
            transformers before 4.47 wrote, whose plain forward had no other; else "vision-start".
        final_norm: true (default), or false for hidden states before the language model's final norm.
    """

    name: ClassVar[str] = "generic"
    media_tokens: ClassVar[Mapping[str, MediaTokens]] = {
        **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), ("<|image_pad|>", "<|video_pad|>")),
        "llava_onevision": ("<image>", "<video>"),
        **dict.fromkeys(("llava", "llava_next"), ("<image>", None)),
    }

    def __init__(self, model: nn.Module, processor: Any, settings: dict[str, Any]) -> None:
        super().__init__(model)
        self.processor, self.settings = processor, settings
        self.config: Any = model.config  # kept here, as the next: PEFT may wrap the model later
        self.rope_index: Any = getattr(model, "get_rope_index", None)
        if self.rope_index is not None and settings.get("positions", "auto") == "auto":
            self.settings = {**settings, "positions": _usual_positions(self.config)}
        self.lora_targets = _language_linears(model, self.language_model)
        self.host, self.accepted = sizes_on_host(model), set(inspect.signature(model.forward).parameters)
        self.num_frames = settings.get("num_frames", self.num_frames)
        self.reads_videos = FrameProcessor.serves(processor, self.accepted) and settings.get("video") != "images"
        if self.reads_videos:
            # Set on the class, which belongs to this processor alone: attributes of the object would be saved with it.
            type(processor).video_processor = FrameProcessor(processor.image_processor, self.num_frames)
        if side_of(settings) is not None and hasattr(self.config, "image_grid_pinpoints"):
            self.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints
        set_final_norm(self.language_model, settings.get("final_norm", True))
        self.image_token = str(processor.image_token)
        self.raw_pixels: RawPixels | None = None
        self._image_settings: dict[str, Any] = {}  # in place of the processor's own

    @classmethod
    def load(
        cls,
        source: str,
        dtype: torch.dtype,
        revision: str | None = None,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """Loads a folder or hub id; pickled weights and code from there only where allowed; see the class."""
        common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        options = current_names(options)
        try:
            check_weight_files(source, allow_pickle)
            processor = cls.load_processor(source, common, options)
            weights = {"dtype": dtype, "use_safetensors": None if allow_pickle else True, **common}
            return cls(load_network(source, weights), processor, options)
        except Exception as error:  # transformers and tokenizers raise many types, plain Exception among them
            raise UserError(f"{source}: cannot be loaded as a vision-language model: {first_line(error)}") from error

    @classmethod
    def load_processor(cls, source: str, common: dict[str, Any], options: dict[str, Any]) -> Any:
        """The family's processor.

        Args:
            source: A folder or hub id.
            common: Revision and trust.
            options: Settings of `load`.
        """
        return load_processor(source, common, options)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def embedding_dim(self) -> int:
        """Width of the language model, or of its config's `embedding_dim`, a projection that follows it."""
        return int(getattr(text := self.config.get_text_config(), "embedding_dim", text.hidden_size))

    def options(self) -> dict[str, Any]:
        """The settings given to `load`."""
        return dict(self.settings)

    @property
    def max_length(self) -> int | None:
        """The setting of the same name."""
        return self.settings.get("max_length")

    def limit_text(self, max_length: int) -> None:
        """Sets `max_length`, unless the user has set it."""
        self.settings = {"max_length": max_length, **self.settings}

    def collate(self, inputs: Sequence[EmbeddingInput]) -> Batch:
        """Token tensors [B, L, ...], padded on one side, and the family's packed image tensors."""
        return Batch.join(self.collate_each(inputs))

    def collate_each(self, inputs: Sequence[EmbeddingInput]) -> list[Batch]:
        """Each of these inputs as a batch of its own."""
        return [self._batch_of_one(self._example(item)) for item in inputs]

    def _batch_of_one(self, tensors: dict[str, torch.Tensor]) -> Batch:
        dropped = (int(tensors.pop(DROPPED)),) if DROPPED in tensors else ()
        packed = {name: torch.tensor([len(tensor)]) for name, tensor in tensors.items() if name not in TOKEN_TENSORS}
        fill, left = self.tokenizer.pad_token_id or 0, self.settings.get("padding_side") == "left"
        return Batch(tensors, packed, TOKEN_TENSORS, fill, left, dropped, self.host)

    def send_bytes(self) -> bool:
        """As in the base class. Families whose processor does more than scale, shift and pad return False."""
        return self._can_send_bytes

    @cached_property
    def _can_send_bytes(self) -> bool:
        def pixels(images: Sequence[Image.Image], settings: dict[str, Any]) -> torch.Tensor:
            self._image_settings = settings
            return self.collate([EmbeddingInput(images=tuple(map(ImageRef.of, images)))])["pixel_values"]

        with suppress(KeyError, TypeError):  # other tensor names, or a processor without these settings
            self.raw_pixels = RawPixels.of(pixels)
        self._image_settings = self.raw_pixels.settings if self.raw_pixels else {}
        return bool(self._image_settings)

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Hidden states [B, L, D], see setting `final_norm`."""
        return self.model(**self.model_inputs(batch), use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    def model_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Arguments of the network. Packed tensors without rows are left out."""
        dtype = next(self.model.parameters()).dtype
        used = {name: tensor for name, tensor in batch.tensors.items() if name not in batch.rows or len(tensor)}
        if self.raw_pixels is not None and "pixel_values" in used:
            used["pixel_values"] = self.raw_pixels.pixel_values(used["pixel_values"], used.pop(REAL, None))
        tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in used.items()}
        if self.rope_index is not None:
            tensors["position_ids"] = tensors["position_ids"].permute(2, 0, 1)
        return tensors

    def save_processor(self, folder: Path) -> None:
        """Writes tokenizer and image settings as transformers does."""
        self.processor.save_pretrained(folder)

    def save_model(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes weights and configuration as transformers does. The folder is then a complete model."""
        model: Any = self.model
        model.save_pretrained(folder, state_dict=state)

    def write_sentence_transformers(self, folder: Path, prompts: Mapping[str, str]) -> None:
        """Writes sentence-transformers' own modules if their vectors would equal ours, otherwise this package's module.

        Their modules always ask the model for positions, and the base for image sizes.
        """
        start = self._image_start()
        written = self.template.image + self.template.chat
        as_text = self.rope_index is not None and (self.settings.get("positions") == "text" or start not in written)
        other_grid = side_of(self.settings) is not None and hasattr(self.config, "image_grid_pinpoints")
        if as_text or "final_norm" in self.settings or (other_grid and hasattr(self.model, "peft_config")):
            return st_folder.write_own(folder, prompts)
        chat = st_folder.chat_template(self.template, self.image_token, start if self.rope_index is not None else "")
        st_folder.write_native(folder, chat, self.pooling, self.embedding_dim, prompts, self.max_length)

    def chat_template(self) -> str:
        """The chat template of the processor, or of the tokenizer, or ""."""
        return getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template or ""

    def _image_start(self) -> str:
        """The token before an image that gives it multimodal positions, see `_positions`; "" if none is needed."""
        start = getattr(self.config, "vision_start_token_id", None)
        return "" if start is None else str(self.tokenizer.convert_ids_to_tokens(start))

    def prompt(self, item: EmbeddingInput) -> tuple[str, list[int]]:
        """The prompt with the backbone's image tokens, and the positions of its images in order."""
        if self.template.chat:
            prompt, order = self.template.render_chat(item, self.tokenizer.special_tokens_map, self.image_token)
        else:
            pieces = split_at_images(self.template.render(item))
            prompt = "".join(self.image_token if isinstance(piece, int) else piece for piece in pieces)
            order = [piece for piece in pieces if isinstance(piece, int)]
        return (prompt if item.images else prompt.replace(BARE_IMAGE_TOKEN, self.image_token)), order

    def read(self, prompt: str, images: list[Any], video: Frames | None = None) -> Mapping[str, Any]:
        """Tensors that the family's processor makes of one prompt, its images and its video."""
        # A prompt that starts with the begin token (chat templates write it) gets no second one, as in transformers.
        opened = prompt.startswith(self.tokenizer.bos_token or "\0")
        more: dict[str, Any] = {"add_special_tokens": False} if opened else {}
        if self._image_settings:
            more["images_kwargs"] = self._image_settings
        if self.max_length is not None and not images and video is None:
            more |= {"truncation": True, "max_length": self.max_length}
        if video is not None:
            more["videos"] = [[frame.load() for frame in video.images]]
            more["video_metadata"] = [metadata_of(video)]
        nested = [images] if images else None  # several images of one prompt, not one image each of several prompts
        output: Mapping[str, Any] = self.processor(text=[prompt], images=nested, return_tensors="pt", **more)
        return output

    def _example(self, item: EmbeddingInput) -> dict[str, torch.Tensor]:
        video = None if item.video is None else item.video.sample(self.num_frames)
        slotted = item if item.video is None else place_video(item, [SLOT])
        prompt, order = self.prompt(slotted)
        if video is not None:
            prompt, order = self._with_video_token(prompt, order)
        images = [slotted.images[position].load() for position in order]
        try:
            output = self.read(prompt, images) if video is None else self.read(prompt, images, video)
        except ValueError as error:  # an image of extreme shape, or the backbone's image token in the text
            about = ", ".join([repr(prompt[:60]), *map(str, item.images), *([str(item.video)] if video else [])])
            raise UserError(f"{about}: {str(error).splitlines()[0]}") from error
        tensors = {name: value for name, value in output.items() if name in self.accepted}
        if dropped := self._truncated(tensors, prompt, item):
            tensors[DROPPED] = torch.tensor(dropped)
        if self.raw_pixels is not None and "pixel_values" in tensors:
            tensors |= self.raw_pixels.packed(tensors["pixel_values"])
        if tensors["input_ids"].shape[1] == 0:
            raise UserError("input has an empty text and no image; expected at least one of them")
        return tensors if self.rope_index is None else tensors | {"position_ids": self._positions(tensors)}

    def _truncated(self, tensors: dict[str, torch.Tensor], prompt: str, item: EmbeddingInput) -> int:
        """Repairs an input that reached `max_length`, and returns the number of tokens that truncation dropped.

        The end of the chat template is written over the last tokens, as sentence-transformers does.

        Raises:
            UserError: for an input with images or a video, whose tokens cannot be cut.
        """
        ids_1L, limit = tensors["input_ids"], self.max_length
        if limit is None or ids_1L.shape[1] < limit:
            return 0
        if ids_1L.shape[1] > limit:
            raise UserError(f"input of {ids_1L.shape[1]} tokens: {self.name} reads {limit} (setting max_length)")
        dropped = len(self._ids(prompt)) - limit
        if dropped > 0 and self.template.chat:
            ends = [self._ids(self.prompt(replace(item, text=filler))[0])[::-1] for filler in ("0", "1 2 3 4")]
            size = next((i for i, (a, b) in enumerate(zip(*ends, strict=False)) if a != b), 0)
            end = ends[0][:size][::-1][-limit:]
            ids_1L[0, limit - len(end) :] = torch.tensor(end, dtype=ids_1L.dtype)
        return max(dropped, 0)

    def _ids(self, prompt: str) -> list[int]:
        opened = prompt.startswith(self.tokenizer.bos_token or "\0")
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=not opened)["input_ids"]
        return ids

    def _with_video_token(self, prompt: str, order: list[int]) -> tuple[str, list[int]]:
        """Replaces the first image's token, which stands for the video, by the family's video token."""
        pieces = prompt.split(self.image_token)
        place = order.index(0) + 1
        before, after = self.image_token.join(pieces[:place]), self.image_token.join(pieces[place:])
        return f"{before}{self.processor.video_token}{after}", [position for position in order if position != 0]

    def _positions(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Rotary positions of one example, [1, L, 3]."""
        ids, scheme = tensors["input_ids"], self.settings["positions"]
        start = getattr(self.config, "vision_start_token_id", None)
        multimodal = scheme == "multimodal" or (scheme == "vision-start" and (start is None or start in ids))
        if not multimodal or not {"image_grid_thw", "video_grid_thw"} & set(tensors):
            return torch.arange(ids.shape[1]).view(1, -1, 1).expand(1, -1, 3)
        return self.rope_index(**tensors)[0].permute(1, 2, 0)  # type: ignore[no-any-return]


def _usual_positions(config: Any) -> str:
    """The position scheme with which the published vectors of these weights were made, see `Generic`."""
    major, minor = (int(part) for part in str(config.transformers_version or "5.0").split(".")[:2])
    return "text" if (major, minor) < (4, 47) else "vision-start"


def first_line(error: Exception) -> str:
    """The first line of an error message, with the next one if it ends in a colon."""
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {rest[0].strip()}" if rest and first.rstrip().endswith(":") else first


def _language_linears(model: nn.Module, language_model: nn.Module) -> str:
    """A pattern of all linear layers in the language model, none of the vision encoder."""
    path: str = next(name for name, module in model.named_modules() if module is language_model)
    linears = (name for name, module in language_model.named_modules() if isinstance(module, nn.Linear))
    leaves = {name.rpartition(".")[2] for name in linears}
    return path.replace(".", r"\.") + rf"\..*\.({'|'.join(sorted(leaves))})"
