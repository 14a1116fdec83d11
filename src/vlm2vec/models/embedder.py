"""`Embedder`: a backbone with pooling and normalization, and its public methods.

Shapes: N inputs, B examples, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vlm2vec.batch import Batch
from vlm2vec.errors import UserError, shown
from vlm2vec.files import write_json
from vlm2vec.models import loading, st_folder
from vlm2vec.models.backbones.base import Backbone
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.checkpoints.card import write_card
from vlm2vec.models.checkpoints.dense import Dense, write_dense
from vlm2vec.models.checkpoints.folder import EMBEDDER_FILE, EmbedderFile
from vlm2vec.models.checkpoints.origin import Origin, folder_of
from vlm2vec.models.device import floating_type, process_device
from vlm2vec.models.encoding.pipeline import Pipeline
from vlm2vec.models.encoding.settings import EncodeSettings
from vlm2vec.models.loading import LoadSettings
from vlm2vec.quantize import check_precision, quantize_rows, ranges_of
from vlm2vec.types import require_many

Inputs = Iterable[Any]


class Embedder(nn.Module):
    """An embedding model for text, images, videos and combinations of them.

    Args:
        backbone: The model family's network and processor.
        base: Built-in name, folder or hub id of the backbone's weights.
        revision: Hub revision of the base.

    Attributes:
        prompts: Default instructions of `encode_query` ("query"), `encode_document` ("document") and `encode`
            ("default").
        head: `Dense` layers after the pooling, as sentence-transformers folders may have; usually none.
        truncate_dim: Number of dimensions that are kept; None: all.
        origin: The files that the weights were read from, if they are known.
    """

    def __init__(self, backbone: Backbone, base: str, revision: str | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.base = base
        self.revision = revision
        self.prompts: dict[str, str] = {}
        self.head = nn.Sequential()
        self.truncate_dim: int | None = None
        self.origin: Origin | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        base: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        like: str | None = None,
        quantize: str | None = None,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """Loads an embedding model.

        Args:
            source: The built-in "compact"; a folder that `save_pretrained`, `vlm2vec train` or
                sentence-transformers wrote; or a folder or hub id of a base VLM or of a PEFT adapter.
            base: Base model for an adapter. Default: the base that the adapter names.
            device: Device of the weights. Default: CUDA if available, else the CPU.
            dtype: Data type of the base weights, or its name. Default: `best_dtype(device)`.
            revision: Hub revision of the base.
            like: Hub id of a known published model of which `source` is a copy. Its template, pooling and settings
                are used. A known id as `source` needs no `like`.
            quantize: "int8" stores the weights of linear layers in 8 bits (torchao). An adapter is merged first.
            allow_pickle: Whether pickled weights, which can run code, are loaded.
            trust_remote_code: Whether Python code of the checkpoint is run.
            **options: Settings of the family, such as `num_layers` of "compact" or `max_pixels`; an unknown one is an
                error that lists the known ones.

        Raises:
            UserError: if `source` is not a checkpoint, its tensors do not fit the base, or an argument has no effect.
        """
        where = process_device(device)
        allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
        options |= {name: True for name, given in allowed.items() if given}
        settings = LoadSettings(floating_type(dtype, where), base, revision, like, options, where)
        loaded = loading.load(str(source), settings)
        embedder = cls(loaded.backbone, loaded.base, loaded.revision)
        embedder.prompts, embedder.truncate_dim = loaded.prompts, loaded.truncate_dim
        embedder.head.extend(loaded.head)
        embedder.to(where).eval()
        if quantize:
            checkpoint.quantize(embedder.backbone, quantize)
        facts = {"source": str(source), "dtype": settings.dtype, "like": like, "quantize": quantize, "options": options}
        folders = [folder_of(name, of) for name, of in ((str(source), revision), (loaded.base, loaded.revision))]
        embedder.origin = Origin.of(embedder.state_dict(), dict.fromkeys(folders), facts)
        return embedder

    def __repr__(self) -> str:
        """One line with what the vectors depend on; the network's layers are `repr(embedder.backbone)`."""
        dtype = str(self.dtype).removeprefix("torch.")
        prompts = ", ".join(f"{name}: {shown(text)}" for name, text in self.prompts.items())
        facts = f"embedding_dim={self.embedding_dim}, dtype={dtype}, device={self.device}, prompts={{{prompts}}}"
        return f"{type(self).__name__}({self.base!r}, {facts})"

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the base weights."""
        return next(self.parameters()).dtype

    @property
    def embedding_dim(self) -> int:
        """Length of the vectors."""
        layers = self.dense_layers()
        full = layers[-1].about.out_features if layers else self.backbone.pooled_dim
        return min(full, self.truncate_dim or full)

    def dense_layers(self) -> list[Dense]:
        """The layers of `head`."""
        return [layer for layer in self.head if isinstance(layer, Dense)]

    @property
    def max_length(self) -> int | None:
        """Maximum number of tokens read of a text; None: no limit.

        Longer texts are truncated. The first one is logged as a warning, and `num_truncated` counts all of them.
        """
        return self.backbone.max_length

    @property
    def num_truncated(self) -> int:
        """Number of inputs so far whose text was longer than `max_length`."""
        return self.backbone.num_truncated

    def forward(self, batch: Batch) -> torch.Tensor:
        """Unit-norm vectors [B, D] in float32."""
        return self.finish(self.backbone(batch))

    def finish(self, pooled_BP: torch.Tensor) -> torch.Tensor:
        """Unit-norm vectors [B, D] from what the backbone returns: dense layers, truncation, normalization."""
        vectors_BD = self.head(pooled_BP.float())
        return F.normalize(vectors_BD[:, : self.embedding_dim], dim=-1)

    def encode(  # noqa: PLR0913 - public arguments, all by keyword
        self,
        inputs: Inputs,
        *,
        instruction: str | None = None,
        truncate_dim: int | None = None,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        workers: int | None = None,
        on_error: Callable[[int, UserError], None] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Vectors of the inputs, in order. Use `encode_stream` if inputs or vectors do not fit in memory.

        Equal inputs are encoded once, and a vector does not depend on the other inputs.

        Args:
            inputs: Strings, image paths (`pathlib.Path`), PIL images, dicts (`text`, `image` / `images`, `video`,
                `instruction`) or `EmbeddingInput`s. A single string or dict is an error: pass a list.
            instruction: For inputs without one of their own. Default: `prompts["default"]`, if the model has one; ""
                means no instruction.
            truncate_dim: Keeps the first dimensions only and normalizes again. Default: all.
            precision: "float32", "float16", "int8", "uint8", "binary" or "ubinary", see `vlm2vec.quantize`.
            ranges: For int8 and uint8: minimum and maximum of each dimension. Default: those of these vectors.
            batch_size: Maximum number of inputs in a forward pass. Default: no limit.
            batch_tokens: Maximum number of tokens in a forward pass, visual tokens and padding included. Default: 2048
                on a CPU, 32768 on a GPU.
            workers: Threads that prepare inputs. Default: one per CPU core, at least 2 and at most 16.
            on_error: Called as `on_error(position, error)` for each bad input, whose row is zeros. Default: the first
                bad input raises.
            progress: Called with the number of inputs that were encoded since the last call.

        Returns:
            Array [N, D], of unit norm before quantization.

        Raises:
            UserError: for an empty or unreadable input, or an unknown precision.
        """
        check_precision(precision)
        settings = EncodeSettings(instruction, batch_size, batch_tokens, truncate_dim, workers, on_error, progress)
        parts = list(self._pipeline(inputs, settings).stream(inputs))
        bad = [part.begin + row for part in parts for row in part.bad]
        dim = truncate_dim or self.embedding_dim
        vectors_ND = np.concatenate([part.vectors for part in parts] or [np.zeros((0, dim), np.float32)])
        if ranges is None and precision.endswith("int8") and len(vectors_ND):
            ranges = ranges_of(np.delete(vectors_ND, bad, axis=0))
        return quantize_rows(vectors_ND, precision, ranges, bad)

    def encode_stream(  # noqa: PLR0913 - public arguments, all by keyword
        self,
        inputs: Inputs,
        *,
        instruction: str | None = None,
        truncate_dim: int | None = None,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        workers: int | None = None,
        on_error: Callable[[int, UserError], None] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """`encode` for any number of inputs in constant memory. Yields arrays [n, D] of consecutive inputs, in order.

        Inputs are taken from their iterator one window at a time. int8 and uint8 require `ranges`. Everything else is
        as in `encode`.
        """
        check_precision(precision)
        if precision.endswith("int8") and ranges is None:
            raise UserError(
                f"precision={precision}: ranges is missing; pass ranges=vlm2vec.quantize.ranges_of(sample of vectors)"
            )
        settings = EncodeSettings(instruction, batch_size, batch_tokens, truncate_dim, workers, on_error, progress)
        parts = self._pipeline(inputs, settings).stream(inputs)
        return (quantize_rows(part.vectors, precision, ranges, part.bad) for part in parts)

    def _pipeline(self, inputs: Inputs, settings: EncodeSettings) -> Pipeline:
        require_many(inputs, "encode")
        instruction = self.prompts.get("default") if settings.instruction is None else settings.instruction
        return Pipeline(self, replace(settings, instruction=instruction or None))

    def encode_query(self, inputs: Inputs, **kwargs: Any) -> np.ndarray:
        """`encode` with `prompts["query"]` as the default instruction."""
        return self.encode(inputs, **{"instruction": self.prompts.get("query", ""), **kwargs})

    def encode_document(self, inputs: Inputs, **kwargs: Any) -> np.ndarray:
        """`encode` with `prompts["document"]` as the default instruction."""
        return self.encode(inputs, **{"instruction": self.prompts.get("document", ""), **kwargs})

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine similarities of all pairs of unit-norm rows: [N, D] and [M, D] -> [N, M].

        Raises:
            UserError: if the vectors of the two sides have different numbers of dimensions.
        """
        first, second = np.asarray(a, dtype=np.float32), np.asarray(b, dtype=np.float32)
        if first.shape[-1:] != second.shape[-1:]:
            raise UserError(
                f"similarity of vectors of shapes {first.shape} and {second.shape}: expected equal dimensions"
            )
        return first @ second.T

    def save_pretrained(self, folder: str | Path, extra: Sequence[tuple[str, Any]] = ()) -> Path:
        """Writes a checkpoint folder in one step: an interrupted call leaves no partial folder.

        Args:
            folder: Replaced if it exists.
            extra: Further JSON files as (name, content).
        """
        folder = Path(folder)
        checkpoint.write_folder(folder, lambda beside: self.write_files(beside, extra))
        return folder

    def write_files(
        self, folder: Path, extra: Sequence[tuple[str, Any]] = (), state: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Writes the checkpoint's files into an existing folder.

        Args:
            folder: Must exist.
            extra: Further JSON files as (name, content).
            state: Weights to write. Default: the weights of the backbone.
        """
        adapter = checkpoint.save_weights(self.backbone, folder, state)
        self.backbone.save_processor(folder)
        about = EmbedderFile(
            base=self.base,
            revision=self.revision,
            options=self.backbone.options(),
            pooling=self.backbone.pooling,
            attention=self.backbone.attention,
            embedding_dim=self.embedding_dim,
            template=self.backbone.template.settings(),
            prompts=self.prompts,
            adapter=adapter,
            head=[f"{number}_Dense" for number in range(2, 2 + len(self.head))],
        )
        for name, dense in zip(about.head, self.dense_layers(), strict=True):
            write_dense(dense, folder / name)
        if self.backbone.attention == "causal":
            self.backbone.write_sentence_transformers(folder, self.prompts)
        else:  # sentence-transformers' own modules would use the family's mask
            st_folder.write_own(folder, self.prompts)
        st_folder.write_head(folder, about.head, self.truncate_dim)
        write_json(folder / EMBEDDER_FILE, about.content())
        for name, content in extra:
            write_json(folder / name, content)
        write_card(folder)

    def push_to_hub(
        self, repo_id: str, *, private: bool = True, pull_request: bool = False, message: str | None = None
    ) -> str:
        """Saves the model and uploads it to the Hugging Face hub; the token is `HF_TOKEN` or that of `hf auth login`.

        Args:
            repo_id: `owner/name`; created if it does not exist.
            private: Visibility of a new repository.
            pull_request: Opens a pull request instead of committing to the main branch.
            message: Commit message.

        Returns:
            URL of the commit or pull request.

        Raises:
            UserError: if the hub refuses.
        """
        from vlm2vec.models.checkpoints.push import push_folder

        with TemporaryDirectory() as folder:
            saved = self.save_pretrained(Path(folder) / "model")
            return push_folder(saved, repo_id, private=private, pull_request=pull_request, message=message)
