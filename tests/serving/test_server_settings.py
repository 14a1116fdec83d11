"""Settings of the server: a value that would never have an effect is refused before the model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlm2vec.cli import app
from vlm2vec.errors import UserError
from vlm2vec.serving import run
from vlm2vec.serving.access import Keys
from vlm2vec.serving.settings import ServeSettings


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--allow-urls", "http://a.b", "allow_urls: expected a host such as images.example.org or *.example.org"),
        ("--allow-urls", "a.b/c", "allow_urls: expected a host"),
        ("--allow-urls", "", "allow_urls: expected a host"),
        ("--cors-origin", "app.example.org", "cors_origins: expected an origin such as https://app.example.org"),
        ("--cors-origin", "https://a.b/", "cors_origins: expected an origin"),
        ("--name", " ", "served_names: a name is empty"),
        ("--timeout", "inf", "timeout: expected a finite number"),
        ("--rate-limit", "inf", "rate_limit: expected a finite number"),
        ("--option", "num_layers=[", "--option 'num_layers=[': the value is not valid YAML"),
        ("--option", "=1", "--option '=1': expected key=value"),
    ],
)
def test_a_setting_without_effect_is_one_line(
    option: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "serve", lambda settings: pytest.fail("the server was started"))
    done = CliRunner().invoke(app, ["serve", "compact", option, value])
    assert isinstance(done.exception, UserError) and message in str(done.exception) and "\n" not in str(done.exception)


def test_hosts_and_origins_of_every_form_are_accepted() -> None:
    hosts = ("a.b", "*.a.b", "*", "localhost:8080", "10.0.0.1", "[::1]:80", "::1", "bücher.example")
    origins = ("*", "https://a.b", "http://localhost:3000", "chrome-extension://abc")
    settings = ServeSettings(model="compact", allow_urls=hosts, cors_origins=origins)
    assert (settings.allow_urls, settings.cors_origins) == (hosts, origins)


def test_the_first_key_of_a_file_with_a_byte_order_mark_is_valid(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("secret\nother\n", encoding="utf-8-sig")
    keys = Keys(tmp_path / "keys.txt")
    assert [keys.caller(f"Bearer {key}".encode(), "here") for key in ("secret", "other", "x")] == [
        "key 1",
        "key 2",
        None,
    ]
