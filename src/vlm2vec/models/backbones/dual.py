"""Dual encoders of transformers: one vector of the text, one of the images, and their sum for both.

The MMEB paper scores CLIP, SigLIP, OpenCLIP and BLIP-2 this way: the models' own features, added with equal weights,
without instructions. UniIR calls it score fusion.

Shapes: B examples, N images, L tokens, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.models import st_folder
from vlm2vec.models.backbones.base import Backbone
from vlm2vec.models.checkpoints.tensors import check_weight_files
from vlm2vec.models.prompts import PLACEHOLDER
from vlm2vec.types import BARE_IMAGE_TOKEN, EmbeddingInput

FIXED_LENGTH = ("siglip", "siglip2")  # trained on texts padded to full length, without a mask


class DualEncoder(Backbone):
    """CLIP, SigLIP and similar models with `get_text_features` and `get_image_features`.

    Settings (`options` of `load`):
        fusion: "sum" (default) adds the features as they are, "unit" adds their unit vectors.
        num_frames: Frames sampled from a video, which count as its images (default 8).

    Instructions and placeholders are removed from the text. Several images are averaged.
    """

    name: ClassVar[str] = "dual"
    fusions: ClassVar[tuple[str, ...]] = ("sum", "unit")
    model_class: ClassVar[str] = "AutoModel"

    def __init__(self, model: nn.Module, tokenizer: Any, images: Any, settings: dict[str, Any]) -> None:
        super().__init__(model)
        self._tokenizer, self.image_processor, self.settings = tokenizer, images, settings
        config: Any = model.config
        self.config = config
        self.fusion = settings.get("fusion", "sum")
        self.num_frames = settings.get("num_frames", self.num_frames)
        words = config.qformer_config if self.name == "blip-2" else config.text_config
        self._max_length = min(int(words.max_position_embeddings), int(tokenizer.model_max_length))

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
        cls.check_settings(source, options)
        common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        family: Any = getattr(transformers, cls.model_class)
        try:
            check_weight_files(source, allow_pickle)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **common)
            images = transformers.AutoImageProcessor.from_pretrained(source, backend="pil", **common)
            model, report = family.from_pretrained(
                source, dtype=dtype, use_safetensors=None if allow_pickle else True, output_loading_info=True, **common
            )
            if report["missing_keys"]:
                raise UserError(f"weight {min(report['missing_keys'])} is missing")
        except Exception as error:  # transformers and tokenizers raise many types, plain Exception among them
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{source}: cannot be loaded as a dual encoder: {reason}") from error
        return cls(model, tokenizer, images, options)

    @classmethod
    def check_settings(cls, source: str, options: Mapping[str, Any]) -> None:
        """Rejects settings that the family does not have.

        Raises:
            UserError: naming the allowed settings.
        """
        frames = options.get("num_frames", cls.num_frames)
        good = isinstance(frames, int) and frames > 0 and options.get("fusion", "sum") in cls.fusions
        if not good or set(options) - {"fusion", "num_frames"}:
            allowed = f"fusion, one of {', '.join(cls.fusions)}, and num_frames, 1 or more"
            raise UserError(f"{source}: settings {dict(options)}: expected {allowed}")

    @property
    def embedding_dim(self) -> int:
        """Width of the shared space of both encoders."""
        if self.config.model_type in FIXED_LENGTH:
            return int(self.config.text_config.projection_size)
        return int(self.config.projection_dim)

    @property
    def tokenizer(self) -> Any:
        """The text encoder's tokenizer."""
        return self._tokenizer

    @property
    def language_model(self) -> nn.Module:
        """The text encoder."""
        model: Any = self.model
        found: nn.Module = model.text_model
        return found

    def language_parts(self) -> list[nn.Module]:
        """The text encoder and, if it is a separate module, the text projection."""
        projection = getattr(self.model, "text_projection", None)
        return [self.language_model] if projection is None else [self.language_model, projection]

    @property
    def max_length(self) -> int:
        """Length of the text encoder's position embeddings, special tokens included."""
        return self._max_length

    def options(self) -> dict[str, Any]:
        """The settings given to `load`."""
        return dict(self.settings)

    def words(self, item: EmbeddingInput) -> str:
        """The text that the text encoder reads."""
        return PLACEHOLDER.sub(" ", (item.text or "").replace(BARE_IMAGE_TOKEN, " ")).strip()

    def collate(self, inputs: Sequence[EmbeddingInput]) -> Batch:
        """Token ids [B, L], which rows have a text, and the packed tensors of all images."""
        texts = [self.words(item) for item in inputs]
        # A blank stands for the empty candidate texts of published benchmarks: the start and end tokens alone.
        if any(
            not (text or item.images or (item.text or "").isspace()) for text, item in zip(texts, inputs, strict=True)
        ):
            raise UserError("input has an empty text and no image; expected at least one of them")
        padding = "max_length" if self.config.model_type in FIXED_LENGTH else True
        encoded = self.tokenizer(
            texts, padding=padding, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        mask = encoded.get("attention_mask", torch.ones_like(encoded["input_ids"]))
        has_text = torch.tensor([bool(text) or not item.images for text, item in zip(texts, inputs, strict=True)])
        mask[~has_text, :1] = 1  # a row without text keeps one position, even if the tokenizer adds no token
        rest = [row.overflowing for row in encoded.encodings or ()]  # a list of parts each; special tokens do not count
        dropped = tuple(sum(part.special_tokens_mask.count(0) for part in parts) for parts in rest)
        tensors = {"input_ids": encoded["input_ids"], "attention_mask": mask, "has_text": has_text}
        batch = Batch(tensors, dropped=dropped if any(dropped) else ())
        images = [image.load() for item in inputs for image in item.images]
        if images:
            counts = torch.tensor([len(item.images) for item in inputs])
            for name, value in self.image_processor(images, return_tensors="pt").items():
                batch.tensors[name], batch.rows[name] = value, counts
        return batch

    def costs(self, batch: Batch) -> list[int]:
        """Tokens of the text plus patches of the images."""
        vision: Any = self.config.vision_config
        patches = (int(getattr(vision, "image_size", 224)) // int(vision.patch_size)) ** 2
        counts = batch.rows.get("pixel_values", torch.zeros(len(batch), dtype=torch.long))
        return [tokens + patches * int(count) for tokens, count in zip(batch.lengths(), counts, strict=True)]

    def forward(self, batch: Batch) -> torch.Tensor:
        """Sum of an example's text and image features, not normalized, [B, D]."""
        rows = batch["has_text"].nonzero().squeeze(1)
        vectors_BD = torch.zeros(len(batch), self.embedding_dim, device=rows.device)
        if len(rows):
            vectors_BD = vectors_BD.index_add(
                0, rows, self._scaled(self.text_features(self._text_tensors(batch, rows)))
            )
        if images := self._image_tensors(batch):
            counts_B = batch.rows["pixel_values"].to(rows.device)
            owner_N = torch.repeat_interleave(torch.arange(len(counts_B), device=rows.device), counts_B)
            features_ND = self._scaled(self.image_features(images)) / counts_B[owner_N].unsqueeze(1)
            vectors_BD = vectors_BD.index_add(0, owner_N, features_ND)
        return vectors_BD

    def text_features(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Features of texts, [B, D]."""
        model: Any = self.model
        features: torch.Tensor = model.get_text_features(**tensors).pooler_output
        return features

    def image_features(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Features of images, [N, D]."""
        model: Any = self.model
        features: torch.Tensor = model.get_image_features(**tensors).pooler_output
        return features

    def save_processor(self, folder: Path) -> None:
        """Writes tokenizer and image settings as transformers does."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def save_model(self, folder: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Writes weights and configuration as transformers does. The folder is then a complete model."""
        model: Any = self.model
        model.save_pretrained(folder, state_dict=state)

    def write_sentence_transformers(self, folder: Path, prompts: Mapping[str, str]) -> None:
        """Writes sentence-transformers' own modules. They reject inputs with text and images, having no sum."""
        methods = {"text": "get_text_features", "image": "get_image_features"}
        padding = "max_length" if self.config.model_type in FIXED_LENGTH else True
        st_folder.write_text_and_vision_modules(folder, methods, {"padding": padding, "max_length": self.max_length})

    def _scaled(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features.float(), dim=-1) if self.fusion == "unit" else features.float()

    def _text_tensors(self, batch: Batch, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        names = [name for name in ("input_ids", "attention_mask") if name in self.tokenizer.model_input_names]
        return {name: batch[name][rows] for name in names}

    def _image_tensors(self, batch: Batch) -> dict[str, torch.Tensor]:
        dtype = next(self.model.parameters()).dtype
        used = {name: batch[name] for name in batch.rows if len(batch[name])}
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in used.items()}
