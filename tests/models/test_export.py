from __future__ import annotations

import ctypes
import gc
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny.dual import build_clip
from tiny.models import draw_image

from vlm2vec import Embedder, UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.verification import compare
from vlm2vec.models.verification.export import export, openvino_core
from vlm2vec.models.verification.golden import golden_dtype, golden_inputs, verify_golden, write_golden
from vlm2vec.models.verification.verify import report_against, report_saved
from vlm2vec.types import EmbeddingInput

INPUTS = ["a dog", {"image": draw_image(40, 30, 1)}, {"image": draw_image(33, 41, 2), "text": "what?"}]


def load(folder: Path, **settings: Any) -> Embedder:
    return Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu", **settings)


@pytest.fixture(scope="module")
def adapter(tiny_vlm, tmp_path_factory) -> Path:
    """A LoRA checkpoint of a tiny LLaVA whose adapter matters."""
    tuned = load(tiny_vlm("llava"))
    checkpoint.add_adapter(tuned.backbone, 2, 4, 0.0, None)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in tuned.backbone.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("export") / "adapter"
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    build_clip(folder)
    return folder


@pytest.mark.parametrize("to", ["merged", "sentence-transformers"])
def test_a_merged_checkpoint_gives_the_vectors_of_its_adapter_and_needs_no_base(adapter, tiny_vlm, to, tmp_path):
    done = export(str(adapter), to, tmp_path / "out")
    assert done.cosine > 0.99999 and done.num_inputs == {"merged": 8, "sentence-transformers": 12}[to]
    names = {path.name for path in done.files}
    assert {"model.safetensors", "config.json", "modules.json", "golden.safetensors"} <= names
    assert not names & {"adapter_config.json", "adapter_model.safetensors"}
    merged = load(tmp_path / "out")
    np.testing.assert_allclose(merged.encode(INPUTS), load(adapter).encode(INPUTS), atol=1e-5)
    assert (merged.encode(INPUTS) * load(tiny_vlm("llava")).encode(INPUTS)).sum(axis=1).max() < 0.9999
    assert not any("lora" in name for name in load_file(tmp_path / "out/model.safetensors"))


def test_a_merged_dora_adapter_gives_its_vectors(tiny_vlm, tmp_path):
    from peft import LoraConfig, get_peft_model

    tuned = load(tiny_vlm("llava"))
    config = LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=tuned.backbone.lora_targets)
    tuned.backbone.model = get_peft_model(tuned.backbone.model, config)
    with torch.no_grad():
        for name, weight in tuned.backbone.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    expected = tuned.encode(INPUTS)
    checkpoint.merge_adapter(tuned.backbone)
    np.testing.assert_allclose(tuned.encode(INPUTS), expected, atol=1e-5)


def test_onnx_has_a_text_tower_of_any_batch_and_length(adapter, tmp_path):
    import onnxruntime

    done = export(str(adapter), "onnx", tmp_path / "out")
    assert done.cosine > 0.9999 and done.num_inputs == 5
    session = onnxruntime.InferenceSession(str(tmp_path / "out/text.onnx"))
    source = load(adapter)
    texts = ["z", "a much longer text than any of the golden ones " * 3, "b c"]
    batch = source.backbone.process([EmbeddingInput.of(text) for text in texts])
    given = {entry.name: batch[entry.name].numpy() for entry in session.get_inputs()}
    vectors = session.run(["sentence_embedding"], given)[0]
    assert (vectors * source.encode(texts)).sum(axis=1).min() > 0.9999


def test_openvino_of_a_dual_encoder_has_both_towers(clip, tmp_path):
    done = export(str(clip), "openvino", tmp_path / "out")
    assert done.cosine > 0.9999
    assert {"text.xml", "text.bin", "image.xml", "image.bin"} <= {path.name for path in done.files}
    assert not any("onnx" in path.name for path in done.files)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino_core().compile_model(str(tmp_path / "out/image.xml"), "CPU", exact)
    source = load(clip)
    images: list[Any] = [{"image": draw_image(50, 30, seed)} for seed in range(3)]
    pixels = source.backbone.process([EmbeddingInput.of(value) for value in images])["pixel_values"]
    assert (compiled(pixels.numpy())[0] * source.encode(images)).sum(axis=1).min() > 0.9999


def test_openvino_leaves_a_signal_stack_that_outlives_its_graphs(clip, tmp_path):
    class Stack(ctypes.Structure):
        _fields_: ClassVar = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

    export(str(clip), "openvino", tmp_path / "out")
    collector = threading.Thread(target=gc.collect)  # frees what a cycle holds in another thread than made it
    collector.start()
    collector.join()
    stack = Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    assert any(int(low, 16) <= (stack.start or 0) < int(high, 16) for low, high in ranges)


def test_an_export_that_differs_is_not_written(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "SAME", 1.5)
    with pytest.raises(UserError, match="not written: a vector differs"):
        export(str(clip), "merged", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("to", "words"), [("gguf", "expected one of merged"), ("onnx", "takes families of transf")])
def test_an_export_that_cannot_be_is_one_clear_line(to, words, tmp_path):
    with pytest.raises(UserError, match=words):
        export("compact", to, tmp_path / "out", num_layers=1, visual_tokens=4, image_size=64)
    assert not (tmp_path / "out").exists()


def test_a_merged_compact_gives_the_vectors_of_its_adapter(tmp_path):
    small = {"num_layers": 1, "visual_tokens": 4, "image_size": 64}
    tuned = load(Path("compact"), **small)
    checkpoint.add_adapter(tuned.backbone, 2, 4, 0.0, None)
    with torch.no_grad():
        for name, weight in tuned.backbone.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    assert export(str(tmp_path / "adapter"), "merged", tmp_path / "out").cosine > 0.9999
    np.testing.assert_allclose(load(tmp_path / "out").encode(INPUTS), tuned.encode(INPUTS), atol=1e-5)


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "out"
    export(str(adapter), "merged", folder)
    return folder


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
    for file in merged.rglob("*"):
        if file.is_file():
            target = folder / file.relative_to(merged)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
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
    with pytest.raises(UserError, match=r"refused every input; the first: http://.*/v1/embeddings: no answer"):
        report_against(merged, "server", "http://127.0.0.1:9", "any", {})
    with pytest.raises(UserError, match="expected one of sentence-transformers, server, vllm"):
        report_against(merged, "triton", "", "", {})
    with pytest.raises(UserError, match="vllm is not installed"):
        report_against(merged, "vllm", "", "", {})


def test_the_commands_say_where_the_result_is_and_how_close(adapter, tmp_path):
    from typer.testing import CliRunner

    from vlm2vec.cli import app

    out = str(tmp_path / "out")
    done = CliRunner().invoke(app, ["export", str(adapter), "--to", "merged", "-o", out])
    assert done.exit_code == 0 and "Lowest cosine to the source: 1.0000" in done.output.replace("0.9999999", "1.0000")
    done = CliRunner().invoke(app, ["verify", out, "--against", "sentence-transformers"])
    assert done.exit_code == 0 and done.output.count("cosine") == 13
    assert "EQUAL in sentence-transformers: 12 of 12 inputs" in done.output.strip().splitlines()[-1]
    e5v = str(tmp_path / "e5v")
    done = CliRunner().invoke(app, ["export", out, "--to", "merged", "-o", e5v, "--option", "fusion=sum"])
    assert done.exit_code != 0 and not (tmp_path / "e5v").exists()
    base = json.loads((tmp_path / "out/embedder.json").read_text())["base"]
    done = CliRunner().invoke(app, ["export", base, "--to", "merged", "-o", e5v, "--option", "like=royokong/e5-v"])
    assert done.exit_code == 0 and "Summary above" in (tmp_path / "e5v/embedder.json").read_text()
    done = CliRunner().invoke(app, ["verify", out])
    assert done.exit_code == 0 and "lowest" in done.output


def test_verify_refuses_a_folder_whose_vectors_changed(merged, tmp_path):
    for file in merged.rglob("*"):
        if file.is_file():
            target = tmp_path / file.relative_to(merged)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
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


def test_int8_weights_stay_close(adapter, tmp_path):
    pytest.importorskip("torchao")
    small = load(adapter, quantize="int8")  # merged first
    cosines = (small.encode(INPUTS) * load(adapter).encode(INPUTS)).sum(axis=1)
    assert 0.99 < cosines.min() < 0.9999999
    with pytest.raises(UserError, match="int8 are not saved"):
        small.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_golden_inputs_of_a_merged_folder_are_the_ones_of_its_source(adapter, merged):
    assert verify_golden(load(adapter), merged).min() > 0.99999
    assert len(golden_inputs()) == 8
