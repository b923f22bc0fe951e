"""A hub of one's own on loopback, with what `huggingface_hub` asks of the real one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories of files by commit.

    branches: (repository, branch) -> commit. commits: (repository, commit) -> name -> bytes.
    gated: repositories whose files are given to nobody. given: paths that were asked and given.
    """

    def __init__(self):
        self.branches: dict[tuple[str, str], str] = {}
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.is_down = False
        self.given: list[str] = []
        self.url = ""

    def fetched(self) -> list[str]:
        """Names of the files that were given since the last call, sorted."""
        names = [
            path.split("/resolve/")[1].partition("/")[2]
            for path in self.given
            if "/resolve/" in path
        ]
        self.given.clear()
        return sorted(names)

    def push(self, repo: str, folder: Path, branch: str = "main", **more: bytes) -> str:
        """Make a folder the newest commit of a branch; more: files beside its own."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
        files |= {name.replace("__", "/").replace("_DOT_", "."): x for name, x in more.items()}
        whole = b"".join(name.encode() + files[name] for name in sorted(files))
        commit = hashlib.sha1(whole).hexdigest()
        self.branches[repo, branch] = commit
        self.commits[repo, commit] = files
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        if self.is_down:
            return 503, {}, b""
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            return self._about(match[1], match[2] or "revision", unquote(match[3] or "main"))
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path):
            return self._file(match[1], match[2], unquote(match[3]))
        return 404, {}, b"{}"

    def _about(self, repo: str, what: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        if all(repo != known for known, _ in self.branches):
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        commit = self.branches.get((repo, revision), revision)
        if (repo, commit) not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = self.commits[repo, commit]
        if what == "tree":
            tree: Any = [
                {"type": "file", "path": n, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
                for n, x in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        info = {"id": repo, "sha": commit, "siblings": [{"rfilename": n} for n in files]}
        return 200, {}, json.dumps(info).encode()

    def _file(self, repo: str, commit: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, b""
        body = self.commits[repo, commit].get(name)
        if body is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}, body


def _handler(hub: Any) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = hub.answer(urlsplit(self.path).path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
                hub.given.append(self.path)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextlib.contextmanager
def serving(hub: Any = None) -> Iterator[Any]:
    """A hub that answers at its ``url`` until the end of the block; None: an empty one of models.

    hub: has ``answer(path)``, ``given`` and ``url``.
    """
    hub = hub or Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
