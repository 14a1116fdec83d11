"""The contract of all model families, `Backbone`. `decoder.py` has the one of families with token states to pool.

Shapes: B examples, L tokens, D embedding dim.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save_file
from torch import nn

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError, shown
from vlm2vec.models import st_folder
from vlm2vec.models.prompts import VIDEO_PLACEHOLDER, PromptTemplate, place_video
from vlm2vec.models.vision.vision_cache import VisionCache
from vlm2vec.types import EmbeddingInput

WEIGHTS_FILE = "model.safetensors"
logger = logging.getLogger(__name__)
_COUNTING = threading.Lock()  # of all backbones: an attribute could not be copied with its backbone
MediaTokens = tuple[str, str | None]
NUMBERED: MediaTokens = ("<|image_{k}|>", None)


class Backbone(nn.Module, ABC):
    """A network and its processor: inputs -> `Batch` -> one vector per input.

    Dual encoders implement this contract. Families that pool the hidden states of tokens implement `DecoderBackbone`.

    Attributes:
        name: Key in the registry: the `model_type` of the HF config, or a built-in's name.
        lora_targets: Names of the linear layers that LoRA adapts by default.
        template: How inputs without placeholders become prompts.
        trained_modules: Names of modules that LoRA runs train in full (new modules without pretrained weights).
        media_tokens: By family, the tokens of prompts that mark an image and a video; None: frames are images.
            Families that are not listed have no such token, or one that their folder names.
        model: The network. PEFT wraps it in place.
        num_frames: Frames sampled from a video, evenly spaced.
        quantized: Storage format of the weights, if `Embedder.from_pretrained(quantize=...)` changed it.
        generates: Whether a language-model head can read the states.
        reads_videos: Whether the family has video inputs of its own. Others get the frames as images.
        vision_cache: Outputs of the frozen vision encoder by image content, see `cache_images`.
        num_truncated: Inputs so far whose text was longer than `max_length`.
    """

    name: ClassVar[str]
    lora_targets: str | list[str] = "all-linear"
    trained_modules: ClassVar[list[str]] = []
    media_tokens: ClassVar[Mapping[str, MediaTokens]] = {}
    template: PromptTemplate = PromptTemplate()
    model: nn.Module
    num_frames: int = 8
    reads_videos: bool = False
    generates: ClassVar[bool] = True
    quantized: str = ""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.vision_cache: VisionCache | None = None
        self.num_truncated = 0

    @classmethod
    @abstractmethod
    def load(cls, source: str, dtype: torch.dtype, **options: Any) -> Self:
        """Loads weights and processor from a folder or hub id. `options` are the family's own settings."""

    @abstractmethod
    def collate(self, inputs: Sequence[EmbeddingInput]) -> Batch:
        """`process` of inputs whose videos are already images, unless `reads_videos`."""

    @abstractmethod
    def forward(self, batch: Batch) -> torch.Tensor:
        """One vector per example, not normalized, shape [B, D]."""

    @property
    @abstractmethod
    def embedding_dim(self) -> int:
        """Length of the vectors; of one hidden state where several poolings are concatenated."""

    @property
    def pooled_dim(self) -> int:
        """Length of what `forward` returns."""
        return self.embedding_dim

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The tokenizer that `process` uses, a tokenizer of transformers."""

    @abstractmethod
    def save_processor(self, folder: Path) -> None:
        """Writes tokenizer and image settings to a checkpoint folder."""

    @property
    def pooling(self) -> str:
        """Name of the pooling of token states. "last" for families without token states, which accept no other."""
        return "last"

    @pooling.setter
    def pooling(self, name: str) -> None:
        if name != "last":
            raise UserError(f"pooling {shown(name)}: {self.name} has no token states to pool; remove the setting")

    @property
    def attention(self) -> str:
        """Attention between tokens: "causal" (the family's own mask) or "bidirectional" (all tokens but padding)."""
        return "causal"

    @attention.setter
    def attention(self, name: str) -> None:
        if name != "causal":
            raise UserError(f"attention {shown(name)}: {self.name} is not a decoder; remove the setting")

    @property
    def language_model(self) -> nn.Module:
        """The language model inside the network, with or without an adapter.

        Raises:
            UserError: if the network does not name it. transformers then returns the whole network, which is an error.
        """
        get_decoder = getattr(self.model, "get_decoder", None)
        decoder = None if get_decoder is None else get_decoder()
        if decoder is None or not _is_proper_part(decoder, self.model):
            raise UserError(f"{self.name}: the network does not say which part of it is the language model")
        found: nn.Module = decoder
        return found

    def language_parts(self) -> list[nn.Module]:
        """The modules that hold the parameters of the language model, input embeddings included.

        Every other parameter belongs to the vision encoder or the projector.

        Raises:
            UserError: as `language_model`.
        """
        model: Any = self.model
        return [self.language_model, model.get_input_embeddings()]

    def process(self, inputs: Sequence[EmbeddingInput]) -> Batch:
        """Token ids and pixel values of these inputs as tensors on the CPU. Frames of videos are sampled here."""
        batch = self.collate(self._with_frames(inputs))
        self.note_truncated(batch)
        return batch

    def process_each(self, inputs: Sequence[EmbeddingInput]) -> list[Batch]:
        """`process` of each input as a batch of its own, without `note_truncated`. `Batch.join` combines them."""
        return self.collate_each(self._with_frames(inputs))

    @property
    def max_length(self) -> int | None:
        """Maximum number of tokens that the model reads of a text; the rest is dropped. None: no limit."""
        return None

    def limit_text(self, max_length: int) -> None:
        """Truncates inputs to this number of tokens, as the folder that is being loaded asks for.

        Raises:
            UserError: if the family does not support it.
        """
        if self.max_length is None or self.max_length > max_length:
            raise UserError(f"{self.name}: truncation to {max_length} tokens is not supported")

    def note_truncated(self, batch: Batch) -> None:
        """Counts the examples of a batch whose text was truncated, and logs a warning for the first of all."""
        if not any(batch.dropped):
            return
        with _COUNTING:
            is_first = self.num_truncated == 0
            self.num_truncated += sum(count > 0 for count in batch.dropped)
        if is_first:
            logger.warning(
                "an input is %d text tokens too long: %s reads the first %s (Embedder.max_length) and drops the rest; "
                "Embedder.num_truncated counts such inputs, which are not reported again",
                max(batch.dropped), self.name, self.max_length,
            )  # fmt: skip

    def collate_each(self, inputs: Sequence[EmbeddingInput]) -> list[Batch]:
        """`collate` of each input as a batch of its own."""
        whole = self.collate(inputs)
        return [whole.slice(i, i + 1) for i in range(len(inputs))]

    def costs(self, batch: Batch) -> list[int]:
        """Cost of each example in tokens, visual tokens or patches included. Budgets of tokens count these."""
        return batch.lengths()

    def options(self) -> dict[str, Any]:
        """The settings that `load` needs to build the same model again. They are saved in `embedder.json`."""
        return {}

    def cache_images(self, folder: Path | None = None) -> bool:
        """Caches outputs of a frozen vision encoder by image content, in `folder` across jobs.

        Returns:
            False if the family has no encoder whose outputs can be cached.
        """
        return False

    def send_bytes(self) -> bool:
        """Makes `process` return pixel values as bytes, which the model scales and shifts on its device.

        Returns:
            False, and nothing changes, if the result would differ from the processor's.
        """
        return False

    def save_model(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes all weights of a model without an adapter.

        Args:
            folder: An existing one.
            state: Weights to write instead of those in memory.
        """
        named = self.model.state_dict() if state is None else state
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def write_sentence_transformers(self, folder: Path, prompts: Mapping[str, str]) -> None:
        """Makes a saved folder load in sentence-transformers, by default with this package's own module."""
        st_folder.write_own(folder, prompts)

    def chat_template(self) -> str:
        """The Jinja chat template that came with the processor, or ""."""
        return ""

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes activations in the backward pass: less memory, about a third more time.

        Where nothing outside the language model is trained, the rest is left as it is. Its outputs then need no
        gradient, so a frozen vision encoder runs once per image and keeps no activations. Call it after adapters are
        added and parameters frozen.

        Raises:
            UserError: if the family's network does not support it.
        """
        enable = getattr(self.model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise UserError(f"{self.name}: gradient_checkpointing is not supported; set it to false")
        enable()
        for module in self.model.modules():  # these hooks would make image features require a gradient, too
            for hook in getattr(module, "_require_grads_hooks", []):
                hook.remove()
        try:
            language = {id(module) for part in self.language_parts() for module in part.modules()}
            outside: list[Any] = [module for module in self.model.modules() if id(module) not in language]
        except UserError:  # the network does not say which part is its language model
            return
        if not any(p.requires_grad for module in outside for p in module.parameters(recurse=False)):
            for module in outside:
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False

    def _with_frames(self, inputs: Sequence[EmbeddingInput]) -> Sequence[EmbeddingInput]:
        """The inputs with their videos as images, unless the family reads videos."""
        for item in inputs:
            if item.video is None and VIDEO_PLACEHOLDER in (item.text or ""):
                raise UserError(f"prompt {shown(item.text or '')} has {VIDEO_PLACEHOLDER} but the input has no video")
        if self.reads_videos:
            return inputs
        return [item if item.video is None else self._as_images(item) for item in inputs]

    def _as_images(self, item: EmbeddingInput) -> EmbeddingInput:
        assert item.video is not None
        return place_video(item, item.video.sample(self.num_frames).images)


def _is_proper_part(part: nn.Module, whole: nn.Module) -> bool:
    """Whether `whole` has parameters that `part` lacks."""
    inside = {id(parameter) for parameter in part.parameters()}
    return any(id(parameter) not in inside for parameter in whole.parameters())
