from __future__ import annotations

import gc
import inspect
import json
import re
import weakref
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny.llava import build_llava_next
from tiny.models import FAMILIES, draw_image

from vlm2vec.errors import UserError
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.registry import backbone_class
from vlm2vec.types import EmbeddingInput

GOLDEN = Path(__file__).parents[1] / "golden"
WIDE, TALL, SQUARE = draw_image(90, 40, 1), draw_image(40, 70, 2), draw_image(60, 60, 3)
# An input and its prompt by hand: {0} is the first image.
CASES = [
    ({"text": "a red car parked on the street"}, "a red car parked on the street"),
    ({"image": WIDE}, "{0}\n"),
    ({"image": TALL, "text": "a dog", "instruction": "Represent."}, "{0}\nRepresent. a dog\n"),
    ({"images": [WIDE, SQUARE], "text": "<|image_1|> and <|image_2|> differ"}, "{0} and {1} differ"),
    ({"images": [WIDE, SQUARE], "text": "<|image_2|>, then <|image_1|>"}, "{1}, then {0}"),
    ({"text": "dogs"}, "dogs"),
    ({"image": SQUARE, "text": "what is <|image_1|> then?"}, "what is {0} then?"),
]
INPUTS = [EmbeddingInput.of(value) for value, _ in CASES]


def load(folder: Path, **options: object) -> Embedder:
    return Embedder.from_pretrained(folder, device="cpu", dtype=torch.float32, **options)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: on a busy machine several threads only wait for each other, four times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def embedder(family: str, tiny_vlm) -> Embedder:
    return load(tiny_vlm(family))


@pytest.fixture(scope="module")
def qwen(tiny_vlm) -> Embedder:
    return load(tiny_vlm("qwen2_vl"))


@pytest.fixture(scope="module")
def alone(embedder: Embedder) -> np.ndarray:
    return embedder.encode(INPUTS, batch_size=1)


def assert_same(vectors: np.ndarray, expected: np.ndarray, at_least: float = 0.99999) -> None:
    cosines = (vectors * expected).sum(axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() >= at_least, cosines


@lru_cache(maxsize=1)
def hf_model(folder: Path) -> torch.nn.Module:
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def forward_by_hand(folder: Path, family: str, value: dict, slots: str) -> np.ndarray:
    """One example through AutoModel, the prompt written out here; nothing of the package is used."""
    model = hf_model(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    given = value.get("images", [value["image"]] if "image" in value else [])
    about = FAMILIES[family]
    outputs = about.see(images, given)
    prompt = slots.format(*[about.written_out(output, len(given)) for output in outputs])
    in_order = [outputs[int(slot)] for slot in re.findall(r"{(\d)}", slots)]
    tensors = about.words(prompt, tokenizer, in_order) | about.tensors(in_order)
    accepted = inspect.signature(model.forward).parameters
    used = {name: tensor for name, tensor in tensors.items() if name in accepted}
    vector = model(**used).last_hidden_state[:, -1]
    return torch.nn.functional.normalize(vector, dim=-1).numpy()


def test_vectors_equal_an_unbatched_forward_of_transformers(family, alone, tiny_vlm):
    expected = [forward_by_hand(tiny_vlm(family), family, value, slots) for value, slots in CASES]
    assert_same(alone, np.concatenate(expected))
    assert np.abs(alone @ alone.T - np.eye(len(alone)))[np.triu_indices(len(alone), 1)].max() < 0.9999  # all differ


def test_what_is_in_a_image_matters(embedder):
    first, second = embedder.encode([{"image": draw_image(60, 60, seed), "text": "a dog"} for seed in (3, 4)])
    assert first @ second < 0.999


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [6, 5, 2, 4, 0, 3, 1]])
def test_a_vector_does_not_depend_on_its_batch_mates_or_their_order(embedder, alone, order):
    with torch.inference_mode():
        together = embedder(embedder.backbone.process([INPUTS[i] for i in order])).numpy()
    assert_same(together, alone[order])


def test_a_batch_without_any_image_is_encoded(embedder, alone):
    batch = embedder.backbone.process([INPUTS[0], INPUTS[5]])
    assert "pixel_values" not in batch.tensors
    with torch.inference_mode():
        assert_same(embedder(batch).numpy(), alone[[0, 5]])


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_parts_of_a_split_batch_hold_their_own_rows_and_encode_to_the_same_vectors(embedder, alone, chunk_size):
    whole = embedder.backbone.process(INPUTS)
    parts = list(whole.split(chunk_size))
    for name in whole.rows:
        assert all(len(part[name]) == int(part.rows[name].sum()) for part in parts)
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    tokens = torch.cat([part["input_ids"][part["attention_mask"].bool()] for part in parts])
    assert torch.equal(tokens, whole["input_ids"][whole["attention_mask"].bool()])
    with torch.inference_mode():
        assert_same(np.concatenate([embedder(part).numpy() for part in parts]), alone)


def test_padding_on_the_left_gives_the_vectors_of_padding_on_the_right(family, alone, tiny_vlm):
    left = load(tiny_vlm(family), padding_side="left")
    batch = left.backbone.process(INPUTS)
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"][:, 0].all()
    assert_same(left.encode(INPUTS), alone)


def test_a_saved_model_loads_and_gives_equal_vectors(embedder, alone, tmp_path):
    with torch.no_grad():
        named = embedder.backbone.model.get_decoder().named_parameters()
        name, weight = next((name, weight) for name, weight in named if name.endswith("down_proj.weight"))
        kept = weight.clone()
        weight.neg_()  # the checkpoint must win over its base
    expected = embedder.encode(INPUTS)
    embedder.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        weight.copy_(kept)
    again = load(tmp_path / "saved")
    np.testing.assert_allclose(again.encode(INPUTS), expected, atol=1e-6)
    assert np.abs(expected - alone).max() > 1e-3, name
    assert (tmp_path / "saved" / "tokenizer.json").is_file() and (
        tmp_path / "saved" / "processor_config.json"
    ).is_file()


@pytest.mark.parametrize("head", [True, False])
def test_weights_in_the_other_layouts_of_keys_give_the_same_vectors(family, head, alone, tiny_vlm, tmp_path):
    """Files have the names of older classes, of today's class with a language-model head, or of the model below it."""
    kind = transformers.AutoModelForImageTextToText if head else transformers.AutoModel
    state = {name: value.clone() for name, value in kind.from_pretrained(tiny_vlm(family)).state_dict().items()}
    for file in tiny_vlm(family).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(load(tmp_path).encode(INPUTS), alone)


def test_a_second_load_starts_after_the_first_model_is_gone(tiny_vlm, tmp_path, monkeypatch):
    head, plain = transformers.AutoModelForImageTextToText, transformers.AutoModel
    state = {name: value.clone() for name, value in head.from_pretrained(tiny_vlm("qwen2_vl")).state_dict().items()}
    for file in tiny_vlm("qwen2_vl").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    first, alive = [], []
    load_plain, load_head = plain.from_pretrained, head.from_pretrained

    def load_first(*args, **options):
        model, report = load_plain(*args, **options)
        first.append(weakref.ref(model))
        return model, report

    def load_second(*args, **options):
        gc.collect()
        alive.append(first[0]() is not None)
        return load_head(*args, **options)

    monkeypatch.setattr(plain, "from_pretrained", load_first)
    monkeypatch.setattr(head, "from_pretrained", load_second)
    load(tmp_path)
    assert alive == [False]


def test_lora_adapts_the_linear_layers_of_the_language_model_only(embedder):
    model = embedder.backbone.model
    inside = {id(module) for module in model.get_decoder().modules()}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    adapted = {name for name in linear if re.fullmatch(embedder.backbone.lora_targets, name)}
    assert adapted == {name for name in linear if id(model.get_submodule(name)) in inside}
    leaves = {name.rpartition(".")[2] for name in adapted}
    assert leaves >= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("vision" in name or "visual" in name for name in adapted)


def test_an_adapter_is_saved_and_loaded_onto_its_base(tiny_vlm, tmp_path):
    tuned = load(tiny_vlm("qwen2_vl"))
    checkpoint.add_adapter(tuned.backbone, 2, 4, 0.0, None)
    with torch.no_grad():
        for name, weight in tuned.backbone.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    expected = tuned.encode(INPUTS)
    tuned.save_pretrained(tmp_path / "adapter")
    np.testing.assert_allclose(load(tmp_path / "adapter").encode(INPUTS), expected, atol=1e-6)


def test_llava_next_equals_the_golden_vectors_of_transformers_4_46():
    folder = GOLDEN / "llava-next"
    cases = json.loads((folder / "golden.json").read_text())["cases"]
    inputs = [
        {"text": case["text"].replace("<image>", "<|image_1|>")}
        | ({"image": folder / case["image"]} if case["image"] else {})
        for case in cases
    ]
    expected = np.array([case["base"] for case in cases])
    assert_same(load(folder / "base").encode(inputs), expected, at_least=0.9995)


def test_llava_next_on_vicuna_equals_an_unbatched_forward(tmp_path):
    build_llava_next(tmp_path, transformers.LlamaConfig)
    expected = [forward_by_hand(tmp_path, "llava_next", value, slots) for value, slots in CASES]
    assert_same(load(tmp_path).encode(INPUTS), np.concatenate(expected))


def test_settings_of_the_image_processor_reach_it_and_are_saved(qwen, tiny_vlm, tmp_path):
    small = load(tiny_vlm("qwen2_vl"), max_pixels=28 * 56)
    tokens = [len(model.backbone.process(INPUTS[1:2])["input_ids"][0]) for model in (small, qwen)]
    assert tokens[0] < tokens[1]
    small.save_pretrained(tmp_path / "small")
    again = load(tmp_path / "small")
    assert again.backbone.options() == {"max_pixels": 28 * 56, "positions": "vision-start"}
    np.testing.assert_allclose(again.encode(INPUTS[1:2]), small.encode(INPUTS[1:2]), atol=1e-6)


@pytest.mark.parametrize("options", [{"no_such_setting": 1}, {"padding_side": "top"}, {"positions": 3}])
def test_an_unknown_setting_is_one_clear_line(tiny_vlm, options):
    with pytest.raises(UserError, match=next(iter(options))) as caught:
        load(tiny_vlm("llava"), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage", ["no weights", "pickled weights", "cut weights", "broken tokenizer", "a weight less"]
)
def test_a_folder_that_cannot_be_loaded_is_one_clear_line(tiny_vlm, tmp_path, damage):
    source, folder = tiny_vlm("llava"), tmp_path / "damaged"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    if damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "broken tokenizer":
        (folder / "tokenizer.json").write_text("{")
    elif damage == "a weight less":
        state = load_file(weights)
        state.pop(next(name for name in state if "projector" in name))
        save_file(state, weights, metadata={"format": "pt"})
    else:
        if damage == "pickled weights":
            torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    with pytest.raises(UserError, match="damaged: cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"text": ""}, "empty text"),
        ({"text": "an <|image_pad|> token", "image": WIDE}, "<|image_pad|>"),
        ({"text": "an <|image_pad|> token"}, "<|image_pad|>"),
        ({"text": "<|image_2|>", "image": WIDE}, "one <|image_k|> for each image"),
        ({"text": "<|image_1|>"}, "one <|image_k|> for each image"),
    ],
)
def test_an_input_that_cannot_be_read_is_one_clear_line(qwen, value, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        qwen.encode([value])
    assert "\n" not in str(caught.value)


def test_a_image_of_extreme_shape_is_one_clear_line_that_names_it(qwen, tmp_path):
    draw_image(4000, 2, 0).save(tmp_path / "thin.png")
    with pytest.raises(UserError, match=r"thin\.png"):
        qwen.encode([tmp_path / "thin.png"])


def test_computing_in_bfloat16_stays_close_to_float32(family, alone, tiny_vlm):
    folder = str(tiny_vlm(family))
    half = backbone_class(folder).load(folder, torch.bfloat16)
    assert_same(Embedder(half, "base").eval().encode(INPUTS), alone, at_least=0.99)
