"""Fetch images by URL: only from allowed hosts, and never from private network addresses.

The address is checked after name resolution, and the connection uses the checked address, so DNS rebinding has no
effect. Each redirect is a new request under the same rules. Proxy settings of the environment are ignored.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore2
from httpcore2 import AnyIOBackend, AsyncNetworkBackend

from vlm2vec.media.images import ImageRef
from vlm2vec.serving.refusals import Refusal

MAX_REDIRECTS = 3
SECONDS = 10.0
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)


def is_public(address: str) -> bool:
    """Whether an address is public: not private, loopback, link-local, cloud metadata or reserved."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is not None:
            found = inner
        elif found in ipaddress.ip_network("64:ff9b::/96"):  # IPv4 mapped by NAT64
            found = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    return found.is_global and not found.is_multicast


class NotAllowed(Exception):
    """The server must not connect to this address."""


class GuardedBackend(AsyncNetworkBackend):
    """Connects to a host only if all of its addresses are allowed.

    Args:
        allowed: Whether the server may connect to an address.
    """

    def __init__(self, allowed: Callable[[str], bool]) -> None:
        self._allowed, self._backend = allowed, AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> Any:
        """A connection to the first of the name's addresses."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if not addresses or not all(map(self._allowed, addresses)):
            raise NotAllowed
        return await self._backend.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        """Sleep, as the interface requires."""
        await self._backend.sleep(seconds)


class Fetcher:
    """Fetches images by URL.

    Args:
        hosts: Allowed hosts: `host`, `host:port`, `*.host` (its subdomains) or `*`.
        max_bytes: Maximum size of one image file.
        allowed: Whether the server may connect to an address.
    """

    def __init__(self, hosts: Iterable[str], max_bytes: int, allowed: Callable[[str], bool] = is_public) -> None:
        self._hosts = tuple(host.lower() for host in hosts)
        self._max_bytes, self._backend = max_bytes, GuardedBackend(allowed)

    async def image(self, url: str) -> ImageRef | Refusal:
        """Return the image at a URL, or the reason why it was not fetched."""
        if not self._hosts:
            return Refusal(
                403,
                "urls_not_allowed",
                "this server does not fetch URLs; send a data URI, or start the server with --allow-urls HOST",
            )
        try:
            async with asyncio.timeout(SECONDS):
                return await self._follow(url)
        except NotAllowed:
            return Refusal(
                403, "address_not_allowed", "the URL leads to an address to which this server does not connect"
            )
        except (
            TimeoutError,
            OSError,
            ValueError,
            httpcore2.NetworkError,
            httpcore2.ProtocolError,
            httpcore2.TimeoutException,
        ) as error:
            return Refusal(400, "fetch_failed", f"fetching the URL failed ({type(error).__name__})")

    async def _follow(self, url: str) -> ImageRef | Refusal:
        for _ in range(MAX_REDIRECTS + 1):
            if not self._is_allowed(url):
                return Refusal(403, "host_not_allowed", "the host or scheme of the URL is not allowed")
            answer = await self._get(url)
            if isinstance(answer, ImageRef | Refusal):
                return answer
            url = urljoin(url, answer)
        return Refusal(400, "fetch_failed", f"the URL redirects more than {MAX_REDIRECTS} times")

    def _is_allowed(self, url: str) -> bool:
        parts = urlsplit(url)
        host, usual = (parts.hostname or "").rstrip("."), PORTS.get(parts.scheme)
        if not host or usual is None or parts.username is not None:
            return False
        port = parts.port or usual
        names = {host, f"{host}:{port}"} if port == usual else {f"{host}:{port}"}
        above = {f"*{host[at:]}" for at, letter in enumerate(host) if letter == "."}
        return bool(names & set(self._hosts)) or (port == usual and bool(({"*"} | above) & set(self._hosts)))

    async def _get(self, url: str) -> ImageRef | Refusal | str:
        """Return the image, a refusal, or the target of a redirect."""
        limits = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), SECONDS)}
        headers = [("Accept", "image/*"), ("User-Agent", "vlm2vec"), ("Accept-Encoding", "identity")]
        async with (
            httpcore2.AsyncConnectionPool(network_backend=self._backend) as pool,
            pool.stream(
                "GET", _ascii(url), headers=[("Host", urlsplit(url).netloc), *headers], extensions=limits
            ) as answer,
        ):
            if answer.status in REDIRECTS:
                return next(
                    (value.decode("latin-1") for name, value in answer.headers if name.lower() == b"location"), ""
                )
            if answer.status != 200:
                return Refusal(400, "fetch_failed", f"the URL returned status {answer.status}")
            data = bytearray()
            async for part in answer.aiter_stream():
                data += part
                if len(data) > self._max_bytes:
                    return Refusal(413, "image_too_large", f"the image is larger than {self._max_bytes} bytes")
        return ImageRef(data=bytes(data))


def _ascii(url: str) -> bytes:
    """The URL as bytes; raises ValueError for letters outside ASCII, which a URL must escape."""
    return url.encode("ascii")
