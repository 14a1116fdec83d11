"""The language model of every family, and the errors if a network does not declare it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny.dual import DUAL
from tiny.models import FAMILIES
from torch import nn

from vlm2vec import Embedder, UserError
from vlm2vec.models.backbones.generic import Generic

GOLDEN = Path(__file__).parents[1] / "golden"


def vision_names(embedder: Embedder) -> list[str]:
    language = {id(p) for part in embedder.backbone.language_parts() for p in part.parameters()}
    return [name for name, p in embedder.backbone.model.named_parameters() if id(p) not in language]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_the_language_model_is_the_vision_encoder_and_its_projector(
    family: str, tiny_vlm: Callable[[str], Path]
) -> None:
    embedder = Embedder.from_pretrained(tiny_vlm(family), dtype=torch.float32)
    names = vision_names(embedder)
    assert names
    assert not [name for name in names if name.startswith(("language_model.", "text_model."))]


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2", "blip"])
def test_the_language_model_of_a_dual_encoder_is_its_text_encoder(family: str, tmp_path: Path) -> None:
    DUAL[family](tmp_path)
    names = vision_names(Embedder.from_pretrained(tmp_path, dtype=torch.float32))
    assert any(name.startswith("vision_model.") for name in names)
    assert not [name for name in names if name.startswith("text")]


def test_a_q_former_reads_both_and_has_no_language_model(tmp_path: Path) -> None:
    DUAL["blip-2"](tmp_path)
    with pytest.raises(UserError, match="blip-2: its Q-Former reads texts and images"):
        Embedder.from_pretrained(tmp_path, dtype=torch.float32).backbone.language_parts()


def test_phi3_holds_its_vision_encoder_inside_the_decoder() -> None:
    names = vision_names(Embedder.from_pretrained(GOLDEN / "phi3v", dtype=torch.float32))
    assert names and all(name.startswith("vision_embed_tokens.") for name in names)


class ReturnsItself(nn.Module):
    """What transformers falls back to where a family does not name its decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def get_decoder(self) -> nn.Module:
        return self


@pytest.mark.parametrize("model", [ReturnsItself(), nn.Linear(2, 2)])
def test_a_network_that_does_not_name_its_language_model_is_refused(model: nn.Module) -> None:
    backbone = Generic.__new__(Generic)
    nn.Module.__init__(backbone)
    backbone.model = model
    with pytest.raises(UserError, match="generic: the network does not say which part of it is the language model"):
        _ = backbone.language_model
