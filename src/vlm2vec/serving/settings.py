"""What a server may be told: one validated object, which worker processes read from the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ENVIRONMENT = "VLM2VEC_SERVE"
MIB = 1 << 20


class ServeSettings(BaseModel):
    """All settings of a server; the defaults are safe and suit one small machine.

    Attributes:
        model: Folder, hub id or built-in of the embedder.
        model_options: Passed to `Embedder.from_pretrained`.
        served_names: Names that requests may give the model; the first is listed.
        store: Address of a vector store for `/v1/search`.
        host: Loopback unless told.
        port: TCP port.
        workers: Processes; each loads the model, on its own GPU where there are several.
        slots: Folder in which workers claim their number; set by the starter.
        device: Of the model; None: a GPU of its own for each worker, else the CPU.
        dtype: Of the model's weights; auto: the store's, else bfloat16 where the device computes in it natively.
        threads: Of preprocessing in each worker; 0: one a processor.
        max_batch_tokens: Token budget of one forward pass, padding included.
        max_batch_inputs: Inputs of one forward pass at most.
        max_padding: Share of a forward pass's tokens that may be padding.
        max_queue: Inputs that may wait in a worker; more get 429.
        max_inputs: Inputs of one request.
        max_chars: Characters of one text.
        max_tokens: Tokens of one input, visual ones included.
        max_images: Images of one input.
        max_pixels: Pixels of one image.
        max_image_bytes: Of one encoded image.
        max_body_bytes: Of one request.
        timeout: Seconds that a request may take; then 408.
        drain: Seconds that accepted requests may take after SIGTERM.
        result_cache_bytes: Memory of kept vectors; 0 keeps none.
        image_cache_bytes: Memory of kept image features, where the family can keep them.
        allow_urls: Hosts that images may be fetched from; `*.host` allows subdomains. Empty: no URL is fetched.
        media_root: Folder that paths of images are relative to; None: no path is read.
        api_key_file: One key a line; None: no key is asked for.
        rate_limit: Requests a minute for each key (or address, without keys); 0: no limit.
        cors_origins: Web pages that may call this server; empty: none.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    model_options: dict[str, Any] = {}
    served_names: tuple[str, ...] = ("vlm2vec",)
    store: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    workers: int = Field(1, ge=1)
    slots: Path | None = None
    device: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = Field(0, ge=0)
    max_batch_tokens: int = Field(4096, ge=1)
    max_batch_inputs: int = Field(64, ge=1)
    max_padding: float = Field(0.2, ge=0, le=1)
    max_queue: int = Field(1024, ge=1)
    max_inputs: int = Field(2048, ge=1)
    max_chars: int = Field(100_000, ge=1)
    max_tokens: int = Field(32_768, ge=1)
    max_images: int = Field(16, ge=0)
    max_pixels: int = Field(50_000_000, ge=1)
    max_image_bytes: int = Field(20 * MIB, ge=1)
    max_body_bytes: int = Field(32 * MIB, ge=1)
    timeout: float = Field(60.0, gt=0)
    drain: int = Field(30, ge=0)
    result_cache_bytes: int = Field(64 * MIB, ge=0)
    image_cache_bytes: int = Field(256 * MIB, ge=0)
    allow_urls: tuple[str, ...] = ()
    media_root: Path | None = None
    api_key_file: Path | None = None
    rate_limit: float = Field(0.0, ge=0)
    cors_origins: tuple[str, ...] = ()

    def to_environment(self) -> None:
        """Leaves these settings for worker processes."""
        os.environ[ENVIRONMENT] = self.model_dump_json()

    @classmethod
    def from_environment(cls) -> ServeSettings:
        """The settings that the starter left."""
        return cls.model_validate_json(os.environ[ENVIRONMENT])
