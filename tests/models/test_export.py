from __future__ import annotations

import ctypes
import gc
import json
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny.dual import build_clip
from tiny.models import draw_image

from vlm2vec import Embedder, UserError
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.verification import compare
from vlm2vec.models.verification.export import export, openvino_core
from vlm2vec.models.verification.golden import golden_inputs, verify_golden
from vlm2vec.types import EmbeddingInput

INPUTS = ["a dog", {"image": draw_image(40, 30, 1)}, {"image": draw_image(33, 41, 2), "text": "what?"}]


def load(folder: Path, **settings: Any) -> Embedder:
    return Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu", **settings)


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    with pytest.raises(UserError, match="not written, because a vector differs"):
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


def test_int8_weights_stay_close(adapter, tmp_path):
    pytest.importorskip("torchao")
    small = load(adapter, quantize="int8")  # merged first
    cosines = (small.encode(INPUTS) * load(adapter).encode(INPUTS)).sum(axis=1)
    assert 0.99 < cosines.min() < 0.9999999
    with pytest.raises(UserError, match="int8 cannot be saved"):
        small.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_golden_inputs_of_a_merged_folder_are_the_ones_of_its_source(adapter, merged):
    assert verify_golden(load(adapter), merged).min() > 0.99999
    assert len(golden_inputs()) == 8
