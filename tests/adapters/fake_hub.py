"""A hub in memory: repositories that are made, written to and read over HTTP on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"


class _Hub(BaseHTTPRequestHandler):
    repositories: dict[str, dict[str, dict[str, bytes]]]  # name -> branch -> file -> content

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, value: Any = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        given, path = self.body(), self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "no"}, 401, {"X-Error-Message": "this token may not write"})
        if path == "/api/repos/create":
            asked = json.loads(given)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.repositories.setdefault(name, {"main": {}})
            return self.answer({"url": f"{self.address()}/{name}"})
        kind = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path)
        if kind is None or kind[1] not in self.repositories:
            return self.answer({"error": "none"}, 404)
        name, what, revision = kind.groups()
        branches = self.repositories[name]
        if what == "branch":
            branches.setdefault(revision, dict(branches["main"]))
            return self.answer({})
        if what == "preupload":
            files = json.loads(given)["files"]
            told = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self.answer({"files": told})
        for line in map(json.loads, given.decode().splitlines()):
            if line["key"] == "file":
                branches[revision][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"commitUrl": f"{self.address()}/{name}/commit/{self.sha(name, revision)}",
                            "commitOid": self.sha(name, revision), "success": True})  # fmt: skip

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?", path)
        if info is not None and info[1] in self.repositories:
            name, what, revision = info[1], info[2], self.branch(info[1], info[3] or "main")
            if revision is None:
                return self.answer({"error": "none"}, 404, {"X-Error-Code": "RevisionNotFound"})
            files = self.repositories[name][revision]
            if what == "tree":
                return self.answer(
                    [{"type": "file", "path": f, "size": len(c), "oid": _digest(c)} for f, c in files.items()]
                )
            siblings = [{"rfilename": file} for file in files]
            return self.answer({"id": name, "sha": self.sha(name, revision), "siblings": siblings, "private": False})
        wanted = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if wanted is not None and wanted[1] in self.repositories:
            revision = self.branch(wanted[1], wanted[2])
            content = None if revision is None else self.repositories[wanted[1]][revision].get(wanted[3])
            if content is not None and revision is not None:
                headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": self.sha(wanted[1], revision)}
                return self.answer(content, 200, headers)
        return self.answer({"error": "none"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def branch(self, name: str, revision: str) -> str | None:
        branches = self.repositories[name]
        if revision in branches:
            return revision
        return next((branch for branch in branches if self.sha(name, branch) == revision), None)

    def sha(self, name: str, revision: str) -> str:
        files = self.repositories[name][revision]
        return _digest(json.dumps([revision, sorted((f, _digest(c)) for f, c in files.items())]).encode())

    def address(self) -> str:
        return f"http://{self.headers['Host']}"


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub():
    """Within the context, a hub: its address, and what is in its repositories."""
    repositories: dict[str, Any] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"repositories": repositories}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", repositories
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
