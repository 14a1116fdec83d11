"""Reads the settings of a sentence-transformers folder; every key of its files is either applied or rejected by name.

Supports version 6.2 and the older names of its keys; sentence-transformers itself is not imported.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from vlm2vec.errors import UserError, shown
from vlm2vec.files import read_json
from vlm2vec.models.checkpoints.tensors import checked, read_model
from vlm2vec.models.st_folder import CONFIG_FILE, MODULES_FILE, POOLING_MODES, TRANSFORMER_FILE

logger = logging.getLogger(__name__)
PACKAGE = "sentence_transformers."
ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Settings of a processor call that do not change vectors, or that vlm2vec sets itself.
NO_EFFECT = ("return_tensors", "padding", "pad_to_multiple_of", "restore_suffix")
PRECISION = ("dtype", "torch_dtype", "attn_implementation", "low_cpu_mem_usage", "use_safetensors", "trust_remote_code")
NOT_FOR_DOCUMENTS = ("passage", "corpus")  # sentence-transformers looks for these too, but always has a `document`


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _ModelFile(_Strict):
    """`config_sentence_transformers.json`."""

    versions: dict[str, Any] = Field({}, alias="__version__")
    model_type: Literal["SentenceTransformer"] = "SentenceTransformer"
    prompts: dict[str, str | None] | None = None
    default_prompt_name: str | None = None
    similarity_fn_name: Literal["cosine", "dot", "euclidean"] | None = None
    truncate_dim: int | None = Field(None, ge=1)


class _Module(_Strict):
    """An entry of `modules.json`."""

    idx: int = 0
    name: str = ""
    path: str = ""
    type: str
    kwargs: list[str] = Field([], max_length=0)


class _PoolingFile(_Strict):
    """`config.json` of `Pooling`."""

    embedding_dimension: int | None = None
    word_embedding_dimension: int | None = None
    pooling_mode: str | Annotated[list[str], Field(min_length=1)] | None = None
    include_prompt: Literal[True] = True
    pooling_mode_cls_token: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False


class _NormalizeFile(_Strict):
    """`config.json` of `Normalize`."""

    module_input_name: Literal["sentence_embedding"] = "sentence_embedding"
    module_output_name: Literal["sentence_embedding"] | None = None


class _Modality(_Strict):
    """Method of the model for a kind of input."""

    method: Literal["forward", "get_text_features", "get_image_features"]
    method_output_name: Literal["last_hidden_state", "pooler_output"] | None = None
    format: Literal["structured"] | None = None


class _Processing(_Strict):
    """Settings of processor calls, by kind of input."""

    common: dict[str, Any] = {}
    text: dict[str, Any] = {}
    image: dict[str, Any] = {}
    video: dict[str, Any] = {}
    audio: dict[str, Any] = {}
    chat_template: dict[str, Any] = {}


class _TransformerFile(_Strict):
    """`sentence_bert_config.json`."""

    transformer_task: Literal["feature-extraction"] = "feature-extraction"
    modality_config: dict[str, _Modality] = {}
    module_output_name: Literal["token_embeddings", "sentence_embedding"] | None = None
    processing_kwargs: _Processing = _Processing()
    unpad_inputs: bool | None = None
    query_length: None = None
    document_length: None = None
    query_expansion: None = None
    max_seq_length: int | None = Field(None, ge=1)
    do_lower_case: Literal[False] = False
    tokenizer_name_or_path: None = None
    model_kwargs: dict[str, Any] = {}
    processor_kwargs: dict[str, Any] = {}
    config_kwargs: dict[str, Any] = Field({}, max_length=0)
    model_args: dict[str, Any] = {}
    tokenizer_args: dict[str, Any] = {}
    config_args: dict[str, Any] = Field({}, max_length=0)

    @field_validator("modality_config")
    @classmethod
    def _known_kinds(cls, value: dict[str, _Modality]) -> dict[str, _Modality]:
        known = {"text", "image", "video", "audio", "message"}
        for kind in value:
            if unknown := set(kind.split("+")) - known:
                raise ValueError(f"unknown kind of input {min(unknown)}; expected {', '.join(sorted(known))}")
        return value


@dataclass(frozen=True)
class SentenceTransformersFolder:
    """Settings of a sentence-transformers folder that affect its vectors.

    Attributes:
        transformer: The folder with the weights.
        pooling: Name in `POOLINGS`; None if a method of the model computes the vector (dual encoders).
        chat: Whether inputs go through the chat template.
        chat_variables: Values of variables of the chat template.
        prompts: Instructions by name. "default" is used if the caller gives none.
        options: Settings of the family.
        truncates: Whether inputs are truncated, to `max_length` or to the tokenizer's limit.
        max_length: Maximum number of tokens.
        dense: Folders of the layers after the pooling, in order.
        truncate_dim: Number of dimensions that are kept.
    """

    transformer: Path
    pooling: str | None
    chat: bool
    chat_variables: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    truncates: bool = True
    max_length: int | None = None
    dense: list[Path] = field(default_factory=list)
    truncate_dim: int | None = None


def read_folder(folder: Path) -> SentenceTransformersFolder | None:
    """Reads a sentence-transformers folder; None if there is no `modules.json`.

    Raises:
        UserError: naming the file and the module, key or value that is not supported.
    """
    if not (folder / MODULES_FILE).is_file():
        return None
    rows = read_json(folder / MODULES_FILE)
    modules = _modules(folder / MODULES_FILE, rows)
    by_kind = {kind: [folder / path for name, path in modules if name == kind] for kind in ORDER}
    transformer = by_kind["Transformer"][0]
    path = transformer / TRANSFORMER_FILE
    about = _transformer_file(path)
    pooled = by_kind["Pooling"]
    _check_methods(path, about, bool(pooled))
    for normalize in by_kind["Normalize"]:
        read_model(normalize / "config.json", _NormalizeFile)
    text, options = _settings(path, about)
    whole = read_model(folder / CONFIG_FILE, _ModelFile)
    unit = bool(by_kind["Normalize"]) and whole.truncate_dim is None
    if whole.similarity_fn_name in ("dot", "euclidean") and not unit:
        raise UserError(
            f"{folder / CONFIG_FILE}: similarity_fn_name {whole.similarity_fn_name} is not supported for vectors "
            "without unit norm; expected cosine"
        )
    return SentenceTransformersFolder(
        transformer=transformer,
        pooling=_pooling(pooled[0] / "config.json") if pooled else None,
        chat="message" in about.modality_config,
        chat_variables={
            name: value
            for name, value in about.processing_kwargs.chat_template.items()
            if name not in (*NO_EFFECT, "truncation", "max_length")
        },
        prompts=_prompts(folder / CONFIG_FILE, whole),
        options=options,
        truncates=text.get("truncation", True) not in (False, "do_not_truncate"),
        max_length=text.get("max_length", about.max_seq_length),
        dense=by_kind["Dense"],
        truncate_dim=whole.truncate_dim,
    )


def _modules(path: Path, rows: Any) -> list[tuple[str, str]]:
    """Returns kind and folder of each module, after checking that their order is supported."""
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of modules")
    found: list[tuple[str, str]] = []
    names: set[str] = set()
    for row in rows:
        module = checked(path, row, _Module)
        if module.name in names:  # sentence-transformers would keep only the last of them
            raise UserError(f"{path}: two modules with the name {shown(module.name)}; expected different names")
        names.add(module.name)
        kind = module.type.rpartition(".")[2]
        if not module.type.startswith(PACKAGE) or kind not in ORDER:
            raise UserError(
                f"{path}: module {module.type[:80]} is not supported; "
                f"expected sentence-transformers' own {', '.join(ORDER)}"
            )
        if Path(module.path).is_absolute() or ".." in Path(module.path).parts:
            raise UserError(f"{path}: path {shown(module.path)}: expected a folder below this one")
        found.append((kind, module.path))
    kinds = [kind for kind, _ in found]
    single = all(kinds.count(kind) <= 1 for kind in ("Transformer", "Pooling", "Normalize"))
    if kinds[0] != "Transformer" or kinds != sorted(kinds, key=ORDER.index) or not single:
        raise UserError(f"{path}: modules {', '.join(kinds)}: expected one each, in the order {', '.join(ORDER)}")
    return found


def _transformer_file(path: Path) -> _TransformerFile:
    other = sorted(file.name for file in path.parent.glob("sentence_*_config.json") if file.name != path.name)
    if other and not path.is_file():
        raise UserError(f"{path.parent / other[0]}: not supported; expected {path.name}")
    return read_model(path, _TransformerFile)


def _check_methods(path: Path, about: _TransformerFile, pooled: bool) -> None:
    """Rejects a method of the model that is inconsistent with the modules."""
    for kind, how in about.modality_config.items():
        forward = how.method == "forward" and how.method_output_name in ("last_hidden_state", None)
        if pooled != forward:
            expected = "forward and last_hidden_state before Pooling" if pooled else "get_..._features without Pooling"
            raise UserError(
                f"{path}: modality_config.{kind}: method {how.method} ({how.method_output_name}): expected {expected}"
            )
    if not pooled and not about.modality_config:
        raise UserError(f"{path.parent}: no Pooling among the modules; expected one after Transformer")


def _settings(path: Path, about: _TransformerFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the text settings, and the family settings derived from image and processor settings."""
    calls = about.processing_kwargs
    named = calls.chat_template
    chat: dict[str, Any] = {name: named[name] for name in ("truncation", "max_length") if name in named}
    text: dict[str, Any] = {**calls.common, **calls.text, **chat}
    options = {name: value for name, value in calls.image.items() if name not in NO_EFFECT}
    for given in (about.processor_kwargs, about.tokenizer_args):
        options |= {name: value for name, value in given.items() if name not in PRECISION}
    if "model_max_length" in options:
        text = {"max_length": options.pop("model_max_length"), **text}
    if "padding_side" in text:
        options["padding_side"] = text.pop("padding_side")
    unknown = {f"processing_kwargs.text.{name}" for name in set(text) - {*NO_EFFECT, "truncation", "max_length"}}
    for given in (about.model_kwargs, about.model_args):
        unknown |= {f"model_kwargs.{name}" for name in set(given) - set(PRECISION)}
    unknown |= {f"processing_kwargs.{kind}" for kind in ("video", "audio") if getattr(calls, kind)}
    if (limit := text.get("max_length")) is not None and (type(limit) is not int or limit < 1):
        raise UserError(f"{path}: max_length {shown(limit)}: expected a number of tokens")
    if text.get("truncation") not in (None, True, False, "longest_first", "do_not_truncate"):
        unknown.add(f"processing_kwargs.text.truncation={shown(text['truncation'])}")
    if calls.chat_template.get("restore_suffix", True) is not True:
        unknown.add("processing_kwargs.chat_template.restore_suffix=false")
    if unknown:
        raise UserError(f"{path}: {min(unknown)} is not supported")
    return text, options


def _pooling(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path}: not found; expected the pooling mode in it (copy the folder again)")
    about = read_model(path, _PoolingFile)
    legacy = [mode for key, mode in LEGACY_MODES.items() if getattr(about, key)]
    given = about.pooling_mode or legacy or "mean"
    ours = {theirs: name for name, theirs in POOLING_MODES.items()}
    modes = [given] if isinstance(given, str) else given
    for mode in modes:
        if mode not in ours:
            raise UserError(f"{path}: pooling_mode {shown(mode)} is not supported; expected {', '.join(sorted(ours))}")
    return "+".join(ours[mode] for mode in modes)


def _prompts(path: Path, about: _ModelFile) -> dict[str, str]:
    """Returns the instructions: sentence-transformers' prompts, with its default and its rule for documents."""
    given = {name: text or "" for name, text in (about.prompts or {}).items()}
    prompts = {name: text for name, text in given.items() if text and name != "default"}
    if "document" not in given and (unused := [name for name in NOT_FOR_DOCUMENTS if given.get(name)]):
        logger.warning(
            "%s: documents get no prompt, as in sentence-transformers; rename the prompt %s to document, or pass it "
            "as instruction",
            path,
            unused[0],
        )
    if about.default_prompt_name is not None:
        if about.default_prompt_name not in {"query", "document", *given}:
            raise UserError(f"{path}: default_prompt_name {shown(about.default_prompt_name)} is not one of prompts")
        default = given.get(about.default_prompt_name, "")
        prompts |= {"default": default} if default else {}
    return prompts
