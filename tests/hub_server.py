"""A server of this process that speaks the hub's API: models and datasets in memory, uploads with a token."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789012345678901234567890123456789"
TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """Repositories by id ("datasets/OWNER/NAME" for datasets), each with its files by name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.commits: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, folder: Path) -> None:
        """A repository with the files of a folder."""
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        self.repositories[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables by which a process uses this server and a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache)}


@contextmanager
def running_hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def answer(self, content: Any, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self) -> None:
        self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":  # the hub checks the card's metadata
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(sent))
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(sent)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.answer({"files": modes})
        if "/commit/" in path:
            return self.commit(path.removeprefix("/api/models/").partition("/commit/")[0], sent)
        self.missing()

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization', 'me')}/{asked['name']}"
        self.server.created.append(asked)
        self.server.repositories.setdefault(name, {})
        self.answer({"url": f"{self.server.url}/{name}", "id": name})

    def commit(self, name: str, sent: bytes) -> None:
        for line in sent.decode().splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                self.server.repositories[name][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            else:
                self.server.commits.append(row["value"])
        url = f"{self.server.url}/{name}"
        pull = {"pullRequestUrl": f"{url}/discussions/1"} if "create_pr=1" in self.path else {}
        self.answer({"success": True, "commitOid": COMMIT, "commitUrl": f"{url}/commit/{COMMIT}", **pull})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        if path.startswith("api/"):
            return self.describe(path.removeprefix("api/").removeprefix("models/"))
        name, _, rest = path.partition("/resolve/")
        content = self.server.repositories.get(name, {}).get(rest.partition("/")[2])
        if content is None:
            return self.missing()
        self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    def describe(self, path: str) -> None:
        """What a repository is, or the files below a folder of it."""
        name = next((each for each in self.server.repositories if path == each or path.startswith(f"{each}/")), None)
        if name is None:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        files, rest = self.server.repositories[name], path[len(name) + 1 :]
        if rest.startswith("tree/"):
            folder = rest.removeprefix("tree/").partition("/")[2]
            found = [file_facts(file, content) for file, content in files.items() if file.startswith(folder)]
            return self.answer(found) if found else self.missing()
        siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
        self.answer(
            {"id": name.removeprefix("datasets/"), "sha": COMMIT, "private": True, "siblings": siblings, "tags": []}
        )

    do_HEAD = do_GET


def file_facts(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
