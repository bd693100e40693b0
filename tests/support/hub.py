"""A server that speaks as much of the hub's API as its client needs to push and pull a model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Repositories in memory.

    Attributes:
        commits: ``owner/name`` -> files of each commit, the newest last: path -> bytes.
        requests: Method and path of every request.
    """

    def __init__(self) -> None:
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = ""

    def files(self, name: str) -> dict[str, bytes]:
        return self.commits[name][-1]

    def sha(self, name: str) -> str:
        return hashlib.sha1(f"{name}{len(self.commits[name])}".encode()).hexdigest()

    def create(self, about: dict[str, Any]) -> tuple[int, Any]:
        name = f"{about['organization'] or 'someone'}/{about['name']}"
        status = 409 if name in self.commits else 200
        self.commits.setdefault(name, [{}])
        return status, {"url": f"{self.url}/{name}", "name": name}

    def preupload(self, name: str, about: dict[str, Any]) -> tuple[int, Any]:
        modes = {"uploadMode": "regular", "shouldIgnore": False}
        return 200, {"files": [{"path": file["path"], **modes} for file in about["files"]]}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        self.commits[name].append(self.files(name) | added)
        sha = self.sha(name)
        return 200, {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{self.url}/{name}/commit/{sha}",
        }

    def tree(self, name: str) -> tuple[int, Any]:
        return 200, [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in self.files(name).items()
        ]

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Answer with a status and JSON, or the bytes of a file."""
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":  # of a README.md
            return 200, {"errors": [], "warnings": []}
        found = re.fullmatch(
            r"(/api/models)?/([^/]+/[^/]+)/(\w+)/([^/]+)(?:/([^?]*))?(\?.*)?", path
        )
        name, what = (found[2], found[3]) if found else ("", "")
        if name not in self.commits:
            return 404, {"error": "RepoNotFound"}
        if what == "preupload":
            return self.preupload(name, json.loads(body))
        if what == "commit":
            return self.commit(name, [*map(json.loads, body.splitlines())])
        if what == "tree":
            return self.tree(name)
        if what == "resolve" and found and (data := self.files(name).get(found[5])) is not None:
            return 200, data
        if what == "revision" and found and found[4] == "main":
            return 200, {"id": name, "sha": self.sha(name), "siblings": []}
        return 404, {"error": "RevisionNotFound" if what == "revision" else "EntryNotFound"}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub at its ``url`` on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append((self.command, self.path))
            status, found = hub.answer(self.path, body)
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", found["error"])
            if match := re.match(r"/([^/]+/[^/]+)/resolve/", self.path):
                if match[1] in hub.commits:
                    self.send_header("X-Repo-Commit", hub.sha(match[1]))
                self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
