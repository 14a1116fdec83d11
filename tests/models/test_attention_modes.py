"""Bidirectional attention equals the class's own code with an explicit mask, or is rejected if unsupported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny.models import draw_image

from vlm2vec import Embedder, EmbeddingInput, UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.models.checkpoints.folder import add_adapter
from vlm2vec.models.verification.fingerprint import describe

FAMILIES = ["qwen2_vl", "qwen3_vl", "llava", "internvl", "gemma3", "mistral3", "idefics3", "paligemma"]
INPUTS = [
    EmbeddingInput(text="what is in this image", images=(ImageRef.of(draw_image(40, 56, 1)),)),
    EmbeddingInput(text="a"),
    EmbeddingInput(text="a longer text without an image"),
]


def states_and_call(backbone: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Hidden states of the inputs, their padding mask, and the arguments that the language model was called with."""
    calls: list[dict[str, Any]] = []
    handle = backbone.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    batch = backbone.process(INPUTS)
    with torch.no_grad():
        states = backbone.hidden_states(batch)
    handle.remove()
    return states, batch["attention_mask"].bool(), calls[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_bidirectional_equals_the_class_with_an_explicit_mask(family: str, tiny_vlm: Callable[[str], Path]) -> None:
    backbone = Embedder.from_pretrained(tiny_vlm(family), dtype=torch.float32).backbone
    causal = states_and_call(backbone)[0]
    backbone.attention = "bidirectional"
    states, real_BL, call = states_and_call(backbone)
    backbone.attention = "causal"
    torch.testing.assert_close(states_and_call(backbone)[0], causal, rtol=0, atol=0)
    mask_B1LL = torch.zeros(len(states), 1, states.shape[1], states.shape[1])
    mask_B1LL.masked_fill_(~real_BL[:, None, None, :], torch.finfo(torch.float32).min)
    given = call["attention_mask"]
    explicit = dict.fromkeys(given, mask_B1LL) if isinstance(given, dict) else mask_B1LL
    with torch.no_grad():
        wanted = backbone.language_model(**{**call, "attention_mask": explicit}).last_hidden_state
    torch.testing.assert_close(states[real_BL], wanted[real_BL], rtol=1e-4, atol=1e-5)
    assert (states - causal)[real_BL].abs().max() > 1e-3 or family == "paligemma"  # whose prompts are read so already


@pytest.mark.parametrize("family", ["qwen3_5"])
def test_layers_that_read_in_one_direction_are_refused_by_kind(family: str, tiny_vlm: Callable[[str], Path]) -> None:
    backbone = Embedder.from_pretrained(tiny_vlm(family), dtype=torch.float32).backbone
    with pytest.raises(UserError, match=r"attention bidirectional: .* has layers of kind linear_attention; use causal"):
        backbone.attention = "bidirectional"
    assert backbone.attention == "causal"


def test_a_network_that_ignores_the_setting_is_refused_and_left_causal(
    tiny_vlm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = Embedder.from_pretrained(tiny_vlm("qwen2_vl"), dtype=torch.float32).backbone
    forward = backbone.language_model.forward

    def own_mask(**arguments: Any) -> Any:
        length = arguments["inputs_embeds"].shape[1]
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        return forward(**{**arguments, "attention_mask": mask})

    monkeypatch.setattr(backbone.language_model, "forward", own_mask)
    with pytest.raises(UserError, match=r"attention bidirectional: the network of .* stays causal; use causal"):
        backbone.attention = "bidirectional"
    assert backbone.attention == "causal" and backbone.language_model.config.is_causal
    with pytest.raises(UserError, match=r"attention 'both': expected one of causal, bidirectional"):
        backbone.attention = "both"


@pytest.mark.parametrize("has_adapter", [True, False])
def test_a_saved_model_loads_with_its_attention_and_a_fingerprint_of_its_own(
    has_adapter: bool, tiny_vlm: Callable[[str], Path], tmp_path: Path
) -> None:
    embedder = Embedder.from_pretrained(tiny_vlm("qwen2_vl"), dtype=torch.float32)
    before = describe(embedder, "x")
    embedder.backbone.pooling, embedder.backbone.attention = "mean", "bidirectional"
    if has_adapter:
        add_adapter(embedder.backbone, 2, 4, 0.0, None)
    embedder.save_pretrained(tmp_path / "saved")
    loaded = Embedder.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert loaded.backbone.attention == "bidirectional"
    np.testing.assert_allclose(loaded.encode(INPUTS), embedder.encode(INPUTS), atol=1e-6)
    assert describe(loaded, "x")["attention"] == "bidirectional" and "attention" not in before
    assert "vlm2vec.models.st_module" in (tmp_path / "saved/modules.json").read_text()


def test_the_built_in_models_refuse_the_other_attention() -> None:
    backbone = Embedder.from_pretrained("compact", num_layers=1, dtype=torch.float32).backbone
    backbone.attention = "bidirectional"
    with pytest.raises(UserError, match="attention causal: compact attends in both directions; remove the setting"):
        backbone.attention = "causal"
    dual = Embedder.from_pretrained("compact-dual", dtype=torch.float32).backbone
    with pytest.raises(UserError, match="compact-dual is not a decoder"):
        dual.attention = "bidirectional"
