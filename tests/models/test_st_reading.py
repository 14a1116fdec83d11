from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny.models import draw_image

from vlm2vec import Embedder, UserError
from vlm2vec.models.st_reading import read_folder

SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer

WIDE, SMALL = draw_image(60, 30, 1), draw_image(33, 41, 2)
TEXT = "A red cat on the mat by the window today"
VALUES: list[Any] = [
    TEXT,
    SMALL,
    {"text": "what is left?", "image": SMALL},
    {"image": SMALL, "text": "what is left?"},
    {"image": [WIDE, SMALL], "text": "which is red?"},
]
C, B, P = "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"
Change = Callable[[Path], None]


def edit(file: str, **new: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **new}))

    return change


def content(file: str, new: Any) -> Change:
    return raw(file, json.dumps(new))


def raw(file: str, text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).write_text(text)

    return change


def both(first: Change, second: Change) -> Change:
    def change(folder: Path) -> None:
        first(folder)
        second(folder)

    return change


def answer(**call: Any) -> Change:
    """A chat template that reads a variable, and the folder's value of it."""

    def change(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text() + "{%- if add_generation_prompt -%} answer:{{ style }}{%- endif -%}")
        edit(B, processing_kwargs={"text": {"truncation": False}, "chat_template": call})(folder)

    return change


def moved(folder: Path) -> None:
    """The transformer in a folder of its own, as versions before 6 wrote it."""
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", C):
            path.rename(inner / path.name)
    rows = json.loads((folder / "modules.json").read_text())
    rows[0] |= {"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}
    (folder / "modules.json").write_text(json.dumps(rows))


def dense(residual: bool, bias: bool, after: tuple[int, ...] = (24,)) -> Change:
    """Dense layers between pooling and normalization, written by sentence-transformers."""

    def change(folder: Path) -> None:
        from sentence_transformers.base.modules.dense import Dense

        rows, width = json.loads((folder / "modules.json").read_text()), 32
        torch.manual_seed(0)
        for number, out in enumerate(after, start=2):
            layer = Dense(width, out, bias=bias, use_residual=residual)
            (folder / f"{number}_Dense").mkdir()
            layer.save(str(folder / f"{number}_Dense"))
            kind = "sentence_transformers.models.Dense"
            rows.insert(-1, {"idx": number, "name": f"dense {number}", "path": f"{number}_Dense", "type": kind})
            width = out
        (folder / "modules.json").write_text(json.dumps(rows))

    return change


@pytest.fixture(scope="module")
def plain(tiny_vlm, tmp_path_factory) -> Path:
    """A folder without `embedder.json`: what is known of it comes from the files of sentence-transformers."""
    embedder = Embedder.from_pretrained(tiny_vlm("llava"), dtype=torch.float32, device="cpu")
    embedder.prompts = {"query": "Find it: "}
    folder = embedder.save_pretrained(tmp_path_factory.mktemp("st") / "plain")
    (folder / "embedder.json").unlink()
    return folder


def changed(plain: Path, folder: Path, change: Change) -> Path:
    shutil.copytree(plain, folder)
    change(folder)
    return folder


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


LEGACY = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}
ASYMMETRIC = {"query": "", "document": None, "passage": "Passage: ", "other": "Other: "}
HONOURED: dict[str, tuple[Change, list[Any]]] = {
    "default_prompt_name": (edit(C, default_prompt_name="query"), VALUES),
    "prompts, one without text": (edit(C, prompts=ASYMMETRIC, default_prompt_name="other"), VALUES),
    "prompts of other names": (
        edit(C, prompts={"query": "Q: ", "passage": "P: "}, default_prompt_name="passage"),
        VALUES,
    ),
    "truncate_dim": (edit(C, truncate_dim=16), VALUES),
    "two pooling modes": (content(P, LEGACY), VALUES),
    "every pooling mode": (
        edit(P, pooling_mode=["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]),
        VALUES,
    ),
    "text max_length": (edit(B, processing_kwargs={"text": {"truncation": True, "max_length": 12}}), [TEXT, "short"]),
    "max_length of a template": (
        both(
            answer(add_generation_prompt=True, style="in brief"),
            edit(
                B,
                processing_kwargs={
                    "text": {"max_length": 40},
                    "chat_template": {"add_generation_prompt": True, "style": "in brief", "max_length": 30},
                },
            ),
        ),
        [TEXT * 2, "short"],
    ),
    "variables of the chat template": (answer(add_generation_prompt=True, style="in 'one' word"), VALUES),
    "image settings": (
        edit(B, processing_kwargs={"text": {"truncation": False}, "image": {"do_rescale": False}}),
        VALUES,
    ),
    "0_Transformer": (moved, VALUES),
    "Dense": (dense(residual=False, bias=True), VALUES),
    "two Dense, residual": (dense(residual=True, bias=False, after=(32, 20)), VALUES),
    "Dense and truncate_dim": (
        both(dense(residual=False, bias=True), edit(C, truncate_dim=8)),
        VALUES,
    ),
}


@pytest.mark.parametrize("name", HONOURED)
def test_a_setting_of_the_folder_gives_the_vectors_that_sentence_transformers_gives(plain, tmp_path, name):
    change, values = HONOURED[name]
    folder = changed(plain, tmp_path / "folder", change)
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    ours = Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu")
    again = Embedder.from_pretrained(ours.save_pretrained(tmp_path / "again"), dtype=torch.float32, device="cpu")
    there = SentenceTransformer(str(tmp_path / "again"), device="cpu", model_kwargs={"dtype": torch.float32})
    assert len(model) == len(json.loads((folder / "modules.json").read_text()))
    for method in ("encode", "encode_query", "encode_document"):
        expected = unit(getattr(model, method)(values))
        before = Embedder.from_pretrained(plain, dtype=torch.float32, device="cpu").encode(values)
        for embedder in (ours, again):
            found = getattr(embedder, method)(values)
            assert found.shape == expected.shape == (len(values), embedder.embedding_dim)
            np.testing.assert_allclose((found * expected).sum(axis=1), 1, atol=1e-5)
        np.testing.assert_allclose((unit(getattr(there, method)(values)) * expected).sum(axis=1), 1, atol=1e-5)
        if method == "encode" and name != "0_Transformer" and expected.shape == before.shape:
            assert (expected * before).sum(axis=1).min() < 0.9999, (
                "the change changes nothing, so the test proves nothing"
            )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit(C, new_key=1), "unknown key new_key"),
        (edit(C, default_prompt_name="other"), "default_prompt_name 'other' is not one of prompts"),
        (edit(C, similarity_fn_name="manhattan"), "similarity_fn_name 'manhattan'"),
        (edit(C, truncate_dim=0), "truncate_dim 0"),
        (edit(C, model_type="SparseEncoder"), "model_type 'SparseEncoder'"),
        (edit(B, new_key=1), "unknown key new_key"),
        (edit(B, do_lower_case=True), "do_lower_case True"),
        (edit(B, query_length=32), "query_length 32"),
        (edit(B, transformer_task="retrieval"), "transformer_task 'retrieval'"),
        (edit(B, model_kwargs={"num_layers": 1}), r"model_kwargs.num_layers is not supported"),
        (edit(B, config_kwargs={"hidden_size": 1}), "config_kwargs"),
        (edit(B, processing_kwargs={"speech": {}}), "unknown key processing_kwargs.speech"),
        (edit(B, processing_kwargs={"text": {"stride": 3}}), "processing_kwargs.text.stride is not supported"),
        (edit(B, processing_kwargs={"text": {"truncation": "only_first"}}), "truncation='only_first'"),
        (edit(B, processing_kwargs={"image": {"no_such": 3}}), "setting no_such"),
        (edit(B, processing_kwargs={"video": {"fps": 3}}), "processing_kwargs.video is not supported"),
        (edit(B, processing_kwargs={"chat_template": {"no_such": 3}}), "the template has no such variable"),
        (edit(B, processing_kwargs={"chat_template": {"restore_suffix": False}}), "restore_suffix=false"),
        (edit(B, modality_config={"smell": {"method": "forward"}}), "unknown kind of input smell"),
        (edit(B, modality_config={"text": {"method": "get_text_features"}}), "expected forward and last_hidden_state"),
        (edit(P, include_prompt=False), "include_prompt False"),
        (edit(P, pooling_mode="median"), "pooling_mode 'median' is not supported"),
        (edit(P, new_key=True), "unknown key new_key"),
        (edit(P, pooling_mode=[]), "pooling_mode"),
        (content(P, []), r"content \[\]"),
        (lambda folder: (folder / P).unlink(), "config.json: not found; expected the pooling mode in it"),
        (edit(B, max_seq_length=0), "max_seq_length 0"),
        (edit(B, processing_kwargs={"text": {"max_length": 0}}), "max_length 0: expected a number of tokens"),
        (edit(B, processing_kwargs={"text": {"max_length": 12.0}}), r"max_length 12\.0: expected a number of tokens"),
        (raw("modules.json", "null"), "expected a list of modules"),
        (content("modules.json", [{"type": "sentence_transformers.models.Pooling", "path": "../x"}]), r"path '\.\./x'"),
        (content("modules.json", [{"type": "sentence_transformers.models.Pooling", "path": "/etc"}]), "path '/etc'"),
        (edit("2_Normalize/config.json", module_input_name="token_embeddings"), "module_input_name"),
        (content("modules.json", [{"type": "x.Dense", "path": "3_Dense"}]), "module x.Dense is not supported"),
        (content("modules.json", [{"type": "custom_st.Transformer"}]), "module custom_st.Transformer is not supported"),
        (
            content("modules.json", [{"type": "sentence_transformers.models.Router"}]),
            r"module sentence_transformers.models.Router is not supported",
        ),
        (content("modules.json", [{"type": "sentence_transformers.models.Pooling"}]), "modules Pooling: expected"),
        (
            content("modules.json", [{"type": "sentence_transformers.models.Transformer", "name": "0"}] * 2),
            "two modules with the name '0'",
        ),
        (raw("modules.json", "{"), "not valid JSON"),
        (content("modules.json", {}), "expected a list of modules"),
    ],
)
def test_a_setting_that_is_not_supported_is_refused_by_name(plain, tmp_path, change, words):
    with pytest.raises(UserError, match=words) as caught:
        Embedder.from_pretrained(changed(plain, tmp_path / "folder", change))
    assert "\n" not in str(caught.value)


def test_an_input_with_an_image_beyond_the_limit_is_refused(plain, tmp_path):
    folder = changed(plain, tmp_path / "folder", edit(B, processing_kwargs={"text": {"max_length": 12}}))
    with pytest.raises(UserError, match="setting max_length"):
        Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu").encode([SMALL])


def test_a_dense_layer_that_does_not_fit_is_refused(plain, tmp_path):
    folder = changed(plain, tmp_path / "folder", dense(residual=False, bias=True))
    for file, change, words in (
        ("2_Dense/config.json", {"activation_function": "os.system"}, "activation_function 'os.system'"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.GLU"}, "'torch.nn.GLU': expected a class"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.PReLU"}, "'torch.nn.PReLU': expected a class"),
        ("2_Dense/config.json", {"out_features": 7}, "expects"),
        ("2_Dense/config.json", {"scale": 7}, "unknown key scale"),
    ):
        broken = changed(folder, tmp_path / re.sub(r"\W", "", words), edit(file, **change))
        with pytest.raises(UserError, match=words):
            Embedder.from_pretrained(broken)


def test_prompts_that_no_method_uses_are_said(plain, tmp_path, caplog):
    read_folder(changed(plain, tmp_path / "folder", edit(C, prompts={"query": "Q: ", "passage": "P: "})))
    assert "documents get no prompt, as in sentence-transformers; rename the prompt passage to document" in caplog.text


def test_a_folder_of_another_library_is_not_one_of_sentence_transformers(tmp_path):
    assert read_folder(tmp_path) is None


def test_embedder_json_is_read_in_full(plain, tiny_vlm, tmp_path):
    embedder = Embedder.from_pretrained(tiny_vlm("llava"), dtype=torch.float32, device="cpu")
    folder = embedder.save_pretrained(tmp_path / "saved")
    assert "normalize" not in json.loads((folder / "embedder.json").read_text())
    for change, words in (
        ({"format": 2}, "format 2"),
        ({"normalize": False}, "normalize False"),
        ({"embedding_dim": 33}, "embedding_dim 33: the weights give vectors of 32"),
        ({"colour": 1}, "unknown key colour"),
        ({"template": {"foo": "a"}}, "template .*unknown part 'foo'"),
    ):
        broken = changed(folder, tmp_path / next(iter(change)), edit("embedder.json", **change))
        with pytest.raises(UserError, match=words):
            Embedder.from_pretrained(broken)
    short = changed(folder, tmp_path / "short", edit("embedder.json", embedding_dim=16, normalize=True))
    half = Embedder.from_pretrained(short, dtype=torch.float32, device="cpu")
    np.testing.assert_allclose(half.encode([TEXT]), unit(embedder.encode([TEXT])[:, :16]), atol=1e-6)
