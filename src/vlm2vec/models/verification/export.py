"""Exports a checkpoint (merged, sentence-transformers, vLLM, ONNX, OpenVINO) and compares it with its source."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError
from vlm2vec.models.backbones.dual import DualEncoder
from vlm2vec.models.backbones.generic import Generic
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.embedder import Embedder
from vlm2vec.models.verification import compare, vllm_export
from vlm2vec.models.verification.golden import golden_inputs, write_golden
from vlm2vec.types import EmbeddingInput

TOKENS = ("input_ids", "attention_mask", "position_ids")
Run = Callable[[list[np.ndarray]], np.ndarray]
FORMATS = ("merged", "sentence-transformers", "vllm", "onnx", "openvino")


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        files: Paths of the files.
        cosine: Lowest cosine to the source over the golden inputs that the format supports.
        num_inputs: Number of these inputs.
    """

    files: list[Path]
    cosine: float
    num_inputs: int


def export(source: str, to: str, output: Path, **options: Any) -> Exported:
    """Exports a checkpoint and compares its vectors with those of the source.

    Args:
        source: Any source that `Embedder.from_pretrained` accepts; it is computed in float32 on the CPU.
        to: One of `FORMATS`.
        output: A new folder; it is complete or absent afterwards.
        **options: Settings of the family.

    Raises:
        UserError: for a format that the family does not support, or if the vectors differ.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}: expected one of {', '.join(FORMATS)}")
    if output.exists():
        raise UserError(f"{output}: already exists; choose another folder or delete it")
    embedder = Embedder.from_pretrained(source, device="cpu", dtype=torch.float32, **options)
    expected = dict(zip(golden_inputs(), embedder.encode(golden_inputs()), strict=True))
    checkpoint.merge_adapter(embedder.backbone)
    if to == "vllm":
        vllm_export.check_served(embedder)
    results: list[Exported] = []

    def write(beside: Path) -> None:
        if to in ("onnx", "openvino"):
            results.append(_export_components(embedder, to, beside, expected))
        else:
            results.append(_export_folder(embedder, to, beside, expected, output.name))
        if results[0].cosine < compare.SAME:
            raise UserError(
                f"{output}: not written, because a vector differs from the source (cosine {results[0].cosine:.6f})"
            )

    checkpoint.write_folder(output, write)
    files = sorted(path for path in output.rglob("*") if path.is_file())
    return Exported(files, results[0].cosine, results[0].num_inputs)


def _export_folder(
    embedder: Embedder, to: str, folder: Path, expected: dict[EmbeddingInput, np.ndarray], name: str
) -> Exported:
    embedder.write_files(folder)
    write_golden(embedder, folder)
    if to == "vllm":
        vllm_export.write_served(embedder, folder, name)
    again = Embedder.from_pretrained(folder, device="cpu", dtype=torch.float32)
    vectors = again.encode(list(expected), batch_size=1)
    cosine = float((vectors * np.stack(list(expected.values()))).sum(axis=1).min())
    if to != "sentence-transformers":
        return Exported([], cosine, len(expected))
    there = compare.sentence_transformers(folder, bool(again.backbone.template.chat))
    found = compare.compare(again, there)
    cosines = [difference.cosine for difference in found if difference.cosine is not None]  # without rejected inputs
    if not cosines:
        raise UserError(f"sentence-transformers rejects every input; the first: {found[0].detail}")
    return Exported([], min(cosine, *cosines), len(cosines))


class _Component(nn.Module):
    """One kind of input of an embedder as a plain function of tensors: the form that exporters take."""

    def __init__(self, embedder: Embedder, names: list[str]) -> None:
        super().__init__()
        self.embedder, self.names = embedder, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        backbone = self.embedder.backbone
        if isinstance(backbone, DualEncoder):
            features = backbone.image_features(given) if "pixel_values" in given else backbone.text_features(given)
            return self.embedder.finish(features)
        vectors: torch.Tensor = self.embedder(Batch(given))
        return vectors


def _export_components(
    embedder: Embedder, to: str, folder: Path, expected: dict[EmbeddingInput, np.ndarray]
) -> Exported:
    backbone = embedder.backbone
    kinds = {"text": [item for item in expected if not item.images]}
    if isinstance(backbone, DualEncoder):
        kinds["image"] = [item for item in expected if not item.text and not item.instruction and item.images]
    elif not isinstance(backbone, Generic):
        raise UserError(f"{backbone.name}: --to {to} takes families of transformers; use merged")
    make = {"onnx": _to_onnx, "openvino": _to_openvino}[to]
    cosines = []
    for kind, items in kinds.items():
        items = items if len(items) > 1 else items * 2  # a single example would fix the batch size of the graph
        batches = [_tensors(backbone, kind, part) for part in (items, items[:1])]
        names = list(batches[0])
        component = _Component(embedder, names).eval()
        run = make(component, batches[0], folder / f"{kind}.{'onnx' if to == 'onnx' else 'xml'}")
        for batch, part in zip(batches, (items, items[:1]), strict=True):
            vectors = run([batch[name].numpy() for name in names])
            cosines += [float(vector @ expected[item]) for vector, item in zip(vectors, part, strict=True)]
    backbone.save_processor(folder)
    return Exported([], min(cosines), len(cosines))


def _tensors(backbone: Any, kind: str, items: list[EmbeddingInput]) -> dict[str, torch.Tensor]:
    batch = backbone.process(items)
    if kind == "image":
        return {name: batch[name] for name in batch.rows}
    if isinstance(backbone, DualEncoder):
        names = [name for name in ("input_ids", "attention_mask") if name in backbone.tokenizer.model_input_names]
    else:
        names = [name for name in TOKENS if name in batch.tensors]
    return {name: batch[name] for name in names}


def _graph(component: nn.Module, tensors: dict[str, torch.Tensor]) -> Any:
    """The component as a graph of any batch size and length, as far as the model allows."""
    free = torch.export.Dim.AUTO
    axes = tuple(dict.fromkeys(range(2 if name in TOKENS else 1), free) for name in tensors)
    with torch.inference_mode():
        return torch.export.export(component, tuple(tensors.values()), dynamic_shapes=(axes,), strict=False)


def _to_onnx(component: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("onnx is not installed: pip install 'vlm2vec[onnx]'") from error
    graph = _graph(component, tensors)
    torch.onnx.export(
        graph, (), str(path), input_names=list(tensors), output_names=["sentence_embedding"], verbose=False
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(arrays: list[np.ndarray]) -> np.ndarray:
        given = {name: array for name, array in zip(tensors, arrays, strict=True) if name in names}
        return np.asarray(session.run(None, given)[0])

    return run


@cache
def openvino_core() -> Any:
    """Returns the OpenVINO core of this process, which is never freed.

    The CPU plugin sets the signal stack of the thread that creates it. If it is freed in another thread, it unmaps that
    stack while it is in use, and the process crashes at the next signal (observed with OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()


def _to_openvino(component: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> Run:
    try:
        import openvino
    except ImportError as error:
        raise UserError("openvino is not installed: pip install 'vlm2vec[openvino]'") from error
    core = openvino_core()
    # Convert through ONNX: openvino's convert_model sends telemetry unless the user has opted out.
    with tempfile.TemporaryDirectory() as folder:
        _to_onnx(component, tensors, Path(folder) / "component.onnx")
        openvino.save_model(core.read_model(Path(folder) / "component.onnx"), str(path), compress_to_fp16=False)
    compiled = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [given.any_name for given in compiled.inputs]

    def run(arrays: list[np.ndarray]) -> np.ndarray:
        given = {name: array for name, array in zip(tensors, arrays, strict=True) if name in names}
        return np.asarray(compiled(given)[0])

    return run
