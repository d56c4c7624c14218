"""A server on loopback that answers as Hugging Face's hub does, for real ``huggingface_hub`` to download from."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_token_of_the_test"
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?(?:\?.*)?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)")


@dataclass
class Repository:
    """One repository; ``access`` is ``open``, ``gated`` (listed, but its files are for members) or ``private``."""

    folder: Path
    access: str = "open"
    revisions: tuple[str, ...] = ("main", COMMIT)
    member: bool = True  # whether the owner of the token may read it


@dataclass
class Hub:
    """Repositories by name, and (method, path) of everything that was asked."""

    endpoint: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    broken: bool = False

    @property
    def downloaded(self) -> set[str]:
        """Names of the files whose content was sent."""
        found = (_FILE.fullmatch(path) for method, path in self.asked if method == "GET")
        return {match[3] for match in found if match}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path)
            hub.asked.append((self.command, path))
            if hub.broken:
                self._answer(503, {})
            elif match := _API.fullmatch(path):
                self._listing(match[1], match[2] or "main")
            elif match := _FILE.fullmatch(path):
                self._file(*match.groups())
            else:
                self._answer(404, {})

        def _refused(self, name: str, revision: str, files: bool) -> bool:
            """The hub's answers where it refuses, with its codes."""
            repository, token = hub.repositories.get(name), self.headers.get("Authorization")
            known = token == f"Bearer {TOKEN}"
            if repository is None or (repository.access == "private" and not (known and repository.member)):
                code = 404 if known else 401
                self._answer(code, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            elif revision not in repository.revisions:
                self._answer(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            elif repository.access == "gated" and files and not (known and repository.member):
                self._answer(403 if known else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "No access"})
            else:
                return False
            return True

        def _listing(self, name: str, revision: str) -> None:
            if self._refused(name, revision, files=False):
                return
            folder = hub.repositories[name].folder
            files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            content = {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
            self._answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

        def _file(self, name: str, revision: str, file: str) -> None:
            if self._refused(name, revision, files=True):
                return
            path = hub.repositories[name].folder / file
            if not path.is_file():
                self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            data = path.read_bytes()
            self._answer(200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, data)

        def _answer(self, code: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(code)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    return Handler


@contextmanager
def serving(monkeypatch, home: Path):
    """A :class:`Hub` that ``huggingface_hub`` takes for the hub, with an empty cache below ``home`` and no token."""
    from huggingface_hub import constants, file_download

    hub = Hub("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(home))
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
        if hasattr(file_download, name):  # where it was imported by its value
            monkeypatch.setattr(file_download, name, value)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
