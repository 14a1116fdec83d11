"""The command `mcp`: a vector store as tools for agents."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlm2vec.cli.options import PickleOption
from vlm2vec.errors import UserError


def mcp(
    store: Annotated[str, typer.Option(help="Vector store, such as photos.lance or qdrant://….")],
    model: Annotated[str | None, typer.Option(help="Current place of the store's model, if it moved.")] = None,
    http: Annotated[bool, typer.Option("--http", help="Serve streamable HTTP at /mcp instead of stdio.")] = False,
    host: Annotated[str, typer.Option(help="With --http: address to bind to.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="With --http: TCP port.")] = 8080,
    allow_pickle: PickleOption = False,
) -> None:
    """Offer a vector store to agents as read-only tools of the Model Context Protocol.

    Example: vlm2vec mcp --store photos.lance
    """
    from vlm2vec.jobs.searching import Searcher
    from vlm2vec.jobs.stores import load_model_of
    from vlm2vec.retrieval.open import open_store

    try:
        from vlm2vec.serving.mcp_server import build_server
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; this command needs: pip install 'vlm2vec[mcp]'") from error
    opened = open_store(store)
    searcher = Searcher(load_model_of(opened, model, {"allow_pickle": True} if allow_pickle else {}), opened)
    server = build_server(searcher, Path(opened.uri).name)
    if not http:
        server.run("stdio")
        return
    from vlm2vec.serving.run import check_address

    check_address(host, port)
    sys.stderr.write(f"MCP: http://{host}:{port}/mcp (Ctrl-C stops it)\n")
    if host not in ("127.0.0.1", "localhost", "::1"):
        sys.stderr.write("Anyone who can reach this address can search the store and see its images\n")
    server.run("streamable-http", host=host, port=port)
