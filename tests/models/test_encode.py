"""`Embedder.encode`: the pipeline equals encoding inputs one at a time, in any batch, with repeats and bad inputs."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny.models import draw_image

from vlm2vec import Embedder
from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.models.encoding import pipeline as encode
from vlm2vec.models.encoding.pipeline import Pipeline
from vlm2vec.models.encoding.settings import EncodeSettings


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def embedder(request: pytest.FixtureRequest, tiny_vlm) -> Embedder:
    return Embedder.from_pretrained(tiny_vlm(request.param), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def llava(tiny_vlm) -> Embedder:
    return Embedder.from_pretrained(tiny_vlm("llava"), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Texts and images with texts of very different lengths, in no order."""
    folder = tmp_path_factory.mktemp("pictures")
    values: list[object] = []
    for i in range(12):
        draw_image(40 + 5 * i, 60 - 3 * i, i).save(folder / f"{i}.png")
        words = f"word {i} " * (1 + 7 * i % 5)
        values += [words, {"text": words, "image": folder / f"{i}.png"}, folder / f"{i}.png"]
    return values


@pytest.fixture(scope="module")
def alone(embedder: Embedder, inputs: list[object]) -> np.ndarray:
    """Every input by itself, without the pipeline."""
    from vlm2vec.types import EmbeddingInput

    with torch.inference_mode():
        rows = [embedder(embedder.backbone.process([EmbeddingInput.of(value)])) for value in inputs]
    return torch.cat(rows).numpy()


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, groups and batches so small that every border is crossed."""
    monkeypatch.setattr(encode, "WINDOW", 10)
    monkeypatch.setattr(encode, "GROUP", 3)
    monkeypatch.setattr(encode, "POOL_BATCHES", 2)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"batch_tokens": 60}, {"batch_tokens": 1, "workers": 1}])
def test_vectors_are_those_of_each_input_alone_in_input_order(embedder, inputs, alone, small_steps, options) -> None:
    np.testing.assert_allclose(embedder.encode(inputs, **options), alone, atol=2e-6)


def test_a_second_run_gives_the_same_bits(embedder, inputs) -> None:
    assert np.array_equal(embedder.encode(inputs, workers=4), embedder.encode(inputs, workers=1))


def test_batches_mix_texts_and_images_and_keep_to_the_budget(llava, inputs, monkeypatch) -> None:
    seen = []
    real = Pipeline._vectors
    monkeypatch.setattr(Pipeline, "_vectors", lambda self, batch: (seen.append(batch), real(self, batch))[1])
    llava.encode(inputs, batch_tokens=100)
    for batch in seen:
        rows, longest = batch["input_ids"].shape
        assert rows == 1 or rows * longest <= 100
    assert any(
        0 < int((batch.rows["pixel_values"] > 0).sum()) < len(batch) for batch in seen if "pixel_values" in batch.rows
    )
    padding = [1 - float(batch["attention_mask"].float().mean()) for batch in seen]
    assert np.mean(padding) < 0.2


def test_equal_inputs_are_encoded_once_wherever_they_lie(llava, tmp_path, small_steps, monkeypatch) -> None:
    draw_image(50, 50, 1).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    num_rows = []
    real = Pipeline._vectors
    monkeypatch.setattr(Pipeline, "_vectors", lambda self, batch: (num_rows.append(len(batch)), real(self, batch))[1])
    done: list[int] = []
    distinct = ["a text", tmp_path / "a.png", {"text": "a text", "image": tmp_path / "b.png"}]
    vectors = llava.encode([*distinct, tmp_path / "b.png"] * 10, progress=done.append)
    assert sum(num_rows) == 3 and sum(done) == 40
    assert np.array_equal(vectors[1], vectors[39]) and len(np.unique(vectors.round(5), axis=0)) == 3


def test_a_bad_input_is_reported_and_its_batch_mates_succeed(llava, inputs, alone_llava, tmp_path, small_steps) -> None:
    (tmp_path / "cut.png").write_bytes(Path(inputs[2]).read_bytes()[:80])
    bad = {
        3: tmp_path / "no.png",
        9: {"text": "t", "image": tmp_path / "cut.png"},
        10: {},
        11: 5,
        12: "",
        25: "<image>",
    }
    mixed = list(inputs[:30])
    for place, value in bad.items():
        mixed[place] = value
    errors: dict[int, UserError] = {}
    done: list[int] = []
    vectors = llava.encode(mixed, on_error=errors.__setitem__, progress=done.append)
    assert set(errors) == set(bad) and sum(done) == 30
    assert all(isinstance(error, UserError) and "\n" not in str(error) for error in errors.values())
    assert "no.png" in str(errors[3]) and "cut.png" in str(errors[9])
    assert not vectors[list(bad)].any()
    good = [i for i in range(30) if i not in bad]
    np.testing.assert_allclose(vectors[good], alone_llava[good], atol=2e-6)
    with pytest.raises(UserError, match=r"cut\.png"):
        llava.encode([*inputs[:9], mixed[9]])


@pytest.fixture(scope="module")
def alone_llava(llava: Embedder, inputs: list[object]) -> np.ndarray:
    return llava.encode(inputs, batch_size=1)


def test_repeated_bad_inputs_are_each_reported(llava, tmp_path) -> None:
    errors: dict[int, UserError] = {}
    llava.encode([tmp_path / "no.png", "a", tmp_path / "no.png"], on_error=errors.__setitem__)
    assert set(errors) == {0, 2}


def test_a_vector_of_numbers_that_are_none_is_an_error_of_its_input(tiny_vlm) -> None:
    broken = Embedder.from_pretrained(tiny_vlm("llava"), device="cpu", dtype=torch.float32)
    letter = int(broken.backbone.processor.tokenizer("q")["input_ids"][0])
    with torch.no_grad():
        broken.backbone.model.get_input_embeddings().weight[letter] = float("nan")
    errors: dict[int, UserError] = {}
    vectors = broken.encode(["a", "q", "b"], on_error=errors.__setitem__)
    assert set(errors) == {1} and np.isfinite(vectors).all() and vectors[[0, 2]].any(axis=1).all()


def test_a_batch_that_does_not_fit_in_memory_is_halved(llava, inputs, alone_llava, monkeypatch) -> None:
    real = Pipeline._vectors

    def little_memory(self, batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(Pipeline, "_vectors", little_memory)
    np.testing.assert_allclose(llava.encode(inputs), alone_llava, atol=2e-6)


def test_a_broken_device_ends_the_job_with_its_reason(llava, inputs, monkeypatch) -> None:
    def broken(self: Pipeline, batch: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Pipeline, "_vectors", broken)
    bad: list[int] = []
    with pytest.raises(RuntimeError, match="illegal memory access"):
        llava.encode(inputs, on_error=lambda position, error: bad.append(position))
    assert bad == [], "no input was recorded as failed"


def test_a_stream_takes_its_inputs_a_window_at_a_time_and_gives_them_in_order(llava, small_steps) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            yield f"text {taken}"
            taken += 1

    stream = llava.encode_stream(endless())
    first, second = next(stream), next(stream)
    assert taken <= 20
    stream.close()
    expected = llava.encode([f"text {i}" for i in range(20)], batch_size=1)
    np.testing.assert_allclose(np.concatenate([first, second]), expected, atol=2e-6)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlm2vec-prepare")]


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_precisions_mean_what_sentence_transformers_means(llava, inputs, alone_llava, precision, small_steps) -> None:
    from sentence_transformers.util import quantize_embeddings

    whole = llava.encode(inputs)
    found = llava.encode(inputs, precision=precision)
    expected = quantize_embeddings(whole, precision)
    assert found.dtype == expected.dtype and np.array_equal(found, expected)
    ranges = np.stack([whole.min(axis=0), whole.max(axis=0)])
    stream = np.concatenate(list(llava.encode_stream(inputs, precision=precision, ranges=ranges)))
    assert np.array_equal(stream, expected)
    assert llava.encode([], precision=precision).shape == (0, expected.shape[1])


def test_bad_rows_take_no_part_in_the_ranges(llava, tmp_path) -> None:
    texts = ["one", "two two", "three"]
    errors: dict[int, UserError] = {}
    with_bad = llava.encode([*texts, tmp_path / "no.png"], precision="int8", on_error=errors.__setitem__)
    assert np.array_equal(with_bad[:3], llava.encode(texts, precision="int8")) and not with_bad[3].any()


def test_half_precision_and_fewer_dimensions_are_the_vectors_cut_and_rounded(llava, inputs, alone_llava) -> None:
    cut = llava.encode(inputs, truncate_dim=8, precision="float16")
    expected = alone_llava[:, :8] / np.linalg.norm(alone_llava[:, :8], axis=1, keepdims=True)
    assert cut.dtype == np.float16
    np.testing.assert_allclose(cut, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int4"}, "int4"),
        ({"truncate_dim": 33}, "truncate_dim=33"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"precision": "int8"}, "two vectors"),
        ({"precision": "int8", "ranges": np.zeros((2, 3))}, "ranges of shape"),
        ({"precision": "int8", "ranges": np.full((2, 32), np.nan)}, "ranges: expected finite values"),
        (
            {"precision": "uint8", "ranges": np.array([np.ones(32), np.zeros(32)])},
            "the smallest of each dimension first",
        ),
        ({"truncate_dim": 8.0}, r"truncate_dim=8\.0: expected a whole number"),
        ({"batch_size": "8"}, "batch_size='8': expected a whole number"),
        ({"workers": True}, "workers=True: expected a whole number"),
    ],
)
def test_wrong_settings_are_one_clear_line(llava, options, words) -> None:
    with pytest.raises(UserError, match=words):
        llava.encode(["a"], **options)


def test_a_stream_in_int8_asks_for_ranges_and_a_lone_input_for_a_list(llava) -> None:
    with pytest.raises(UserError, match="ranges="):
        llava.encode_stream(["a"], precision="int8")
    with pytest.raises(UserError, match="list of inputs"):
        llava.encode("a")


def test_vectors_of_different_sizes_have_no_similarity(llava) -> None:
    assert llava.similarity(llava.encode(["a"]), llava.encode(["b", "c"])).shape == (1, 2)
    with pytest.raises(UserError, match=r"similarity of vectors of shapes \(1, 32\) and \(1, 8\)"):
        llava.similarity(llava.encode(["a"]), llava.encode(["b"], truncate_dim=8))


def test_training_mode_is_as_it_was(llava) -> None:
    llava.train()
    trained = llava.encode(["a"])
    assert llava.training
    llava.eval()
    assert np.array_equal(trained, llava.encode(["a"]))


def test_with_a_cache_of_images_one_worker_prepares_and_the_bits_stay(inputs, tmp_path) -> None:
    compact = Embedder.from_pretrained("compact", device="cpu", num_layers=1, visual_tokens=4, image_size=64)
    plain = compact.encode(inputs)
    compact.backbone.cache_images(tmp_path / "first")
    first = compact.encode(inputs)
    compact.backbone.cache_images(tmp_path / "second")
    assert np.array_equal(compact.encode(inputs), first)
    np.testing.assert_allclose(first, plain, atol=1e-2)
    assert compact.backbone.vision_cache.num_encoded == 12


def test_arguments_of_encode_are_explicit_and_those_of_encode_stream_the_same() -> None:
    arguments = inspect.signature(Embedder.encode).parameters
    assert arguments == inspect.signature(Embedder.encode_stream).parameters
    assert set(arguments) == {"self", "inputs", "precision", "ranges", *EncodeSettings.__dataclass_fields__}


BAD_INPUTS = [
    ({"text": float("nan")}, "input: text is nan of type float; expected a string"),
    ({"text": 5}, "input: text is 5 of type int; expected a string"),
    ({"text": "a", "instruction": 3.5}, "input: instruction is 3.5 of type float"),
    (float("nan"), "input: found nan of type float; expected a text, an image or its path, or a dict of these"),
    (None, "input: found None of type NoneType"),
    ({"image": "no\0file.png"}, r"'no\x00file.png': the image file is missing"),
    ({"image": np.zeros((4, 4))}, "image of type ndarray"),
    ({"video": 7}, "video of type int"),
    ("a\ud83d", "input: character 2 is a lone surrogate (U+D83D), half of a surrogate pair; replace it"),
    ({"text": "a", "instruction": "\udc80"}, "input: character 1 is a lone surrogate (U+DC80)"),
    ({"image": Path("a.png"), "images": [Path("b.png")]}, "input has both image and images"),
    (["a list"], "input: found ['a list'] of type list"),
    (Path("s3://bucket/a.png"), "the image file is missing"),
    ({"image": "s3://bucket/a.png"}, "image 's3://bucket/a.png': URLs are not fetched"),
    ({"images": [Path("gone.png"), float("nan")]}, "image of type float"),
]


@pytest.mark.parametrize(("value", "words"), BAD_INPUTS, ids=[repr(value)[:30] for value, _ in BAD_INPUTS])
def test_whatever_one_input_causes_is_an_error_of_that_input(llava, value, words) -> None:
    errors: dict[int, UserError] = {}
    vectors = llava.encode(["fine", value, "good"], on_error=errors.__setitem__)
    assert list(errors) == [1] and words in str(errors[1])
    assert not vectors[1].any() and np.allclose(np.linalg.norm(vectors[[0, 2]], axis=1), 1)
    with pytest.raises(UserError, match=re.escape(words)):
        llava.encode([value, "fine"])


@pytest.mark.parametrize("error", [TypeError("a bug"), KeyError("x"), AssertionError(), RuntimeError("shapes differ")])
def test_an_error_of_the_network_for_one_row_leaves_the_others_and_keeps_its_cause(llava, monkeypatch, error) -> None:
    usual = Pipeline._vectors
    poison = llava.backbone.tokenizer("q")["input_ids"][0]

    def vectors(self: Pipeline, batch: Batch) -> torch.Tensor:
        if poison in batch["input_ids"]:
            raise error
        return usual(self, batch)

    monkeypatch.setattr(Pipeline, "_vectors", vectors)
    errors: dict[int, UserError] = {}
    made = llava.encode(["a", "q", "b", "c"], on_error=errors.__setitem__)
    assert list(errors) == [1] and errors[1].__cause__ is error and "the model cannot encode" in str(errors[1])
    assert made[[0, 2, 3]].any(axis=1).all() and not made[1].any()


def test_a_row_that_waits_for_its_batch_is_counted_once_not_with_every_later_row(llava, monkeypatch) -> None:
    counted: list[int] = []
    size = encode._size
    monkeypatch.setattr(encode, "_size", lambda rows: counted.append(len(rows)) or size(rows))
    llava.encode([f"text {number}" for number in range(300)])
    assert sum(counted) <= 2 * 300
