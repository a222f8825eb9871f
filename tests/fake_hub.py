"""A small server that plays the model hub, and one file at an address, for tests of downloads."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".model", ".ckpt")
COMMIT = "0" * 40


@dataclass
class FakeHub:
    """What it has, how it misbehaves, and what it was asked for.

    ``repositories`` are files by name; ``gated`` ones let nobody in. A file in ``cut`` breaks off after so
    many bytes of its first answer, of its second and so on. ``instead`` is sent in place of what is named.
    Files come from ``elsewhere``, another name of this server, if given; ``tokens`` are what it heard.
    """

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    at_address: dict[str, bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: dict[str, list[int]] = field(default_factory=dict)
    instead: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    failing: int | None = None
    elsewhere: str | None = None
    tokens: list[tuple[str, str | None]] = field(default_factory=list)

    def add(self, repository: str, folder: Path) -> None:
        """Take in all files of a folder."""
        self.repositories[repository] = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def downloaded(self) -> list[tuple[str, str | None]]:
        """Return the files that were sent, and from where on."""
        return [
            (path, begin) for method, path, begin in self.asked if method == "GET" and "/api/" not in path
        ]


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_id(data)}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
    return entry


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path, self.headers.get("Range")))
            if hub.failing is not None:
                return self.refuse(hub.failing)
            if (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(tree/\w+|auth-check)", path)) is not None:
                return self.about(found[1], found[2])
            if (found := re.fullmatch(r"(/cdn)?/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path)) is not None:
                hub.tokens.append(("elsewhere" if found[1] else "hub", self.headers.get("Authorization")))
                if hub.elsewhere and not found[1]:
                    return self.redirect(f"{hub.elsewhere}/cdn{path}")
                files = hub.repositories.get(found[2], {})
                if found[2] in hub.gated:
                    return self.refuse(403, "GatedRepo")
                if found[4] not in files:
                    return self.refuse(404, "EntryNotFound")
                return self.send(found[4], files[found[4]], found[3], body)
            if path in hub.at_address:
                return self.send(path, hub.at_address[path], COMMIT, body)
            return self.refuse(404)

        def about(self, repository: str, what: str) -> None:
            if repository not in hub.repositories:
                return self.refuse(404, "RepoNotFound")
            if what == "auth-check":
                return self.refuse(403, "GatedRepo") if repository in hub.gated else self.json({})
            if what == "tree/" + "f" * 40:
                return self.refuse(404, "RevisionNotFound")
            return self.json([_entry(name, data) for name, data in hub.repositories[repository].items()])

        def json(self, values: Any) -> None:
            data = json.dumps(values).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def redirect(self, address: str) -> None:
            self.send_response(302)
            self.send_header("Location", address)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def refuse(self, status: int, code: str | None = None) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send(self, name: str, data: bytes, commit: str, body: bool) -> None:
            entry = _entry(name, data)
            data = hub.instead.get(name, data)
            begin = int(re.sub(r"\D", "", self.headers.get("Range") or "0"))
            self.send_response(206 if begin else 200)
            self.send_header("ETag", f'"{entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", str(len(data) - begin))
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if body:
                end = begin + hub.cut[name].pop(0) if hub.cut.get(name) else len(data)
                self.wfile.write(data[begin:end])
                if end < len(data):
                    self.close_connection = True

    return Handler


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Start one, and let the hub's client ask it."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("services.downloads.PAUSES_S", (0.0,))
    at_once = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", at_once)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
