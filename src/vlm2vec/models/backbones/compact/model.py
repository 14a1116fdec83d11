"""`compact`: the built-in small VLM in the shape of LLaVA, made of pretrained parts that need no hub.

image -> EfficientNet-Lite0 (frozen) -> projector, plus the words of the classes that the encoder sees
        -> first layers of SmolLM2-135M-Instruct -> last token.
This project trained projector, head and adapter (`pretraining.pretrain`, recipes/pretrain-compact.yaml) and ships them.

Shapes: B examples, L tokens, T visual tokens per image, D embedding dim.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from torch import nn

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.models.backbones.base import NUMBERED, MediaTokens
from vlm2vec.models.backbones.compact.class_words import ClassWords
from vlm2vec.models.backbones.compact.parts import VISION_DIM, EfficientNetLite, load_language
from vlm2vec.models.backbones.compact.processing import CompactBackbone
from vlm2vec.models.backbones.compact.settings import checked_settings
from vlm2vec.models.backbones.decoder import DecoderBackbone
from vlm2vec.models.prompts import split_at_images
from vlm2vec.types import EmbeddingInput

SHIPPED = Path(__file__).with_name("compact_pretrained.safetensors")
SHIPPED_SHA256 = "0552299f2ee4cd921ead3e6ff5f7dfa24cdbe71344e44545709087dc109879bc"
PRETRAINED_LAYERS = 4
PROJECTOR_WIDTH = 1152
WORDS_SCALE, PROJECTED_SCALE = 2.0, 0.005  # both vectors get about the norm of a text word: 3
DEFAULTS = {"num_layers": 4, "visual_tokens": 9, "image_size": 192}


class Projector(nn.Module):
    """Visual features [.., T, 1480] -> the language model's input space [.., T, D].

    A token is the sum of three vectors: the words for its class, a projection of its features, and its position.
    """

    def __init__(self, embedding_dim: int, num_tokens: int, class_words: ClassWords) -> None:
        super().__init__()
        self.class_words = class_words
        self.layers = nn.Sequential(
            nn.LayerNorm(VISION_DIM),
            nn.Linear(VISION_DIM, PROJECTOR_WIDTH),
            nn.GELU(),
            nn.Linear(PROJECTOR_WIDTH, embedding_dim),
        )
        self.positions = nn.Parameter(torch.zeros(num_tokens, embedding_dim))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """One input vector of the language model per visual token."""
        projected: torch.Tensor = self.layers(features)
        words: torch.Tensor = self.class_words(features)
        return WORDS_SCALE * words + PROJECTED_SCALE * projected + self.positions


def make_projector(vision: EfficientNetLite, language: Any, tokenizer: Any) -> Projector:
    """A new projector between an encoder and a language model, with the encoder's class words."""
    words = ClassWords(vision.classifier, language.get_input_embeddings().weight, tokenizer)
    return Projector(language.config.hidden_size, vision.side**2, words)


def identity_head(dim: int) -> nn.Linear:
    """A linear layer that is the identity."""
    head = nn.Linear(dim, dim)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class CompactModel(nn.Module):
    """Vision encoder, projector, language model, and a linear head that whitens the final states.

    The image token id is one past the text vocabulary, so that no text can produce it.
    """

    language_model: Any
    config: Any

    def __init__(self, vision: EfficientNetLite, projector: Projector, language_model: nn.Module) -> None:
        super().__init__()
        self.vision = vision
        self.projector = projector
        self.language_model = language_model
        self.head = identity_head(int(self.language_model.config.hidden_size))
        self.config = self.language_model.config  # PEFT reads it
        self.image_token_id = int(self.config.vocab_size)

    def states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_features: torch.Tensor | None
    ) -> torch.Tensor:
        """Hidden states [B, L, D] after the final norm; `image_features` [N, T, 1480] fill the image tokens."""
        is_image_BL = input_ids == self.image_token_id
        embeds_BLD = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_image_BL, 0))
        if image_features is not None and len(image_features):
            projected = self.projector(image_features.to(embeds_BLD.dtype))
            embeds_BLD = embeds_BLD.masked_scatter(is_image_BL.unsqueeze(-1), projected.to(embeds_BLD.dtype))
        output = self.language_model(inputs_embeds=embeds_BLD, attention_mask=attention_mask)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_features: torch.Tensor | None
    ) -> torch.Tensor:
        """The states [B, L, D] after the head."""
        states: torch.Tensor = self.head(self.states(input_ids, attention_mask, image_features))
        return states


class Compact(CompactBackbone, DecoderBackbone):
    """The built-in VLM and its processor.

    Settings (`options` of `load`):
        num_layers: Layers of the language model, 1 to 30 (default 4: trains on two CPU cores in minutes).
        visual_tokens: Tokens per image, 4, 9 or 16 (default 9).
        image_size: Side in pixels. Images are resized to a square of this side, ignoring their aspect ratio
            (default 192).
    """

    name: ClassVar[str] = "compact"
    media_tokens: ClassVar[Mapping[str, MediaTokens]] = {"compact": NUMBERED}
    trained_modules: ClassVar[list[str]] = ["projector", "head"]

    @classmethod
    def load(cls, source: str, dtype: torch.dtype, **options: Any) -> Self:
        """Assembles the model from its packaged parts; see the class for the settings."""
        settings = checked_settings(source, options, DEFAULTS)
        language, tokenizer = load_language(settings["num_layers"], dtype)
        vision = EfficientNetLite(settings["image_size"], settings["visual_tokens"])
        model = CompactModel(vision, make_projector(vision, language, tokenizer), language).to(dtype)
        model.vision.float()  # pixel values are float32, and features must not depend on the dtype of the rest
        _load_pretrained(model, settings["num_layers"])
        return cls(model, tokenizer, settings)

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """Hidden states [B, L, D] after the final norm and the head."""
        hidden: torch.Tensor = self.model(batch["input_ids"], batch["attention_mask"], batch.get("image_features"))
        return hidden

    def last_parts(self) -> list[nn.Module]:
        """Those of the last layer, and the head."""
        model: Any = self.model
        return [*super().last_parts(), model.head]

    def _token_ids(self, item: EmbeddingInput) -> tuple[list[int], int]:
        """Text ids, `visual_tokens` image ids per image, and the end token, whose state is the embedding."""
        ids: list[int] = []
        dropped = 0
        for piece in split_at_images(self.template.render(item)):
            if isinstance(piece, int):
                ids += [self.config.vocab_size] * self.settings["visual_tokens"]
            else:
                text_ids, too_many = self._text_ids(piece)
                ids += text_ids
                dropped += too_many
        return [*ids, self.tokenizer.eos_token_id], dropped


def _load_pretrained(model: CompactModel, num_layers: int) -> None:
    """Loads the pretrained projector and, if the number of layers matches, head, norm and merged adapter."""
    raw = SHIPPED.read_bytes()
    if hashlib.sha256(raw).hexdigest() != SHIPPED_SHA256:
        raise UserError(f"{SHIPPED}: SHA-256 differs from the shipped weights; reinstall vlm2vec")
    learned = {name: value.float() for name, value in load_safetensors(raw).items()}
    projector = {name.removeprefix("projector."): value for name, value in learned.items() if "projector." in name}
    projector["positions"] = _resampled(projector["positions"], len(model.projector.positions))
    model.projector.load_state_dict(projector)
    if num_layers != PRETRAINED_LAYERS:
        return
    language = model.language_model
    model.head.load_state_dict({name: learned[f"head.{name}"] for name in ("weight", "bias")})
    with torch.no_grad():
        language.norm.weight.copy_(learned["language_model.norm.weight"])
        for name, low in learned.items():
            if ".lora_A." in name:
                path = name.removeprefix("language_model.").removesuffix(".lora_A.default.weight")
                high = learned[name.replace(".lora_A.", ".lora_B.")]
                # alpha equals rank in pretraining, so the product is the weight change
                weight = language.get_submodule(path).weight
                weight.copy_(weight.float() + high @ low)


def _resampled(positions_TD: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Position vectors of a square grid, resampled for a grid of another size."""
    side, new = round(len(positions_TD) ** 0.5), round(num_tokens**0.5)
    grid_1DHW = positions_TD.T.reshape(1, -1, side, side)
    resampled = F.interpolate(grid_1DHW, size=(new, new), mode="bilinear", align_corners=False)
    return resampled.flatten(2)[0].T.contiguous()
