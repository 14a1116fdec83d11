"""`Embedder`: a backbone plus pooling and normalisation; the public verbs.

Shapes: N inputs, B examples, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vlm2vec.errors import UserError, shown
from vlm2vec.models import loading
from vlm2vec.models.backbones.base import Backbone
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.checkpoints.folder import EMBEDDER_FILE, EmbedderFile
from vlm2vec.models.device import process_device
from vlm2vec.models.encode import EncodeOptions, EncodeSettings, Pipeline
from vlm2vec.models.loading import LoadSettings
from vlm2vec.quantize import check_precision, quantize_rows, ranges_of
from vlm2vec.types import Batch, EmbeddingInput

Inputs = Iterable[Any]


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor computes in it natively, else float32 (emulated bfloat16 is many times slower)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if device.type == "cpu" and native else torch.float32


class Embedder(nn.Module):
    """One embedding model for text, images and both.

    Args:
        backbone: The model family's network and processor.
        base: Built-in name, folder or hub id that the backbone came from.
        revision: Hub revision of the base.

    Attributes:
        prompts: Instructions of `encode_query` ("query") and `encode_document` ("document"), where none is given.
    """

    def __init__(self, backbone: Backbone, base: str, revision: str | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.base = base
        self.revision = revision
        self.prompts: dict[str, str] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        base: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        like: str | None = None,
        quantize: str | None = None,
        **options: Any,
    ) -> Self:
        """Loads an embedding model.

        Args:
            source: A folder that `save_pretrained`, `vlm2vec train` or sentence-transformers wrote, a base VLM's
                folder or hub id, those of a PEFT adapter, or the built-in "compact" or "compact-embed".
            base: For an adapter folder: a base other than the one it names.
            device: Default: this process's own, see `vlm2vec.models.device.process_device`.
            dtype: Of the base weights. Default: `best_dtype(device)`.
            revision: Hub revision of the base.
            like: Hub id of a known published model of which `source` is a copy: its template, pooling and settings
                are used. A known id as `source` needs no `like`.
            quantize: "int8" keeps the linear layers' weights in 8 bits (torchao), an adapter merged.
            **options: Settings of the family, such as `num_layers` of "compact"; `allow_pickle=True` and
                `trust_remote_code=True`, both off unless said.

        Raises:
            UserError: if `source` is no checkpoint, or its tensors do not fit the base.
        """
        where = process_device(device)
        settings = LoadSettings(dtype or best_dtype(where), base, revision, like, options, where)
        loaded = loading.load(str(source), settings)
        embedder = cls(loaded.backbone, loaded.base, loaded.revision)
        embedder.prompts = loaded.prompts
        embedder.to(where).eval()
        if quantize:
            checkpoint.quantize(embedder.backbone, quantize)
        return embedder

    def __repr__(self) -> str:
        """One line with what the vectors depend on; the network's layers are `repr(embedder.backbone)`."""
        dtype = str(self.dtype).removeprefix("torch.")
        prompts = ", ".join(f"{name}: {shown(text)}" for name, text in self.prompts.items())
        facts = f"embedding_dim={self.embedding_dim}, dtype={dtype}, device={self.device}, prompts={{{prompts}}}"
        return f"{type(self).__name__}({self.base!r}, {facts})"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weights."""
        return next(self.parameters()).dtype

    @property
    def embedding_dim(self) -> int:
        """Length of the vectors."""
        return self.backbone.embedding_dim

    def forward(self, batch: Batch) -> torch.Tensor:
        """Unit-norm vectors [B, D] in float32."""
        return F.normalize(self.backbone(batch).float(), dim=-1)

    def encode(
        self,
        inputs: Inputs,
        *,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        **options: Unpack[EncodeOptions],
    ) -> np.ndarray:
        """Vectors of the inputs, in order; `encode_stream` where they or the inputs do not fit in memory.

        Equal inputs are encoded once, and a vector does not depend on the inputs beside it.

        Args:
            inputs: Strings, image paths (`pathlib.Path`), PIL images, dicts (`text`, `image` / `images`,
                `instruction`) or `EmbeddingInput`s. A single string, dict or image is refused: give a list.
            precision: "float32", "float16", "int8", "uint8", "binary" or "ubinary", see `vlm2vec.quantize`.
            ranges: For int8 and uint8: smallest and largest value of each dimension. Default: of these vectors.
            **options: `instruction` for inputs that have none of their own; `truncate_dim` keeps the first dimensions
                only, normalised again; `on_error(position, error)` is called for each bad input, whose row is then
                zeros (without it, the first bad input raises); `progress(done)` is called with the number of inputs
                done since the last call; `batch_size` inputs and `batch_tokens` tokens (visual ones and padding
                included) a forward pass at most, by default any number of inputs and tokens by device; `workers`
                threads that prepare inputs.

        Returns:
            Array [N, D], of unit norm before it is quantised.

        Raises:
            UserError: for an input that is empty or unreadable, or an unknown precision.
        """
        check_precision(precision)
        parts = list(self._pipeline(inputs, options).stream(inputs))
        bad = [part.begin + row for part in parts for row in part.bad]
        dim = options.get("truncate_dim") or self.embedding_dim
        vectors_ND = np.concatenate([part.vectors for part in parts] or [np.zeros((0, dim), np.float32)])
        if ranges is None and precision.endswith("int8") and len(vectors_ND):
            ranges = ranges_of(np.delete(vectors_ND, bad, axis=0))
        return quantize_rows(vectors_ND, precision, ranges, bad)

    def encode_stream(
        self,
        inputs: Inputs,
        *,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        **options: Unpack[EncodeOptions],
    ) -> Iterator[np.ndarray]:
        """`encode` of any number of inputs in flat memory: arrays [n, D] of consecutive inputs, in order.

        Inputs are taken from their iterator a window at a time. int8 and uint8 need `ranges`; the rest is as in
        `encode`.
        """
        check_precision(precision)
        if precision.endswith("int8") and ranges is None:
            raise UserError(f"precision {precision}: give ranges=, vlm2vec.quantize.ranges_of a sample of the vectors")
        parts = self._pipeline(inputs, options).stream(inputs)
        return (quantize_rows(part.vectors, precision, ranges, part.bad) for part in parts)

    def _pipeline(self, inputs: Inputs, options: EncodeOptions) -> Pipeline:
        if isinstance(inputs, str | dict | EmbeddingInput):
            raise UserError("encode expects a list of inputs; wrap the single one: encode([...])")
        return Pipeline(self, EncodeSettings(**options))

    def encode_query(self, inputs: Inputs, **kwargs: Any) -> np.ndarray:
        """`encode`; where no instruction is given, with that of `prompts["query"]`."""
        return self.encode(inputs, **{"instruction": self.prompts.get("query"), **kwargs})

    def encode_document(self, inputs: Inputs, **kwargs: Any) -> np.ndarray:
        """`encode`; where no instruction is given, with that of `prompts["document"]`."""
        return self.encode(inputs, **{"instruction": self.prompts.get("document"), **kwargs})

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosines of all pairs of unit-norm rows: [N, D] and [M, D] -> [N, M]."""
        return np.asarray(a, dtype=np.float32) @ np.asarray(b, dtype=np.float32).T

    def save_pretrained(self, folder: str | Path, extra: Sequence[tuple[str, Any]] = ()) -> Path:
        """Writes a checkpoint folder, whole or not at all.

        Args:
            folder: Replaced if it is there.
            extra: Further JSON files as (name, content).
        """
        folder = Path(folder)
        checkpoint.write_folder(folder, lambda beside: self.write_files(beside, extra))
        return folder

    def write_files(
        self, folder: Path, extra: Sequence[tuple[str, Any]] = (), state: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Writes the checkpoint's files into an existing folder; `state`: the backbone's weights from elsewhere."""
        adapter = checkpoint.save_weights(self.backbone, folder, state)
        self.backbone.save_processor(folder)
        about = EmbedderFile(
            base=self.base,
            revision=self.revision,
            options=self.backbone.options(),
            pooling=self.backbone.pooling,
            embedding_dim=self.embedding_dim,
            template=asdict(self.backbone.template),
            prompts=self.prompts,
            adapter=adapter,
        )
        self.backbone.write_sentence_transformers(folder, self.prompts)
        checkpoint.write_json(folder / EMBEDDER_FILE, about.model_dump())
        for name, content in extra:
            checkpoint.write_json(folder / name, content)
