"""The verb that serves a model over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm2vec.cli.options import OptionsOption, PickleOption, settings_of


def serve(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a hub id, or the built-in compact.")],
    store: Annotated[str | None, typer.Option(help="Vector store for /v1/search, such as photos.lance.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port.")] = 8000,
    workers: Annotated[int, typer.Option(help="Processes, each with the model; one a GPU.")] = 1,
    name: Annotated[list[str] | None, typer.Option(help="Name of the model in requests; may be repeated.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1 or cpu.")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; auto: bfloat16 where the device has it natively.")
    ] = "auto",
    api_key_file: Annotated[Path | None, typer.Option(help="One key a line; without it no key is asked for.")] = None,
    rate_limit: Annotated[float, typer.Option(help="Requests a minute for each key or address; 0: no limit.")] = 0.0,
    allow_urls: Annotated[list[str] | None, typer.Option(help="Host to fetch pictures from; may be repeated.")] = None,
    media_root: Annotated[Path | None, typer.Option(help="Folder whose pictures requests may name.")] = None,
    cors_origin: Annotated[list[str] | None, typer.Option(help="Web page that may call; may be repeated.")] = None,
    max_batch_tokens: Annotated[int, typer.Option(help="Token budget of a forward pass.")] = 4096,
    max_queue: Annotated[int, typer.Option(help="Inputs that may wait; more get 429.")] = 1024,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take; then 408.")] = 60.0,
    limit: Annotated[list[str] | None, typer.Option(help="Any other limit, key=value; docs/guides/serving.md.")] = None,
    option: OptionsOption = None,
    allow_pickle: PickleOption = False,
) -> None:
    """Serve embeddings and search over HTTP, in the dialects of OpenAI, vLLM, Jina, Infinity and Cohere."""
    from pydantic import ValidationError

    from vlm2vec.cli.options import key_value
    from vlm2vec.errors import UserError
    from vlm2vec.serving.run import serve as run_server
    from vlm2vec.serving.settings import ServeSettings

    values = {
        "model": model,
        "model_options": settings_of(option, allow_pickle),
        "served_names": tuple(name or ("vlm2vec", Path(model).name)),
        "store": store,
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
    more = dict(key_value(text, "--limit", "max_chars=20000") for text in limit or [])
    try:
        settings = ServeSettings.model_validate(values | more)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"setting {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    run_server(settings)
