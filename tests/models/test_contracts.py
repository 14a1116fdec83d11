"""The two contracts that model families implement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from tiny.dual import DUAL
from tiny.models import draw_image
from torch import nn

from vlm2vec import Embedder, EmbeddingInput, UserError
from vlm2vec.batch import Batch
from vlm2vec.models.backbones.base import Backbone
from vlm2vec.models.backbones.decoder import DecoderBackbone
from vlm2vec.models.registry import BACKBONES, BUILT_IN, GENERIC, _import

DUAL_FAMILIES = {"clip", "metaclip_2", "siglip", "siglip2", "blip", "blip-2", "open_clip", "compact-dual"}


class Letters(Backbone):
    """A whole family: the vector of a text counts its letters a, b and c."""

    name: ClassVar[str] = "letters"

    @classmethod
    def load(cls, source: str, dtype: torch.dtype, **options: Any) -> Self:
        return cls(nn.Linear(3, 3, bias=False))

    def collate(self, inputs: Any) -> Batch:
        return Batch({"counts": torch.tensor([[float((item.text or "").count(c)) for c in "abc"] for item in inputs])})

    def forward(self, batch: Batch) -> torch.Tensor:
        return batch["counts"]

    @property
    def embedding_dim(self) -> int:
        return 3

    @property
    def tokenizer(self) -> Any:
        return None

    def save_processor(self, folder: Path) -> None: ...


def test_a_backbone_needs_no_token_states_to_encode() -> None:
    embedder = Embedder(Letters.load("", torch.float32), "letters")
    vectors = embedder.encode(["aab", "c", "aab"])
    assert vectors.tolist()[1] == [0, 0, 1]
    torch.testing.assert_close(torch.from_numpy(vectors[0]), torch.tensor([2.0, 1, 0]) / 5**0.5)
    assert not hasattr(embedder.backbone, "hidden_states")


@pytest.mark.parametrize("missing", ["load", "collate", "forward", "embedding_dim", "tokenizer", "save_processor"])
def test_a_family_that_leaves_a_part_of_the_contract_out_cannot_be_made(missing: str) -> None:
    kept = {name: value for name, value in vars(Letters).items() if name != missing and not name.startswith("__")}
    with pytest.raises(TypeError, match=f"abstract method '?{missing}"):
        type("Partly", (Backbone,), {**kept, "__init__": lambda self: Backbone.__init__(self, nn.Identity())})()


@pytest.mark.parametrize("family", [*BACKBONES, *BUILT_IN, "generic"])
def test_dual_encoders_have_no_token_states_and_decoders_do(family: str) -> None:
    kind = _import({**BACKBONES, **BUILT_IN}.get(family, GENERIC))
    assert issubclass(kind, DecoderBackbone) != (family in DUAL_FAMILIES)


def test_pooling_is_refused_where_there_are_no_token_states_and_where_it_is_unknown(
    tmp_path: Path, tiny_vlm: Callable[[str], Path]
) -> None:
    DUAL["clip"](tmp_path)
    clip = Embedder.from_pretrained(tmp_path, dtype=torch.float32).backbone
    clip.pooling = "last"  # what saved files and recipes say of every family
    with pytest.raises(UserError, match=r"pooling .mean.: dual has no token states to pool"):
        clip.pooling = "mean"
    decoder = Embedder.from_pretrained(tiny_vlm("llava"), dtype=torch.float32).backbone
    with pytest.raises(UserError, match="pooling 'median': expected one of last, mean"):
        decoder.pooling = "median"


@pytest.mark.parametrize("source", ["clip", "compact-dual"])
def test_an_image_of_a_dual_encoder_costs_its_patches_and_a_text_its_tokens(source: str, tmp_path: Path) -> None:
    if source in DUAL:
        DUAL[source](tmp_path)
    options = {} if source in DUAL else {"num_layers": 1, "visual_tokens": 4, "image_size": 64}
    embedder = Embedder.from_pretrained(tmp_path if source in DUAL else source, dtype=torch.float32, **options)
    image = EmbeddingInput.of(draw_image(28, 28, 1))
    batch = embedder.backbone.process([image, EmbeddingInput("a dog"), EmbeddingInput("a dog", image.images * 2)])
    no_words, patches = (1, 16) if source == "clip" else (2, 4)  # the end token, or MiniLM's first and last
    alone, text, both = embedder.backbone.costs(batch)
    assert (alone, both - text) == (no_words + patches, 2 * patches)
