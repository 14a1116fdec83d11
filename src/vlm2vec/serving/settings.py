"""Settings of the server: one validated object, which worker processes read from the environment."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vlm2vec.errors import shown

ENVIRONMENT = "VLM2VEC_SERVE"
MIB = 1 << 20
HOST = re.compile(r"\*|[0-9a-fA-F]*:[0-9a-fA-F:.]*:[0-9a-fA-F:.]*|(\*\.)?([^\s/:*?#@]+|\[[0-9a-fA-F:.]+\])(:\d+)?")
ORIGIN = re.compile(r"\*|[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#]+")
"""What browsers send: a scheme and a host without a path, so that any other string would never be equal."""


class ServeSettings(BaseModel):
    """All settings of the server; the defaults are safe and suit one small machine.

    Attributes:
        model: Folder, hub id or built-in name of the model.
        model_options: Arguments of `Embedder.from_pretrained`.
        served_names: Names that requests may give the model; responses use the first.
        reranker: Folder or hub id of a model that scores the documents of `/v1/rerank`; None: cosines of `model`.
        rerank_cosine: The cosine of `model` times this number is added to the reranker's log-odds in `/v1/rerank`;
            0: the reranker alone decides.
        store: Address of a vector store for `/v1/search`; None: `/v1/search` answers 404.
        host: Address to bind to; loopback by default.
        port: TCP port.
        workers: Number of processes. Each loads the model, on its own GPU if there are several.
        slots: Folder in which workers claim their number; set by the parent process.
        device: Device of the model; None: one GPU per worker, or the CPU.
        dtype: Precision of the weights; auto: that of the store, else bfloat16 if the device supports it natively.
        threads: Preprocessing threads per worker; 0: one per CPU core.
        max_batch_tokens: Maximum number of tokens in a forward pass, padding included.
        max_batch_inputs: Maximum number of inputs in a forward pass.
        max_padding: Maximum share of padding among the tokens of a forward pass.
        max_queue: Maximum number of inputs in the queue of a worker; requests beyond it get 429.
        max_inputs: Maximum number of inputs in a request. More than `max_queue` pass through the queue in slices.
        max_chars: Maximum number of characters in a text.
        max_tokens: Maximum number of tokens in an input, image tokens included.
        max_images: Maximum number of images in an input.
        max_pixels: Maximum number of pixels in an image.
        max_image_bytes: Maximum size of an image file in bytes.
        max_body_bytes: Maximum size of a request in bytes.
        timeout: Maximum duration of a request in seconds; then 408.
        drain: Maximum seconds for accepted requests after SIGTERM.
        result_cache_bytes: Memory for cached vectors; 0: no cache.
        image_cache_bytes: Memory for cached image features, if the model family supports it; 0: no cache.
        allow_urls: Hosts from which images may be fetched; `*.host` allows subdomains. Empty: no URL is fetched.
        media_root: Folder to which image paths are relative; None: no path is read.
        api_key_file: File with one key per line; None: no key is required.
        rate_limit: Requests per minute for each key (or address, without keys); 0: no limit.
        cors_origins: Origins of web pages that may call this server from a browser; empty: none.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    model_options: dict[str, Any] = {}
    served_names: tuple[str, ...] = ("vlm2vec",)
    reranker: str | None = None
    rerank_cosine: float = Field(0.0, ge=0, allow_inf_nan=False)
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
    timeout: float = Field(60.0, gt=0, allow_inf_nan=False)
    drain: int = Field(30, ge=0)
    result_cache_bytes: int = Field(64 * MIB, ge=0)
    image_cache_bytes: int = Field(256 * MIB, ge=0)
    allow_urls: tuple[str, ...] = ()
    media_root: Path | None = None
    api_key_file: Path | None = None
    rate_limit: float = Field(0.0, ge=0, allow_inf_nan=False)
    cors_origins: tuple[str, ...] = ()

    @field_validator("served_names")
    @classmethod
    def _have_letters(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not all(name.strip() for name in names):
            raise ValueError("a name is empty; remove --name to use the model's own")
        return names

    @field_validator("allow_urls")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not HOST.fullmatch(host):
                raise ValueError(f"expected a host such as images.example.org or *.example.org, found {shown(host)}")
        return hosts

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(f"expected an origin such as https://app.example.org, found {shown(origin)}")
        return origins

    @model_validator(mode="after")
    def _no_contradiction(self) -> ServeSettings:
        """Refuse settings that make each other impossible; a default gives way to what is set."""
        pairs = (
            ("max_batch_inputs", "max_queue"),
            ("max_image_bytes", "max_body_bytes"),
            ("max_chars", "max_body_bytes"),
        )
        for inner, outer in pairs:
            both_set = {inner, outer} <= self.model_fields_set
            if both_set and getattr(self, inner) > getattr(self, outer):
                raise ValueError(f"{inner} is larger than {outer}, so it has no effect; lower {inner} or raise {outer}")
        if not self.max_images and (self.allow_urls or self.media_root):
            raise ValueError("max_images is 0, so allow_urls and media_root have no effect; remove one of them")
        if self.rerank_cosine and not self.reranker:
            raise ValueError("rerank_cosine has no effect without a reranker; set reranker, or remove rerank_cosine")
        return self

    def to_environment(self) -> None:
        """Store the settings in the environment, for worker processes."""
        os.environ[ENVIRONMENT] = self.model_dump_json(exclude_unset=True)

    @classmethod
    def from_environment(cls) -> ServeSettings:
        """Read the settings that the parent process stored."""
        return cls.model_validate_json(os.environ[ENVIRONMENT])
