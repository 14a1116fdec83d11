"""The server reads, fetches, reveals and admits only what its settings allow."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from wire import data_uri, post, toy_server

from vlm2vec.media.images import ImageRef
from vlm2vec.serving import fetch
from vlm2vec.serving.access import RateLimit
from vlm2vec.serving.fetch import Fetcher, is_public
from vlm2vec.serving.logs import JsonLines
from vlm2vec.serving.refusals import Refusal


@pytest.mark.parametrize("url", ["file:///etc/passwd", "FILE:///etc/passwd", "file://localhost/etc/passwd", "file:a"])
def test_a_file_url_is_never_read(serving: Callable[..., TestClient], tmp_path: Path, url: str) -> None:
    client = serving(allow_urls=("*", "localhost"), media_root=tmp_path)
    answer = post(client, input=[{"image": url}])
    assert answer.status_code == 403 and "root:" not in answer.text


def test_no_url_is_fetched_unless_its_host_is_allowed(serving: Callable[..., TestClient]) -> None:
    with toy_server(lambda handler: handler.send_error(404)) as toy:
        for settings in ({}, {"allow_urls": ("example.org", "*.example.org")}):
            answer = post(serving(**settings), input=[{"image": f"{toy.url}/a.png"}])
            assert answer.status_code == 403 and answer.json()["error"]["code"] in (
                "urls_not_allowed",
                "host_not_allowed",
            )
        assert toy.asked == []


def test_an_allowed_image_is_fetched(png: bytes) -> None:
    def send(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(png)

    with toy_server(send) as toy:
        fetched = asyncio.run(Fetcher([toy.url[7:]], 10_000, lambda _: True).image(f"{toy.url}/a.png"))
    assert isinstance(fetched, ImageRef) and fetched.read() == png


PRIVATE = {
    "loopback": ["127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::"],
    "private": ["10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "fd12::1"],
    "link-local": ["169.254.1.1", "fe80::1"],
    "metadata": ["169.254.169.254", "fd00:ec2::254", "100.100.100.200"],
    "mapped": ["::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "::ffff:169.254.169.254"],
    "not a host": ["224.0.0.1", "255.255.255.255", "ff02::1", "240.0.0.1"],
}


@pytest.mark.parametrize("kind", PRIVATE)
def test_no_such_address_is_public(kind: str) -> None:
    assert not [address for address in PRIVATE[kind] if is_public(address)]
    assert is_public("8.8.8.8") and is_public("2606:4700::1111")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "[::1]", "169.254.169.254"])
def test_a_name_is_refused_by_the_address_that_it_resolves_to(serving: Callable[..., TestClient], host: str) -> None:
    client = serving(allow_urls=("*", host.strip("[]")))
    answer = post(client, input=[{"image": f"http://{host}/latest/meta-data"}])
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "address_not_allowed")


def test_a_redirect_to_a_private_address_is_not_followed() -> None:
    def redirect(handler: Any) -> None:
        handler.send_response(302)
        handler.send_header("Location", f"http://127.0.0.1:{handler.server.server_port}/secret")
        handler.end_headers()

    with toy_server(redirect, "127.0.0.2") as toy, toy_server(redirect, "127.0.0.1", toy.server_port) as private:
        hosts = [toy.url[7:], private.url[7:]]
        # The address of the toy server stands in for a public one; the other stays private.
        fetcher = Fetcher(hosts, 1000, lambda address: address == "127.0.0.2" or is_public(address))
        refused = asyncio.run(fetcher.image(f"{toy.url}/start"))
        assert isinstance(refused, Refusal) and refused.code == "address_not_allowed"
        assert toy.asked == ["/start"] and private.asked == []


def test_a_redirect_to_another_host_or_scheme_is_not_followed() -> None:
    for target in ("http://example.org/a.png", "file:///etc/passwd", "gopher://127.0.0.1/"):

        def redirect(handler: Any, target: str = target) -> None:
            handler.send_response(302)
            handler.send_header("Location", target)
            handler.end_headers()

        with toy_server(redirect) as toy:
            refused = asyncio.run(Fetcher([toy.url[7:]], 1000, lambda _: True).image(f"{toy.url}/start"))
        assert isinstance(refused, Refusal) and refused.code == "host_not_allowed"


def test_redirects_end() -> None:
    def redirect(handler: Any) -> None:
        handler.send_response(302)
        handler.send_header("Location", handler.path + "x")
        handler.end_headers()

    with toy_server(redirect) as toy:
        refused = asyncio.run(Fetcher([toy.url[7:]], 1000, lambda _: True).image(f"{toy.url}/"))
        assert isinstance(refused, Refusal) and refused.code == "fetch_failed" and len(toy.asked) == 4


def test_a_fetch_ends_at_its_size_limit() -> None:
    written: list[int] = []

    def pour(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(2000):
            written.append(handler.wfile.write(bytes(100_000)))

    with toy_server(pour) as toy:
        refused = asyncio.run(Fetcher([toy.url[7:]], 1_000_000, lambda _: True).image(f"{toy.url}/a.png"))
    assert isinstance(refused, Refusal) and (refused.status, refused.code) == (413, "image_too_large")
    assert sum(written) < 100_000_000


def test_a_fetch_ends_at_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def drip(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(400):  # each byte arrives in time, the whole body does not
            handler.wfile.write(b"x")
            time.sleep(0.05)

    monkeypatch.setattr(fetch, "SECONDS", 0.3)
    since = time.monotonic()
    with toy_server(drip) as toy:
        refused = asyncio.run(Fetcher([toy.url[7:]], 1000, lambda _: True).image(f"{toy.url}/a.png"))
        assert time.monotonic() - since < 10
    assert isinstance(refused, Refusal) and refused.code == "fetch_failed"


@pytest.fixture
def media(tmp_path: Path, png: bytes) -> Path:
    root = tmp_path / "media"
    root.mkdir()
    (root / "a.png").write_bytes(png)
    (tmp_path / "secret.png").write_bytes(png)
    return root


def test_a_path_is_read_below_the_media_root_alone(serving: Callable[..., TestClient], media: Path) -> None:
    client = serving(media_root=media)
    outside = [str(media.parent / "secret.png"), "../secret.png", "a/../../secret.png", "", ".", "none.png"]
    for name, status in {"a.png": 200, **dict.fromkeys(outside, 403)}.items():
        answer = post(client, input=[{"text": "x", "image": name}])
        assert answer.status_code == status and str(media) not in answer.text, name


def test_a_symbolic_link_out_of_the_media_root_is_refused(serving: Callable[..., TestClient], media: Path) -> None:
    (media / "inside.png").symlink_to(media / "a.png")
    (media / "link.png").symlink_to(media.parent / "secret.png")
    (media / "folder").symlink_to(media.parent)
    (media / "loop.png").symlink_to(media / "loop.png")
    client = serving(media_root=media)
    found = {
        name: post(client, input=[{"image": name}]).status_code
        for name in ("inside.png", "link.png", "folder/secret.png", "loop.png")
    }
    assert found == {"inside.png": 200, "link.png": 403, "folder/secret.png": 403, "loop.png": 403}


def test_no_path_is_read_without_a_media_root(client: TestClient, media: Path) -> None:
    answer = post(client, input=[{"image": str(media / "a.png")}])
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "paths_not_allowed"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    (tmp_path / "keys").write_text("# ours\nfirst-key\n\n  second-key  \n")
    return tmp_path / "keys"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_only_the_keys_of_the_file_are_accepted(serving: Callable[..., TestClient], keys: Path) -> None:
    client = serving(api_key_file=keys)
    assert post(client, input="x").status_code == 401
    for key, status in {"first-key": 200, "second-key": 200, "third": 401, "# ours": 401, "": 401}.items():
        assert post(client, input="x", headers=bearer(key)).status_code == status, key
    assert post(client, input="x", headers={"Authorization": "Basic first-key"}).status_code == 401
    for path in ("/v1/models", "/metrics", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 401, path
    for path in ("/health", "/health/live", "/health/ready"):
        assert client.get(path).status_code == 200, path


def test_every_key_is_compared_in_constant_time(
    serving: Callable[..., TestClient], keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []
    usual = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return usual(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    client = serving(api_key_file=keys)
    for key in ("first-key", "second-key", "x" * 1000):
        client.get("/v1/models", headers=bearer(key))
    assert compared == [(32, 32)] * 6  # digests of equal length, both keys each time


def test_each_key_has_a_rate_of_its_own(serving: Callable[..., TestClient], keys: Path) -> None:
    client = serving(api_key_file=keys, rate_limit=2)
    found = [post(client, input="x", headers=bearer(f"{key}-key")) for key in ("first",) * 3 + ("second",)]
    assert [answer.status_code for answer in found] == [200, 200, 429, 200]
    assert found[2].json()["error"]["code"] == "rate_limited" and int(found[2].headers["Retry-After"]) == 30


def test_a_rate_refills_with_time() -> None:
    now = 0.0
    rate = RateLimit(60, lambda: now)
    for _ in range(60):
        rate.take("key 1")
    with pytest.raises(Refusal):
        rate.take("key 1")
    now = 1.0
    rate.take("key 1")


def test_an_internal_error_reveals_no_details(
    serving: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serving()

    def broken(self: Any, items: Any) -> Any:
        raise RuntimeError("inside")

    monkeypatch.setattr("vlm2vec.serving.engine.Engine.embed", broken)
    answer = post(client, input="x")
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "server_error"
    assert not any(word in answer.text for word in ("inside", "Traceback", "RuntimeError", ".py"))


def test_logs_contain_neither_inputs_nor_keys(
    embedder: Any,
    serving: Callable[..., TestClient],
    keys: Path,
    png: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def failing(batch: Any) -> Any:
        raise ValueError("cannot embed 'private words'")

    caplog.set_level(logging.DEBUG)
    client = serving(api_key_file=keys, result_cache_bytes=0)
    headers = bearer("second-key")
    post(client, input=["private words", {"image": data_uri(png)}], headers=headers, user="private person")
    post(client, input=[{"image": "http://private.host/a.png"}, {"image": "private.png"}], headers=headers)
    post(client, path="/private/path?private=query", headers=headers)
    post(client, input=["private words"], headers=bearer("a-wrong-key"))
    client.post("/v1/embeddings", content=b'{"input": "private', headers=headers)
    monkeypatch.setattr(embedder.backbone, "forward", failing)
    post(client, input=["private words"], headers=headers)
    caplog.handler.records = [
        record for record in caplog.records if not record.name.startswith("http")
    ]  # drop those of the client
    ours = [JsonLines().format(record) for record in caplog.records if record.name.startswith("vlm2vec")]
    events = [json.loads(line)["event"] for line in ours]
    assert events.count("request") == 6 and "a forward pass of one failed" in events
    text = "\n".join([*ours, *(f"{record.name} {record.getMessage()}" for record in caplog.records)])
    for secret in ("private", "second-key", "a-wrong-key", data_uri(png)[30:60]):
        assert secret not in text, secret
    assert any(json.loads(line).get("caller") == "key 2" for line in ours)


def test_only_named_origins_may_call_from_a_browser(client: TestClient, serving: Callable[..., TestClient]) -> None:
    asked = {"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"}
    for answer in (client.get("/v1/models", headers=asked), client.options("/v1/embeddings", headers=asked)):
        assert not [name for name in answer.headers if name.startswith("access-control")]
    told = serving(cors_origins=("http://ours",))
    for origin, allowed in (("http://ours", "http://ours"), ("http://elsewhere", None)):
        answer = told.options("/v1/embeddings", headers={**asked, "Origin": origin})
        assert answer.headers.get("access-control-allow-origin") == allowed
