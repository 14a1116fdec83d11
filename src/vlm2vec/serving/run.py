"""Start the server: one process, or several that share the port."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vlm2vec.errors import UserError
from vlm2vec.serving.settings import ServeSettings

if TYPE_CHECKING:
    import torch
    from fastapi import FastAPI

    from vlm2vec.models.embedder import Embedder
    from vlm2vec.models.reranking.reranker import Reranker
    from vlm2vec.retrieval.vector_store import VectorStore

REFUSED = "refused"  # file beside the slots: the reason why a worker cannot start
HEALTH_SECONDS = 60  # a worker that is loading its model answers late; a dead worker is noticed at once
_held: list[IO[str]] = []  # kept open for the life of the process, because closing a file releases its lock


def serve(settings: ServeSettings) -> None:
    """Serve until SIGINT or SIGTERM, then finish the accepted requests.

    Raises:
        UserError: if a library is missing, or a setting cannot be used.
    """
    try:
        import uvicorn

        from vlm2vec.serving.access import Keys
        from vlm2vec.serving.logs import log_to_stderr
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; the server needs: pip install 'vlm2vec[serve]'") from error
    Keys(settings.api_key_file)  # check the file before workers start
    if settings.media_root is not None and not settings.media_root.is_dir():
        raise UserError(f"--media-root {settings.media_root}: expected a folder")
    check_address(settings.host, settings.port)
    log_to_stderr()
    with tempfile.TemporaryDirectory(prefix="vlm2vec-serve-") as folder:
        if settings.workers > 1:
            settings = settings.model_copy(update={"slots": Path(folder)})
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        settings.to_environment()
        app = "vlm2vec.serving.run:worker_app" if settings.workers > 1 else worker_app
        uvicorn.run(
            app,
            factory=True,
            host=settings.host,
            port=settings.port,
            workers=settings.workers,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=settings.drain,
            timeout_keep_alive=30,
            timeout_worker_healthcheck=HEALTH_SECONDS,
            h11_max_incomplete_event_size=64 * 1024,
        )
        if (Path(folder) / REFUSED).is_file():
            raise UserError((Path(folder) / REFUSED).read_text())


def check_address(host: str, port: int) -> None:
    """Raise `UserError` if the server cannot bind to an address; checked before the model is loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"--host {host} --port {port}: cannot bind to this address ({reason}); choose another"
            ) from error


def worker_app() -> FastAPI:
    """Load the model and create the application of one worker process."""
    from uvicorn.config import STARTUP_FAILURE

    from vlm2vec.serving.app import create_app
    from vlm2vec.serving.logs import log_to_stderr

    log_to_stderr()
    settings = ServeSettings.from_environment()
    try:
        embedder, store = load(settings)
        reranker = load_reranker(settings, embedder.device)
    except UserError as error:
        if settings.slots is None:
            raise
        (settings.slots / REFUSED).write_text(str(error))  # the parent reports it
        sys.exit(STARTUP_FAILURE)  # with this status the parent starts no new worker
    logging.getLogger("vlm2vec.serving").info(
        "model loaded", extra={"fields": {"model": settings.model, "device": str(embedder.device)}}
    )
    return create_app(embedder, settings, store, reranker)


def load_reranker(settings: ServeSettings, device: torch.device) -> Reranker | None:
    """Load the model that scores the documents of `/v1/rerank`, on the device of the embedder.

    Raises:
        UserError: if it cannot be loaded or cannot rerank.
    """
    if settings.reranker is None:
        return None
    import torch

    from vlm2vec.models.reranking.reranker import Reranker

    dtype = {} if settings.dtype == "auto" else {"dtype": getattr(torch, settings.dtype)}
    return Reranker.from_pretrained(settings.reranker, device=device, **dtype)


def load(settings: ServeSettings) -> tuple[Embedder, VectorStore | None]:
    """Load the model, and open the vector store if there is one.

    Raises:
        UserError: if the model cannot be loaded, or is not the model of the store.
    """
    import torch

    from vlm2vec.models.device import process_device
    from vlm2vec.models.embedder import Embedder
    from vlm2vec.serving.memory import bound_kernel_caches

    bound_kernel_caches()
    slot = None if settings.slots is None else claim_slot(settings.slots, settings.workers)
    chosen = {**settings.model_options, "device": process_device(settings.device, slot)}
    if settings.dtype != "auto":
        chosen["dtype"] = getattr(torch, settings.dtype)
    if settings.store is None:
        return Embedder.from_pretrained(settings.model, **chosen), None
    from vlm2vec.jobs.stores import load_model_of
    from vlm2vec.retrieval.open import open_store

    store = open_store(settings.store)
    return load_model_of(store, settings.model, chosen), store


def claim_slot(folder: Path, count: int) -> int:
    """Claim a number below `count` that no living worker has; a replacement takes that of the dead worker."""
    from prometheus_client.multiprocess import mark_process_dead

    for slot in range(count):
        file = (folder / f"slot-{slot}").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        _held.append(file)
        file.seek(0)
        if before := file.read():
            # The queue of the dead worker is gone; remove its gauge.
            mark_process_dead(int(before), str(folder))  # type: ignore[no-untyped-call]
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return slot
    return 0
