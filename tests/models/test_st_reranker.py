"""Saved rerankers load in sentence-transformers' CrossEncoder, with equal scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from tiny.models import draw_image

from vlm2vec import Embedder, UserError
from vlm2vec.models.reranking.pair_model import PairModel
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.models.reranking.reranker import Reranker

TinyVlm = Callable[[str], Path]
RED, WIDE = draw_image(60, 60, 1), draw_image(90, 40, 2)
QUERY, CANDIDATES = {"image": RED, "text": "red"}, ["a dog", RED, {"image": WIDE, "text": "wide"}]
PROMPT = RerankPrompt(system="Judge.", body="{instruction} Q: {query} D: {document}", answers=("y", "n"))

CHAT = (
    "{%- for message in messages -%}[{{ message.role }}]{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<image>{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}{%- if add_generation_prompt -%}[assistant]{%- endif -%}"
)


def of_vlm(folder: Path) -> PairModel:
    return PairModel.of(Embedder.from_pretrained(folder, device="cpu", dtype=torch.float32), PROMPT)


def of_built_in() -> PairModel:
    """The smallest built-in model with a head that gives different scores."""
    options: dict[str, Any] = {"num_layers": 1, "visual_tokens": 4, "image_size": 64}
    embedder = Embedder.from_pretrained("compact", device="cpu", dtype=torch.float32, **options)
    model = PairModel.of(embedder, PROMPT, new_head="linear")
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("kind", ["a head of answers", "a scalar head"])
def test_a_saved_reranker_gives_the_same_probabilities_in_cross_encoder(
    kind: str, tiny_vlm: TinyVlm, tmp_path: Path
) -> None:
    model = of_vlm(tiny_vlm("qwen2_vl")) if kind == "a head of answers" else of_built_in()
    folder = model.save_pretrained(tmp_path / "saved")
    reranker = Reranker.from_pretrained(str(folder), device="cpu", dtype=torch.float32)
    log_odds = reranker.score(QUERY, CANDIDATES, instruction="Find it.")
    assert np.ptp(log_odds) > 1e-2
    theirs = CrossEncoder(str(folder), trust_remote_code=True, device="cpu", model_kwargs={"dtype": torch.float32})
    found = theirs.predict([(QUERY, candidate) for candidate in CANDIDATES], prompt="Find it.")
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-log_odds)), atol=1e-5)
    ranked = theirs.rank(QUERY, CANDIDATES, prompt="Find it.")
    assert [row["corpus_id"] for row in ranked] == np.argsort(-log_odds).tolist()
    theirs.save_pretrained(str(tmp_path / "again"))
    again = Reranker.from_pretrained(str(tmp_path / "again"), device="cpu", dtype=torch.float32)
    np.testing.assert_array_equal(again.score(QUERY, CANDIDATES, instruction="Find it."), log_odds)


def test_a_built_in_model_has_no_head_of_answers() -> None:
    embedder = Embedder.from_pretrained("compact", device="cpu", num_layers=1)
    with pytest.raises(UserError, match=r"compact: has no lm_head\.weight; expected .* trained reranker"):
        PairModel.of(embedder, PROMPT)


def test_a_damaged_folder_is_one_clear_line(tiny_vlm: TinyVlm, tmp_path: Path) -> None:
    folder = of_vlm(tiny_vlm("qwen2_vl")).save_pretrained(tmp_path / "saved")
    text = (folder / "reranker.json").read_text()
    (folder / "reranker.json").write_text(text.replace('"system"', '"sytem"'))
    with pytest.raises(UserError, match=r"the prompt of reranker\.json is not valid"):
        Reranker.from_pretrained(str(folder))
    (folder / "reranker.json").write_text(text.replace('"format"', '"fromat"'))
    with pytest.raises(UserError, match=r"reranker\.json: unknown key fromat"):
        Reranker.from_pretrained(str(folder))


@pytest.mark.parametrize("generation", [True, False])
def test_a_generating_cross_encoder_loads_here_with_equal_scores(
    generation: bool, tiny_vlm: TinyVlm, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_vlm("llava"), folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    calls: Any = {"chat_template": {"add_generation_prompt": generation}}
    network = Transformer(str(folder), transformer_task="any-to-any", processing_kwargs=calls)
    answers = [network.tokenizer.encode(word)[0] for word in ("y", "n")]
    theirs = CrossEncoder(
        modules=[network, LogitScore(*answers)],
        device="cpu",
        prompts={"default": "Judge."},
        default_prompt_name="default",
        activation_fn=torch.nn.Identity(),
    )
    theirs.save_pretrained(str(tmp_path / "saved"))
    reranker = Reranker.from_pretrained(str(tmp_path / "saved"), device="cpu", dtype=torch.float32)
    candidates = [*CANDIDATES, {"text": "wide", "image": WIDE}]
    for query in (QUERY, "red", RED):
        expected = theirs.predict([(query, candidate) for candidate in candidates])
        assert np.ptp(expected) > 1e-2
        np.testing.assert_allclose(reranker.score(query, candidates), expected, atol=2e-4)
    asked = theirs.predict([(QUERY, "a dog")], prompt="Find it.")
    np.testing.assert_allclose(reranker.score(QUERY, ["a dog"], instruction="Find it."), asked, atol=2e-4)
    again = reranker.scorer.save_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(
        Reranker.from_pretrained(str(again), device="cpu", dtype=torch.float32).score(QUERY, candidates),
        reranker.score(QUERY, candidates),
    )


def test_other_cross_encoders_are_named(tmp_path: Path) -> None:
    (tmp_path / "config_sentence_transformers.json").write_text('{"model_type": "CrossEncoder"}')
    kind = "sentence_transformers.base.modules.transformer.Transformer"
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    with pytest.raises(
        UserError, match=r"modules\.json: .*expected sentence-transformers' own Transformer, LogitScore"
    ):
        Reranker.from_pretrained(str(tmp_path))
