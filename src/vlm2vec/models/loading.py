"""Loads a backbone with its weights, template, pooling and prompts: one function per kind of source.

A source is the name of a built-in, a folder or a hub id. A hub id whose repository describes its vectors
(`embedder.json` or `modules.json`) is downloaded and treated as a folder.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from vlm2vec.errors import UserError
from vlm2vec.models import st_reading
from vlm2vec.models.backbones.base import WEIGHTS_FILE, Backbone
from vlm2vec.models.checkpoints import adapters, hub, known
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.checkpoints.dense import Dense, read_dense
from vlm2vec.models.checkpoints.folder import EMBEDDER_FILE
from vlm2vec.models.checkpoints.replaced import refuse_weights_of_replaced
from vlm2vec.models.prompts import PromptTemplate, with_variables
from vlm2vec.models.registry import BUILT_IN, KNOWN, backbone_class
from vlm2vec.models.st_folder import RERANKER_FILE
from vlm2vec.models.st_reading import SentenceTransformersFolder
from vlm2vec.models.vision import resolution
from vlm2vec.models.vision.patch_embed import use_matrix_products

logger = logging.getLogger(__name__)
CPU = torch.device("cpu")
NO_LIMIT = 10**6  # tokenizers without a limit give a number of tokens that no model reads


@dataclass(frozen=True)
class LoadSettings:
    """Arguments of `Embedder.from_pretrained`, which explains them.

    Attributes:
        dtype: Data type of the base weights.
        base: Base model for an adapter. Default: the base that the adapter names.
        revision: Hub revision of the base.
        like: Hub id of the known checkpoint whose template, pooling and settings are used.
        options: Settings of the family.
        device: Device of the weights. Files are read directly into GPU memory.
    """

    dtype: torch.dtype
    base: str | None = None
    revision: str | None = None
    like: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    device: torch.device = CPU


@dataclass
class Loaded:
    """The parts of an `Embedder`, with the names that its saved folder records.

    Attributes:
        backbone: On the device of the settings or on the CPU; the caller moves it.
        base: Built-in name, folder or hub id of the base weights.
        revision: Hub revision of `base`.
        prompts: Instructions of `encode_query`, `encode_document` and `encode` ("default").
        head: Layers after the pooling.
        truncate_dim: Number of dimensions that are kept; None: all.
    """

    backbone: Backbone
    base: str
    revision: str | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    head: list[Dense] = field(default_factory=list)
    truncate_dim: int | None = None

    @property
    def dim(self) -> int:
        """Length of the vectors before truncation."""
        return self.head[-1].about.out_features if self.head else self.backbone.pooled_dim

    def add_head(self, folders: list[Path], allow_pickle: bool) -> None:
        """Reads the layers after the pooling.

        Raises:
            UserError: for a layer whose input length differs from the length of the preceding output.
        """
        for folder in folders:
            dense = read_dense(folder, allow_pickle)
            if dense.about.in_features != self.dim:
                raise UserError(f"{folder}: in_features {dense.about.in_features}: expected {self.dim}")
            self.head.append(dense)


def load(source: str, settings: LoadSettings) -> Loaded:
    """Loads any kind of source.

    Raises:
        UserError: if `source` is not a checkpoint, or its tensors do not fit the base.
    """
    if not source.strip():
        raise UserError(f"the name of the model is empty; expected a folder, a hub id or one of {', '.join(KNOWN)}")
    row = known.find_named(settings.like) if settings.like else known.find(source)
    folder = Path(source) if row else hub.local_folder(source, settings.revision)
    if folder == Path(source):
        return _load_folder(folder, source, row, settings)
    loaded = _load_folder(folder, str(folder), None, replace(settings, revision=None))
    if loaded.base == str(folder):
        loaded.base, loaded.revision = source, settings.revision
    return loaded


def _load_folder(folder: Path, source: str, row: known.KnownCheckpoint | None, settings: LoadSettings) -> Loaded:
    """Chooses the loader by the files in the folder. A hub id has no folder here."""
    if (folder / EMBEDDER_FILE).is_file():
        return load_saved(folder, settings)
    if (folder / RERANKER_FILE).is_file():
        raise UserError(
            f"{folder}: is a reranker and gives no embeddings; use Reranker.from_pretrained or vlm2vec rerank"
        )
    if row is not None:
        return load_known(source, row, settings)
    if about := st_reading.read_folder(folder):
        return load_sentence_transformers(folder, about, settings)
    loaded = load_adapter_or_base(source, settings)
    if source not in BUILT_IN:
        logger.warning("%s: not a known embedding model; using the default template and pooling of its family", source)
    return loaded


def load_saved(folder: Path, settings: LoadSettings) -> Loaded:
    """A folder that `Embedder.save_pretrained` wrote: a whole transformers model, an adapter, or weights alone."""
    saved = checkpoint.read_embedder_file(folder)
    backbone, base, revision = load_backbone(folder, saved, settings)
    backbone.template = PromptTemplate(**saved.template)
    backbone.pooling, backbone.attention = saved.pooling, saved.attention
    loaded = Loaded(backbone, base, revision, saved.prompts)
    loaded.add_head([folder / name for name in saved.head], allow_pickle=False)
    if saved.embedding_dim > loaded.dim:
        raise UserError(
            f"{folder / EMBEDDER_FILE}: embedding_dim {saved.embedding_dim}: the weights give vectors of {loaded.dim}; "
            "the file belongs to another model"
        )
    loaded.truncate_dim = saved.embedding_dim if saved.embedding_dim < loaded.dim else None
    return loaded


class SavedWeights(Protocol):
    """What a saved folder's JSON file says about its weights.

    Attributes:
        base: Built-in name, folder or hub id of the base weights.
        revision: Hub revision of `base`.
        options: Settings of the family.
        adapter: Whether the weights are an adapter.
    """

    base: str
    revision: str | None
    options: dict[str, Any]
    adapter: bool


def load_backbone(folder: Path, saved: SavedWeights, settings: LoadSettings) -> tuple[Backbone, str, str | None]:
    """The backbone of a saved folder with its weights, and the base and its revision that were used.

    Raises:
        UserError: if the weights are those of a built-in model that was replaced, or do not fit the base.
    """
    weights = checkpoint.ADAPTER_FILE if saved.adapter else WEIGHTS_FILE
    refuse_weights_of_replaced(folder / weights, saved.base)
    options = resolution.merged(saved.options, settings.options)
    whole = not saved.adapter and (folder / checkpoint.CONFIG_FILE).is_file()
    base, revision = (settings.base, None) if settings.base else (saved.base, saved.revision)
    source, revision_there = (str(folder), None) if whole else (base, revision)
    backbone = load_base(source, settings.dtype, revision_there, options, settings.device)
    if saved.adapter:
        checkpoint.load_adapter(backbone, folder)
    elif not whole:
        checkpoint.load_weights(backbone, folder)
    return backbone, base, revision


def load_known(source: str, row: known.KnownCheckpoint, settings: LoadSettings) -> Loaded:
    """A published model, with the template, pooling, settings and prompts of its row in the table."""
    options = resolution.merged(row.options, settings.options)
    loaded = load_adapter_or_base(source, replace(settings, options=options))
    loaded.prompts = row.prompts
    loaded.backbone.template = known.template_of(row, loaded.backbone.chat_template()) or loaded.backbone.template
    loaded.backbone.pooling = row.pooling or loaded.backbone.pooling
    return loaded


def load_sentence_transformers(folder: Path, about: SentenceTransformersFolder, settings: LoadSettings) -> Loaded:
    """A sentence-transformers folder, with its pooling, chat template and prompts.

    Raises:
        UserError: if it uses a chat template and its processor has none.
    """
    options = resolution.merged(about.options, settings.options)
    loaded = load_adapter_or_base(str(about.transformer), replace(settings, options=options))
    backbone = loaded.backbone
    loaded.base = str(folder) if loaded.base == str(about.transformer) else loaded.base
    loaded.prompts = about.prompts
    if about.pooling is not None:  # else a dual encoder: the model's own methods give the vectors
        backbone.pooling = about.pooling
        backbone.template = _template(folder, about, backbone)
    loaded.add_head(about.dense, bool(options.get("allow_pickle")))
    loaded.truncate_dim = about.truncate_dim if (about.truncate_dim or loaded.dim) < loaded.dim else None
    limit = about.max_length or (backbone.tokenizer.model_max_length if about.pooling else None)
    if about.truncates and limit and limit < NO_LIMIT:
        backbone.limit_text(limit)
    return loaded


def _template(folder: Path, about: SentenceTransformersFolder, backbone: Backbone) -> PromptTemplate:
    """The chat template; without one, sentence-transformers writes the prompt directly before the text."""
    if not about.chat:
        return PromptTemplate(image="{image}", separator="", suffix="")
    variables = dict(about.chat_variables)
    chat = variables.pop("chat_template", backbone.chat_template())
    if isinstance(chat, dict):
        raise UserError(f"{folder}: several chat templates are not supported; expected one")
    if not chat:
        raise UserError(f"{folder}: its modules ask for a chat template, but the processor has none")
    return PromptTemplate(chat=with_variables(chat, variables), keeps_order=True)


def load_adapter_or_base(source: str, settings: LoadSettings) -> Loaded:
    """A base model of a family, or a PEFT adapter that another library saved, on its base."""
    adapter = adapters.find_adapter(source, settings.revision)
    if adapter is None:
        if settings.base:
            raise UserError(f"{source}: is no adapter, so base={settings.base} has no effect; leave it out")
        backbone = load_base(source, settings.dtype, settings.revision, settings.options, settings.device)
        return Loaded(backbone, source, settings.revision)
    base, revision = (settings.base, None) if settings.base else adapters.base_of(adapter)
    backbone = load_base(base, settings.dtype, revision, settings.options, settings.device)
    checkpoint.load_adapter(backbone, adapter, allow_pickle=bool(settings.options.get("allow_pickle")))
    return Loaded(backbone, base, revision)


def family_of(source: str, revision: str | None = None) -> type[Backbone]:
    """The class of the base model of any kind of source. Reads no weights.

    Raises:
        UserError: as `backbone_class`.
    """
    folder = hub.local_folder(source, revision)
    if (folder / EMBEDDER_FILE).is_file():
        saved = checkpoint.read_embedder_file(folder)
        if saved.adapter or not (folder / checkpoint.CONFIG_FILE).is_file():
            of = backbone_class if saved.base in BUILT_IN else family_of  # a folder may have the name of its base
            return of(saved.base, saved.revision)
    if source not in BUILT_IN and (adapter := adapters.find_adapter(source, revision)):
        return family_of(*adapters.base_of(adapter))
    return backbone_class(source, revision)


def load_base(
    base: str, dtype: torch.dtype, revision: str | None, options: dict[str, Any], device: torch.device = CPU
) -> Backbone:
    """Weights and processor of a model family: a built-in name, a folder or a hub id."""
    pinned = {"revision": revision} if revision else {}
    # transformers reads safetensors straight to the device of this context, without a copy in host memory.
    with torch.device(device) if device.type == "cuda" else nullcontext():
        backbone = backbone_class(base, revision).load(base, dtype, **pinned, **options)
    use_matrix_products(backbone)
    return backbone
