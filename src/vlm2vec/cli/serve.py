"""The command `serve`: a model over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm2vec.cli.options import (
    OptionsOption,
    PickleOption,
    RerankCosineOption,
    key_value,
    rerank_cosine_of,
    settings_of,
)

if TYPE_CHECKING:
    from vlm2vec.serving.settings import ServeSettings

DtypeOption = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16; auto: bfloat16 if the device supports it natively.")
]
KeyFileOption = Annotated[
    Path | None, typer.Option(help="File with one API key per line; without it no key is required.")
]
OriginOption = Annotated[
    list[str] | None,
    typer.Option(help="Origin of a web page that may call the server, such as https://app.example.org; repeatable."),
]
LimitOption = Annotated[
    list[str] | None, typer.Option(help="Any other setting as key=value; see docs/guides/serving.md.")
]


def serve(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, or the built-in compact.")],
    store: Annotated[str | None, typer.Option(help="Vector store for /v1/search, such as photos.lance.")] = None,
    reranker: Annotated[
        str | None, typer.Option(help="A VLM that scores the documents of /v1/rerank; without it, cosines do.")
    ] = None,
    rerank_cosine: RerankCosineOption = 0.0,
    host: Annotated[str, typer.Option(help="Address to bind to; 0.0.0.0 for all networks.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port.")] = 8000,
    workers: Annotated[int, typer.Option(help="Number of processes; each loads the model. Use one per GPU.")] = 1,
    name: Annotated[list[str] | None, typer.Option(help="Name of the model in requests; repeatable.")] = None,
    device: Annotated[str | None, typer.Option(help="Device, such as cuda:1 or cpu.")] = None,
    dtype: DtypeOption = "auto",
    api_key_file: KeyFileOption = None,
    rate_limit: Annotated[float, typer.Option(help="Requests per minute for each key or address; 0: no limit.")] = 0.0,
    allow_urls: Annotated[
        list[str] | None, typer.Option(help="Host from which images may be fetched; repeatable.")
    ] = None,
    media_root: Annotated[Path | None, typer.Option(help="Folder with images that requests may name by path.")] = None,
    cors_origin: OriginOption = None,
    max_batch_tokens: Annotated[int, typer.Option(help="Maximum number of tokens in a forward pass.")] = 4096,
    max_queue: Annotated[int, typer.Option(help="Maximum number of queued inputs; requests beyond it get 429.")] = 1024,
    timeout: Annotated[float, typer.Option(help="Maximum duration of a request in seconds; then 408.")] = 60.0,
    limit: LimitOption = None,
    option: OptionsOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Serve embeddings and search over HTTP, in the dialects of OpenAI, vLLM, Jina, Infinity and Cohere.

    Example: vlm2vec serve runs/photos --store photos.lance --api-key-file keys.txt
    """
    from vlm2vec.serving.run import serve as run_server

    values: dict[str, Any] = {
        "model": model,
        "model_options": settings_of(option, allow_pickle),
        "served_names": tuple(name or ("vlm2vec", Path(model).name)),
        "store": store,
        "reranker": reranker,
        "rerank_cosine": rerank_cosine_of(rerank_cosine, reranker, "--reranker"),
        "host": host,
        "port": port,
        "workers": workers,
        "device": device,
        "dtype": dtype,
        "api_key_file": api_key_file,
        "rate_limit": rate_limit,
        "allow_urls": tuple(allow_urls or ()),
        "media_root": media_root,
        "cors_origins": tuple(cors_origin or ()),
        "max_batch_tokens": max_batch_tokens,
        "max_queue": max_queue,
        "timeout": timeout,
    }
    values |= dict(key_value(text, "--limit", "max_chars=20000") for text in limit or [])
    run_server(_settings(values))


def _settings(values: dict[str, Any]) -> ServeSettings:
    """Validate the settings of a server.

    Raises:
        UserError: naming the first setting that is unknown, out of range or contradicts another.
    """
    from pydantic import ValidationError

    from vlm2vec.errors import UserError, did_you_mean, expected_in, field_of
    from vlm2vec.serving.settings import ServeSettings

    try:
        return ServeSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = field_of(first["loc"])
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(name, ServeSettings.model_fields)
            raise UserError(f"setting {name}: unknown setting{hint}") from error
        reason = expected_in(first["msg"])
        raise UserError(f"setting {name}: {reason}" if name else f"settings: {reason}") from error
