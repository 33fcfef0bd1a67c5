"""A stand-in for the Hugging Face hub on this machine: the requests that huggingface_hub makes for model repositories.

Weights are uploaded as on the hub, by Git LFS, and other files inside the commit. A repository is kept as its commits,
each a mapping of paths to bytes. `requests` has every request, so that a test can tell what was fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
TOKEN = "hf_of_the_local_hub"


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {})

    def commit(self, ref: str, content: Files) -> str:
        sha = hashlib.sha1(repr((len(self.commits), ref, sorted(content))).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = content, sha
        return sha

    @property
    def files(self) -> Files:
        return self.commits[self.refs["main"]]


class LocalHub:
    """Repositories by id, behind an address."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.sizes: dict[str, int] = {}
        """Sizes that are told instead of true ones, by path."""
        self.address = ""

    @contextmanager
    def running(self) -> Iterator[LocalHub]:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._read()

    def do_HEAD(self) -> None:
        self._read()

    def do_PUT(self) -> None:
        self.hub.objects[self.path.rpartition("/")[2]] = self._body()
        self._send({})

    def do_POST(self) -> None:
        path = self._path()
        body = self._body()
        if path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send({"error": "Invalid username or password."}, status=401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = name in self.hub.repositories
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories.setdefault(name, Repository(private=bool(private)))
            return self._send({"url": f"{self.hub.address}/{name}"}, status=409 if known else 200)
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self._send({"transfer": "basic", "objects": [self._lfs(one) for one in json.loads(body)["objects"]]})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path)
        assert found is not None, path
        repository, (what, ref) = self.hub.repositories[found[1]], found.groups()[1:]
        if what == "branch":
            known = ref in repository.refs
            repository.refs.setdefault(ref, repository.refs["main"])
            return self._send({}, status=409 if known else 200)
        if ref not in repository.refs:
            return self._missing("RevisionNotFound")
        if what == "preupload":
            modes = [(one["path"], one["path"].endswith(".safetensors")) for one in json.loads(body)["files"]]
            told = [
                {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}
                for name, large in modes
            ]
            return self._send({"files": told})
        content = dict(repository.commits[repository.refs[ref]])
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                content[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del content[value["path"]]
        sha = repository.commit(ref, content)
        url = f"{self.hub.address}/{found[1]}/commit/{sha}"
        return self._send({"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": ""})

    def _lfs(self, asked: dict[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self.hub.address}/lfs/{asked['oid']}", "header": {}}}
        return {"oid": asked["oid"], "size": asked["size"], "actions": upload}

    def _read(self) -> None:
        path = self._path()
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?", path)
        found = found or re.fullmatch(r"/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path)
        assert found is not None, path
        repository = self.hub.repositories.get(found[1])
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not allowed):
            return self._missing("RepoNotFound", status=404 if allowed else 401)
        ref = found[3] or "main"
        sha = repository.refs.get(ref, ref)
        if sha not in repository.commits:
            return self._missing("RevisionNotFound")
        content = repository.commits[sha]
        if found[2] == "resolve":
            if found[4] not in content:
                return self._missing("EntryNotFound", commit=sha)
            return self._send_file(content[found[4]], sha)
        told = [(name, self.hub.sizes.get(name, len(data)), _digest(data)) for name, data in content.items()]
        if found[2] == "tree":
            return self._send([{"type": "file", "path": name, "size": size, "oid": oid} for name, size, oid in told])
        siblings = [{"rfilename": name, "size": size, "blobId": oid} for name, size, oid in told]
        return self._send({"id": found[1], "sha": sha, "private": repository.private, "tags": [], "siblings": siblings})

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _missing(self, code: str, *, status: int = 404, commit: str = "") -> None:
        self._send({"error": code}, status=status, headers={"X-Error-Code": code, "X-Repo-Commit": commit})

    def _send_file(self, data: bytes, sha: str) -> None:
        self._send(data, headers={"X-Repo-Commit": sha, "ETag": f'"{_digest(data)}"', "Accept-Ranges": "bytes"})

    def _send(self, content: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/octet-stream" if data is content else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
