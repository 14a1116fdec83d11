"""The network of `compact`: its text is all-MiniLM-L6-v2's, its images are near what is said of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny.compact import SMALL, draw_image, mixed_inputs

from vlm2vec import Embedder, EmbeddingInput, UserError
from vlm2vec.models.backbones.attention import first_token_reads_last
from vlm2vec.models.backbones.compact.model import BYPASS_SCALE, CellChoice, names_of_places, new_model
from vlm2vec.models.backbones.compact.parts import FINAL_DIM, VISION_DIM, load_sentence_encoder
from vlm2vec.models.backbones.compact.seen_classes import SeenClasses, input_vectors, names_of_classes
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.verification.fingerprint import describe

TEXTS = ["a dog", "two children play football on a field of grass", ""]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.from_pretrained("compact", dtype=torch.float32, device="cpu", **SMALL)


def test_a_text_has_nearly_the_vector_of_the_published_sentence_encoder() -> None:
    encoder, tokenizer = load_sentence_encoder(6, torch.float32)
    whole = Embedder.from_pretrained("compact", dtype=torch.float32, device="cpu")
    for text, vector in zip(TEXTS[:2], whole.encode(TEXTS[:2]), strict=True):
        with torch.inference_mode():
            states_1LD = encoder(**tokenizer([text], return_tensors="pt")).last_hidden_state
        expected = F.normalize(states_1LD.mean(dim=1), dim=-1)[0].numpy()
        assert 0.95 < vector @ expected < 0.9999


def test_the_expected_vector_is_that_of_the_classifiers_probabilities() -> None:
    torch.manual_seed(0)
    classifier, vectors_CD = torch.nn.Linear(FINAL_DIM, 7), torch.randn(7, 5)
    features = torch.randn(2, 3, VISION_DIM)
    expected = classifier(features[..., :FINAL_DIM]).softmax(dim=-1) @ vectors_CD
    torch.testing.assert_close(SeenClasses(classifier, vectors_CD)(features), expected.detach())


def test_a_class_that_is_certain_gives_its_vector_alone() -> None:
    torch.manual_seed(0)
    classes = SeenClasses(torch.nn.Linear(FINAL_DIM, 7), torch.randn(7, 5))
    certain = 1e4 * classes.weight_CF[3]
    most_likely = int((classes.weight_CF @ certain).argmax())
    torch.testing.assert_close(classes(certain), classes.vectors_CD[most_likely])


def test_the_vectors_of_classes_are_not_trained_and_change_the_fingerprint() -> None:
    embedder = Embedder.from_pretrained("compact", dtype=torch.float32, device="cpu", **SMALL)
    model = embedder.backbone.model
    before = describe(embedder, "compact")
    for classes in (model.projector.class_words, model.bypass.class_sentences):
        assert not list(classes.parameters())
        with torch.no_grad():
            classes.vectors_CD[7] += 1
        after = describe(embedder, "compact")
        assert {name for name in before if before[name] != after[name]} == {"weights"}
        before = after


def test_the_words_of_a_class_are_those_of_its_name_and_its_kind() -> None:
    embeddings_VD = torch.randn(3, 5)

    def tokenizer(texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[0, 2] if ", " in text else [1] for text in texts]}

    names = names_of_classes()
    for name, vector in zip(names, input_vectors(names, embeddings_VD, tokenizer), strict=True):
        expected = embeddings_VD[[0, 2]].mean(dim=0) if ", " in name else embeddings_VD[1]
        torch.testing.assert_close(vector, expected)


def test_the_dual_encoder_of_the_same_parts_adds_unit_vectors_of_text_and_image(embedder: Embedder) -> None:
    dual = Embedder.from_pretrained("compact-dual", dtype=torch.float32, device="cpu", **SMALL)
    image = draw_image(0)
    items = [EmbeddingInput("hello"), EmbeddingInput(images=(image,)), EmbeddingInput("hello", (image,))]
    text, seen, both = dual.encode(items)
    added = (text + seen) / np.linalg.norm(text + seen)
    assert added @ both == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(text, embedder.encode(["hello"])[0], atol=1e-5)
    with torch.inference_mode():
        expected = embedder.backbone.model.bypass(embedder.backbone.process(items[1:2])["image_features"])
    np.testing.assert_allclose(seen, expected[0].numpy(), atol=1e-5)


def test_the_choice_is_added_to_the_states_of_visual_tokens_alone(embedder: Embedder) -> None:
    backbone, model = embedder.backbone, embedder.backbone.model
    two = EmbeddingInput(text="<|image_1|> or <|image_2|>", images=(draw_image(0), draw_image(1)))
    batch = backbone.process([EmbeddingInput(text="a"), two])
    with torch.no_grad():
        states_BLD = backbone.hidden_states(batch)
        gate, model.choice.gate = model.choice.gate, torch.nn.Linear(384, 2)
        torch.nn.init.zeros_(model.choice.gate.weight)
        torch.nn.init.zeros_(model.choice.gate.bias)
        without_BLD = backbone.hidden_states(batch)
        model.choice.gate = gate
        is_image = batch["input_ids"][1] == model.image_token_id
        text_2D = without_BLD[1, ~is_image].mean(dim=0).expand(2, -1)
        cell_2TD = model.bypass(batch["image_features"].unsqueeze(-2))
        states_2TD = without_BLD[1, is_image].view(2, 4, 384)
        added_2D = BYPASS_SCALE * model.choice(text_2D, states_2TD, model.bypass(batch["image_features"]), cell_2TD)
    assert int(is_image.sum()) == 2 * backbone.vision.num_tokens
    found = (states_BLD - without_BLD)[1, is_image].view(2, 4, 384)
    torch.testing.assert_close(found, added_2D.unsqueeze(1).expand(2, 4, 384), rtol=1e-4, atol=1e-4)
    assert torch.equal(states_BLD[1, ~is_image], without_BLD[1, ~is_image])
    assert torch.equal(states_BLD[0], without_BLD[0])


def test_a_new_choice_gives_the_image_and_a_trained_one_the_cells_that_are_like_the_text() -> None:
    torch.manual_seed(0)
    choice, (text, image), (states, cells) = CellChoice(8), torch.randn(2, 3, 8), torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(choice(text, states, image, cells), image)
    with torch.no_grad():
        choice.gate.bias.copy_(torch.tensor([0.25, 2.0]))
        found = choice(text, states, image, cells)
    normed_text, normed_states = F.layer_norm(text, (8,)), F.layer_norm(states, (8,))
    shares = ((normed_states * normed_text[:, None]).sum(dim=-1) / 8**0.5).softmax(dim=-1)
    torch.testing.assert_close(found, 0.25 * image + 2 * (shares[..., None] * cells).sum(dim=1))


def test_before_its_pretraining_a_visual_token_starts_with_the_words_of_its_place(embedder: Embedder) -> None:
    backbone = embedder.backbone
    model = new_model(backbone.vision, backbone.language_model, backbone.tokenizer, torch.zeros(1000, 384))
    words_VD = backbone.language_model.get_input_embeddings().weight.detach()
    ids = backbone.tokenizer("bottom left", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(model.projector.positions.detach()[2], words_VD[ids].mean(dim=0))


@pytest.mark.parametrize(
    ("side", "names"),
    [(1, ["center"]), (2, ["top left", "top right", "bottom left", "bottom right"]), (3, None), (4, None)],
)
def test_every_cell_has_a_name_of_its_third_of_the_image(side: int, names: list[str] | None) -> None:
    found = names_of_places(side)
    assert len(found) == side**2 and (names is None or found == names)
    if side > 2:
        assert found[0] == "top left" and found[-1] == "bottom right" and found[side] == "middle left"


def test_it_attends_in_both_directions_and_pools_by_the_mean(embedder: Embedder) -> None:
    assert (embedder.backbone.pooling, embedder.backbone.attention) == ("mean", "bidirectional")
    assert first_token_reads_last(embedder.backbone, embedder.backbone.process([EmbeddingInput(text="one two")]))
    with pytest.raises(UserError, match="attention causal: compact attends in both directions"):
        embedder.backbone.attention = "causal"


def test_too_long_a_text_is_cut_and_too_many_images_are_refused(embedder: Embedder) -> None:
    before = embedder.num_truncated
    long = EmbeddingInput(text="<|image_1|> " + "word " * 600, images=(draw_image(0),))
    batch = embedder.backbone.process([long])
    assert batch["input_ids"].shape == (1, 512) and batch.dropped == (600 + 4 - 510,)
    assert embedder.num_truncated == before + 1 and embedder.max_length == 510
    with pytest.raises(UserError, match="an input has 128 images; compact reads up to 127"):
        embedder.encode([EmbeddingInput(images=(draw_image(0),) * 128)])


def test_a_trained_adapter_comes_back_with_pooling_and_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    embedder = Embedder.from_pretrained("compact", dtype=torch.float32, device="cpu", **SMALL)
    before = embedder.encode(mixed_inputs())
    checkpoint.add_adapter(embedder.backbone, 2, 4, 0.0, None)
    trained = {name for name, parameter in embedder.named_parameters() if parameter.requires_grad}
    for part in ("query.lora_A", "intermediate.dense.lora_A", "bypass"):
        assert any(part in name for name in trained), part
    assert not [name for name in trained if "projector" in name or "choice" in name]
    output_BD = embedder.train()(embedder.backbone.process(mixed_inputs()))
    torch.autograd.backward((output_BD @ output_BD.T).square().mean())
    torch.optim.SGD([p for p in embedder.parameters() if p.grad is not None], lr=0.1).step()
    vectors = embedder.eval().encode(mixed_inputs())
    assert not np.allclose(vectors, before, atol=1e-3)
    again = Embedder.from_pretrained(embedder.save_pretrained(tmp_path / "run"), dtype=torch.float32, device="cpu")
    assert (again.backbone.pooling, again.backbone.attention) == ("mean", "bidirectional")
    np.testing.assert_allclose(again.encode(mixed_inputs()), vectors, atol=1e-5)
