"""A VLM as a reranker: scores equal the logits of transformers' own class for an explicitly written prompt."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny.dual import build_clip
from tiny.models import FAMILIES, draw_image

from vlm2vec import Embedder, EmbeddingInput, UserError
from vlm2vec.models.reranking.pair_model import PairModel
from vlm2vec.models.reranking.prompt import RerankPrompt
from vlm2vec.models.reranking.reranker import Reranker

TinyVlm = Callable[[str], Path]
RED, WIDE = draw_image(60, 60, 1), draw_image(90, 40, 2)
PROMPT = RerankPrompt(system="Judge.", body="{instruction} Q: {query} D: {document}", answers=("y", "n"))
CHAT = (
    "{%- for message in messages -%}[{{ message.role }}]{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<image>{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}{%- if add_generation_prompt -%}[assistant]{%- endif -%}"
)


def load(folder: Path, prompt: RerankPrompt = PROMPT) -> Reranker:
    return Reranker.from_pretrained(str(folder), prompt=prompt, device="cpu", dtype=torch.float32)


@torch.inference_mode()
def by_hand(folder: Path, family: str, slots: str, images: list[Any]) -> float:
    """Logit of "y" minus logit of "n" of the class with its head, one example, the prompt written out here."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    about = FAMILIES[family]
    outputs = about.see(transformers.AutoImageProcessor.from_pretrained(folder, backend="pil"), images)
    prompt = slots.format(*[about.written_out(output, len(images)) for output in outputs])
    tensors = about.words(prompt, tokenizer, outputs) | about.tensors(outputs)
    accepted = inspect.signature(model.forward).parameters
    logits = model(**{name: tensor for name, tensor in tensors.items() if name in accepted}).logits[0, -1]
    return float(logits[tokenizer.encode("y")[0]] - logits[tokenizer.encode("n")[0]])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_scores_equal_the_logits_of_the_class_with_its_head(family: str, tiny_vlm: TinyVlm) -> None:
    folder = tiny_vlm(family)
    candidates = ["a dog", RED, {"image": WIDE, "text": "wide"}]
    scores = load(folder).score({"image": RED, "text": "red"}, candidates, instruction="Find it.")
    ask = "Judge.\nFind it. Q: {0} red D: "
    expected = [
        by_hand(folder, family, f"{ask}a dog\nAnswer:", [RED]),
        by_hand(folder, family, f"{ask}{{1}}\nAnswer:", [RED, RED]),
        by_hand(folder, family, f"{ask}{{1}} wide\nAnswer:", [RED, WIDE]),
    ]
    np.testing.assert_allclose(scores, expected, atol=2e-4)
    assert np.ptp(scores) > 1e-2


def test_a_chat_template_writes_the_prompt_up_to_the_answer(tiny_vlm: TinyVlm, tmp_path: Path) -> None:
    folder = copied(tiny_vlm("llava"), tmp_path)
    (folder / "chat_template.jinja").write_text(CHAT)
    scores = load(folder).score({"image": RED, "text": "red", "instruction": "Find it."}, ["a dog"])
    slots = "[system]Judge.[user]Find it. Q:{0}red D: a dog[assistant]"
    assert scores[0] == pytest.approx(by_hand(folder, "llava", slots, [RED]), abs=2e-4)


def test_tied_embeddings_are_the_head(tiny_vlm: TinyVlm, tmp_path: Path) -> None:
    folder = copied(tiny_vlm("qwen2_vl"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    head = next(name for name in weights if name.endswith("lm_head.weight"))
    embeddings = next(name for name in weights if name.endswith("embed_tokens.weight"))
    untied = {name: tensor for name, tensor in weights.items() if name != head}
    save_file({**untied, embeddings: weights[head]}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no lm_head\.weight; expected a model that generates text"):
        load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    expected = by_hand(folder, "qwen2_vl", "Judge.\nFind it. Q: red D: a dog\nAnswer:", [])
    assert load(folder).score("red", ["a dog"], instruction="Find it.")[0] == pytest.approx(expected, abs=2e-4)


def test_candidates_are_ranked_by_score_and_a_bad_one_fails_alone(tiny_vlm: TinyVlm) -> None:
    reranker = load(tiny_vlm("qwen2_vl"))
    candidates = ["a dog", Path("missing.png"), RED, "a dog", {"text": None}]
    errors: dict[int, UserError] = {}
    scores = reranker.score("red", candidates, on_error=errors.__setitem__)
    assert sorted(errors) == [1, 4]
    assert np.isnan(scores[[1, 4]]).all()
    assert scores[0] == scores[3]
    ranked = reranker.rank("red", candidates, top=3, on_error=lambda index, error: None)
    best = sorted((0, 2, 3), key=lambda index: -scores[index])
    assert [found.index for found in ranked] == best
    assert [found.score for found in ranked] == pytest.approx([1 / (1 + np.exp(-scores[i])) for i in best])
    with pytest.raises(UserError, match=r"missing\.png"):
        reranker.score("red", candidates[:4])


def test_the_weighted_cosine_joins_the_log_odds_in_closed_form(tiny_vlm: TinyVlm) -> None:
    reranker = load(tiny_vlm("qwen2_vl"))
    candidates = ["a dog", RED, WIDE, "a cat on a mat"]
    log_odds = reranker.score("red", candidates)
    order = np.argsort(-log_odds, kind="stable")
    cosines = np.empty(4, np.float32)
    cosines[order] = [0.1, 0.2, 0.3, 0.4]  # the opposite order
    alone = reranker.rank("red", candidates)
    assert reranker.rank("red", candidates, cosines=cosines, cosine_weight=0) == alone
    assert [found.index for found in alone] == order.tolist()
    for weight in (0.5, 20, 1e6):
        found = reranker.rank("red", candidates, cosines=torch.tensor(cosines), cosine_weight=weight)
        sums = log_odds + np.float32(weight) * cosines
        assert [one.score for one in found] == sums[[one.index for one in found]].tolist() == sorted(sums, reverse=True)
        assert [one.log_odds for one in found] == log_odds[[one.index for one in found]].tolist()
    assert [one.index for one in found] == order[::-1].tolist()  # a large weight: the embedder's order


def test_an_unreadable_candidate_stays_last_whatever_its_cosine(tiny_vlm: TinyVlm) -> None:
    reranker = load(tiny_vlm("qwen2_vl"))
    found = reranker.rank(
        "red", [Path("missing.png"), RED], cosines=[1, 0], cosine_weight=1e6, on_error=lambda index, error: None
    )
    assert [one.index for one in found] == [1, 0] and np.isnan(found[1].score)


@pytest.mark.parametrize(
    ("cosines", "weight", "message"),
    [
        (None, 20, "cosine_weight needs cosines"),
        ([0.5], 20, "cosines of shape [1]: expected one for each of 2 candidates"),
        ([[0.5, 0.1]], 20, "cosines of shape [1, 2]: expected one"),
        ([0.5, 0.1], -1, "cosine_weight -1: expected 0 or a positive number"),
        ([0.5, 0.1], float("nan"), "cosine_weight nan: expected 0"),
    ],
)
def test_a_weight_without_its_cosines_is_one_line_before_anything_is_read(
    cosines: Any, weight: float, message: str, tiny_vlm: TinyVlm
) -> None:
    with pytest.raises(UserError) as error:
        load(tiny_vlm("qwen2_vl")).rank("red", ["a", Path("missing.png")], cosines=cosines, cosine_weight=weight)
    assert str(error.value).startswith(message)


def test_what_cannot_rerank_is_one_clear_line(tiny_vlm: TinyVlm, tmp_path: Path) -> None:
    build_clip(tmp_path)
    with pytest.raises(UserError, match="use a vision-language model"):
        load(tmp_path)
    generates = Embedder.from_pretrained(tiny_vlm("qwen2_vl"), dtype=torch.float32, device="cpu")
    with pytest.raises(UserError, match=r"scores by its language-model head; remove rerank\.head"):
        PairModel.of(generates, PROMPT, "product")
    with pytest.raises(UserError, match="answer 'yes' is 3 tokens of generic"):
        load(tiny_vlm("qwen2_vl"), RerankPrompt())


def test_placeholders_of_both_sides_are_counted_on(tiny_vlm: TinyVlm) -> None:
    query = EmbeddingInput.of({"images": [RED, WIDE], "text": "<|image_2|> before <|image_1|>"})
    pair = PROMPT.pair(query, EmbeddingInput.of({"image": RED, "text": "see <|image_1|>"}), has_chat=True)
    assert pair.text is not None
    assert pair.text.endswith("Q: <|image_2|> before <|image_1|> D: see <|image_3|>")
    assert pair.images == (*query.images, query.images[0])


def copied(folder: Path, target: Path) -> Path:
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
