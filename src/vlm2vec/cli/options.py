"""Options that several commands share, and the parser of `key=value`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from vlm2vec.errors import UserError, shown
from vlm2vec.progress import say

if TYPE_CHECKING:
    from vlm2vec.jobs.sources import Source
    from vlm2vec.retrieval.vector_store import VectorStore

Value = TypeVar("Value")
DEFAULT_MODEL = "compact"
"""The model of commands that are given none."""

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help=f"A run, a checkpoint folder, a hub id or a built-in model; default: {DEFAULT_MODEL}."
    ),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]
OptionsOption = Annotated[
    list[str] | None, typer.Option("--option", help="Setting of the model family, as key=value; may be repeated.")
]
CacheOption = Annotated[
    Path | None, typer.Option("--cache", help="Folder of the embedding cache; default: inside the user's cache folder.")
]
OldCacheOption = Annotated[Path | None, typer.Option("--store", hidden=True)]
"""The spelling of `CacheOption` in version 0.1; see `renamed`."""
EncodingOption = Annotated[str, typer.Option("--encoding", help="Encoding of text files and tables.")]
STORE_HELP = "Vector store: photos.lance, or qdrant://host:port/collection."
StoreUri = Annotated[str, typer.Option("--store", help=STORE_HELP)]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help=STORE_HELP)]
TasksOption = Annotated[list[str] | None, typer.Option("--task", help="Use this task only; may be repeated.")]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="Folder of the evaluation sets; default: the one in the benchmark file.")
]
WorkersOption = Annotated[
    int, typer.Option("--workers", min=1, help="Number of Ray actors; each loads its own copy of the model.")
]
GpusOption = Annotated[
    float | None,
    typer.Option("--gpus", min=0, help="GPUs of each Ray actor; default: the cluster's GPUs, at most one each."),
]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Address of a Ray cluster; default: start one on this machine.")
]
PickleOption = Annotated[bool, typer.Option("--allow-pickle", help="Load pickled weights, which can run code.")]
RerankCosineOption = Annotated[
    float,
    typer.Option("--rerank-cosine", help="Add the embedder's cosine times this number to the reranker's log-odds."),
]


def renamed(value: Value, old_value: Value, option: str, old_option: str) -> Value:
    """The value of an option that may have been given by its deprecated name, which is reported in one line."""
    if not old_value:
        return value
    warn(f"{old_option} is deprecated; use {option}")
    return old_value


def warn(notice: str) -> None:
    """Prints a one-line notice to standard error, where it does not mix with results."""
    typer.echo(f"note: {notice}", err=True)


def about_model(model: str) -> str:
    """What the default model is for, and how to find a stronger one; "" for any other model."""
    if model != DEFAULT_MODEL:
        return ""
    return f"{model} is a small built-in model for a first try; vlm2vec models lists stronger ones"


def note_model(model: str) -> None:
    """Prints `about_model` to standard error, if there is something to say."""
    if about := about_model(model):
        warn(about)


def say_skipped(source: Source) -> None:
    """Prints which files of a source were skipped, and which columns are kept under another name."""
    for sentence in source.skipped():
        say(sentence)
    for name, column in source.renamed.items():
        say(f"Column {shown(name)} is kept as {column}")


def open_vector_store(uri: str) -> VectorStore:
    """Opens a vector store.

    Raises:
        UserError: if the address is missing, or there is no store.
    """
    from vlm2vec.retrieval.open import open_store

    if not uri:
        raise UserError("--store is missing: photos.lance, or qdrant://host:port/collection")
    return open_store(uri)


def settings_of(option: list[str] | None, allow_pickle: bool) -> dict[str, object]:
    """The settings of `--option` and `--allow-pickle`."""
    return dict(key_value(text) for text in option or []) | ({"allow_pickle": True} if allow_pickle else {})


def key_value(text: str, option: str = "--option", example: str = "num_layers=4") -> tuple[str, object]:
    """Reads `key=value`, the value as YAML; `option` and `example` are for the message."""
    import yaml

    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UserError(f"{option} {shown(text)}: expected key=value, such as {example}")
    try:
        return key.strip(), yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(
            f"{option} {shown(text)}: the value is not valid YAML; quote it, such as {key}='\"…\"'"
        ) from error


def rerank_cosine_of(weight: float, reranker: str | None, option: str = "--rerank") -> float:
    """The value of `--rerank-cosine`; `option` is the one that names the reranker.

    Raises:
        UserError: for a number that is no weight, and for a weight without a reranker.
    """
    from vlm2vec.models.reranking.scores import check_weight

    if check_weight(weight, "--rerank-cosine") and not reranker:
        raise UserError(f"--rerank-cosine {weight:g} has no effect without a reranker; add {option} MODEL")
    return weight


def model_and_source(first: str | None, second: Path | None) -> tuple[str, Path]:
    """The model and the input of `[MODEL] INPUT`; a single word is the input.

    Raises:
        UserError: if both are missing.
    """
    if first is None:
        raise UserError("INPUT is missing: give a folder or file, such as photos/, optionally after a model")
    return (DEFAULT_MODEL, Path(first)) if second is None else (first, second)


def check_engine(engine: str) -> bool:
    """Whether the engine is Ray.

    Raises:
        UserError: for an unknown engine.
    """
    if engine not in ("local", "ray"):
        raise UserError(f"--engine {engine}: expected local or ray")
    return engine == "ray"
