from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny.models import draw_image

from vlm2vec import Embedder, UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.models.verification import compare
from vlm2vec.models.verification.export import export
from vlm2vec.models.verification.golden import golden_dtype, golden_inputs, write_golden
from vlm2vec.models.verification.verify import report_against, report_saved
from vlm2vec.types import EmbeddingInput

INPUTS = ["a dog", {"image": draw_image(40, 30, 1)}, {"image": draw_image(33, 41, 2), "text": "what?"}]


def load(folder: Path, **settings: Any) -> Embedder:
    return Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu", **settings)


def test_verify_against_sentence_transformers_says_that_all_is_equal(merged):
    lines = report_against(merged, "sentence-transformers", "", "", {})
    assert all("cosine 1.0000" in line or "cosine 0.99999" in line for line in lines)
    kinds = {line.partition(":")[0] for line in lines}
    assert {"image + text", "text + image", "text + image + image", "image + text + image"} <= kinds
    assert "EQUAL to the saved golden vectors: 8 of 8" in report_saved(merged, {})[0]


def test_verify_gives_a_chat_model_text_between_images_as_a_message(tiny_vlm, tmp_path):
    shown = load(tiny_vlm("llava"), like="royokong/e5-v")
    shown.save_pretrained(tmp_path / "saved")
    lines = report_against(tmp_path / "saved", "sentence-transformers", "", "", {})
    assert len(lines) == 13 and all("cosine 1.0000" in line for line in lines)
    assert export(str(tmp_path / "saved"), "sentence-transformers", tmp_path / "out").num_inputs == 12


def test_an_input_that_the_other_side_refuses_is_listed_and_not_compared(tiny_vlm, tmp_path):
    embedder = load(tiny_vlm("llava"))

    def no_second_image(item: EmbeddingInput) -> compare.Stages:
        if len(item.images) > 1:
            raise UserError("one image per input")
        return compare.Stages(embedder.encode([item])[0])

    found = compare.compare(embedder, no_second_image)
    assert [difference.detail for difference in found if difference.cosine is None] == ["one image per input"] * 3


def change_json(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def damage_prompt(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text("{{- 'Hello ' -}}" + path.read_text())


def damage_tokens(folder: Path) -> None:
    change_json(
        folder / "sentence_bert_config.json", {"processing_kwargs": {"text": {"truncation": True, "max_length": 9}}}
    )


def damage_pixels(folder: Path) -> None:
    path = folder / "sentence_bert_config.json"
    change_json(path, {"processing_kwargs": {"text": {"truncation": False}, "image": {"image_mean": [0.1, 0.2, 0.3]}}})


def damage_pooling(folder: Path) -> None:
    change_json(folder / "1_Pooling/config.json", {"pooling_mode": "mean"})


@pytest.mark.parametrize(
    ("damage", "stage"),
    [
        (damage_prompt, "prompt bytes: here 'a dog"),
        (damage_tokens, "token ids: here"),
        (damage_pixels, "pixel values: pixel_values: largest difference"),
        (damage_pooling, "pooling: the last hidden states are equal"),
    ],
)
def test_verify_names_the_first_stage_that_differs(merged, tmp_path, damage, stage):
    folder = tmp_path / "damaged"
    shutil.copytree(merged, folder)
    damage(folder)
    with pytest.raises(UserError, match=f"first stage that differs: {stage}") as caught:
        report_against(folder, "sentence-transformers", "", "", {})
    assert "\n" not in str(caught.value)


def test_positions_and_weights_are_told_apart(tiny_vlm):
    embedder = load(tiny_vlm("qwen2_vl"))
    item = EmbeddingInput.of(INPUTS[2])
    other = load(tiny_vlm("qwen2_vl"))
    other.backbone.template = embedder.backbone.template
    batch = embedder.backbone.process([item])
    ids, pixels = batch["input_ids"][0].tolist(), {"pixel_values": batch["pixel_values"]}
    shifted = batch["position_ids"] + 1
    stages = compare.Stages(np.zeros(32), None, ids, None, pixels, shifted)
    assert compare.first_difference(embedder, item, stages)[0] == "positions"
    stages = compare.Stages(np.zeros(32), None, ids, None, pixels, batch["position_ids"], np.ones(32))
    assert compare.first_difference(embedder, item, stages)[0] == compare.NETWORK


class Server(BaseHTTPRequestHandler):
    """`/v1/embeddings` as servers in the wild have it: `input`, or `messages` with data URIs."""

    embedder: ClassVar[Embedder]
    extra: ClassVar[str] = ""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        value: dict[str, Any] = {"text": body["input"][0]} if "input" in body else {"images": []}
        for message in body.get("messages", []):
            if message["role"] == "system":
                value["instruction"] = message["content"]
                continue
            for part in message["content"]:
                if part["type"] == "text":
                    value["text"] = part["text"]
                else:
                    value["images"].append(ImageRef.of(part["image_url"]["url"]))
        if value.get("text"):
            value["text"] += self.extra
        item = EmbeddingInput.of(value)
        tokens = int(self.embedder.backbone.process([item])["attention_mask"].sum())
        vector = self.embedder.encode([item])[0].tolist()
        answer = json.dumps({"data": [{"index": 0, "embedding": vector}], "usage": {"prompt_tokens": tokens}}).encode()
        self.send_response(200 if self.path == "/v1/embeddings" else 404)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(merged) -> Iterator[tuple[str, type[Server]]]:
    handler = type("Handler", (Server,), {"embedder": load(merged)})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_verify_against_a_server_compares_its_vectors_and_its_number_of_tokens(merged, served):
    url, handler = served
    lines = report_against(merged, "server", url, "any", {})
    assert len(lines) == 13 and all("cosine 1.0000" in line or "cosine 0.99999" in line for line in lines)
    handler.extra = " and more"
    with pytest.raises(UserError, match=r"DIFFERENT in server for text .*prompt bytes or token ids: here \d+ tok"):
        report_against(merged, "server", url + "/v1", "any", {})


def test_verify_names_what_it_cannot_reach_or_does_not_know(merged):
    with pytest.raises(UserError, match=r"rejected every input; the first: http://.*/v1/embeddings: no response"):
        report_against(merged, "server", "http://127.0.0.1:9", "any", {})
    with pytest.raises(UserError, match="expected one of sentence-transformers, server, vllm"):
        report_against(merged, "triton", "", "", {})
    with pytest.raises(UserError, match="vllm is not installed"):
        report_against(merged, "vllm", "", "", {})


def test_verify_refuses_a_folder_whose_vectors_changed(merged, tmp_path):
    shutil.copytree(merged, tmp_path, dirs_exist_ok=True)
    change_json(tmp_path / "embedder.json", {"pooling": "mean"})
    with pytest.raises(UserError, match=r"DIFFERENT from the saved golden vectors: lowest cosine .* in float32"):
        report_saved(tmp_path, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_golden_vectors_are_computed_in_the_precision_that_they_state(tiny_vlm, tmp_path, dtype):
    embedder = Embedder.from_pretrained(tiny_vlm("llava"), dtype=dtype, device="cpu")
    embedder.save_pretrained(tmp_path / "saved")
    expected = embedder.encode(golden_inputs(), batch_size=1)

    def under_autocast(batch: Any) -> torch.Tensor:  # as accelerate leaves a model that it trained
        with torch.autocast("cpu", torch.bfloat16):
            return type(embedder).forward(embedder, batch)

    embedder.forward = under_autocast  # type: ignore[method-assign]
    trained = embedder.encode(golden_inputs(), batch_size=1)
    write_golden(embedder, tmp_path / "saved")
    np.testing.assert_array_equal(load_file(tmp_path / "saved/golden.safetensors")["embeddings"].numpy(), expected)
    assert embedder.forward is under_autocast and golden_dtype(tmp_path / "saved") is dtype
    assert dtype is torch.bfloat16 or np.abs(trained - expected).max() > 1e-4
    lines = report_saved(tmp_path / "saved", {"device": "cpu"})
    assert len(lines) == 1 and "EQUAL to the saved golden vectors: 8 of 8" in lines[0]
    assert lines[0].endswith(str(dtype).removeprefix("torch."))
