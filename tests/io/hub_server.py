"""Fake Hugging Face hub in memory: the part of its HTTP API that model repositories need."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_writer"
READER = "hf_reader"


class Hub:
    """Repositories (files by commit, commits by branch) and recorded requests."""

    def __init__(self) -> None:
        self.url = ""
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.created: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.status: int | None = None  # returned for every request, if set

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        before = self.commits.setdefault(repo, {})
        old = before.get(self.branches.setdefault(repo, {}).get(branch, ""), {})
        made = hashlib.sha1(f"{repo}{branch}{len(before)}".encode()).hexdigest()
        before[made] = {**old, **files}
        self.branches[repo][branch] = made
        return made


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        return None

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _missing(self, what: str) -> None:
        self._answer(404, {"error": what}, X_Error_Code=what)

    def _find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo not in self.hub.commits:
            self._missing("RepoNotFound")
            return None
        sha = self.hub.branches[repo].get(revision, revision)
        if sha not in self.hub.commits[repo]:
            self._missing("RevisionNotFound")
            return None
        return sha, self.hub.commits[repo][sha]

    def _handle(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        if hub.status:
            return self._answer(hub.status, {"error": "out of order"})
        if self.command == "POST":
            return self._write(path, body)
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(revision|tree)/(.+)", path):
            repo, what, revision = found.groups()
            if not (at := self._find(repo, revision)):
                return None
            sha, files = at
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            siblings = [{"rfilename": name} for name in files]
            return self._answer(200, entries if what == "tree" else {"id": repo, "sha": sha, "siblings": siblings})
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = found.groups()
            if not (at := self._find(repo, revision)):
                return None
            sha, files = at
            if name not in files:
                return self._missing("EntryNotFound")
            etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            return self._answer(200, files[name], ETag=etag, X_Repo_Commit=sha)
        return self._answer(404)

    def _write(self, path: str, body: bytes) -> None:
        hub, token = self.hub, (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---\n")[1]
            try:
                assert isinstance(yaml.safe_load(front), dict)
            except (yaml.YAMLError, AssertionError) as error:
                return self._answer(400, {"errors": [{"message": f"front matter: {error}"}], "warnings": []})
            return self._answer(200, {"errors": [], "warnings": []})
        if token != TOKEN:
            status, why = (403, "no write access") if token == READER else (401, "Invalid credentials")
            return self._answer(status, {"error": why}, X_Error_Message=why)
        if path == "/api/repos/create":
            request = json.loads(body)
            repo = f"{request['organization']}/{request['name']}"
            if repo in hub.commits:
                return self._answer(409, {"error": "exists", "url": f"{hub.url}/{repo}"})
            hub.created.append(request)
            hub.commit(repo, "main", {})
            return self._answer(200, {"url": f"{hub.url}/{repo}", "name": repo, "id": repo})
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit)/(.+)", path)
        if not found or found[1] not in hub.commits:
            return self._missing("RepoNotFound")
        repo, what, revision = found.groups()
        if revision not in hub.branches[repo]:
            return self._missing("RevisionNotFound")
        if what == "preupload":
            known = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": known})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        made = hub.commit(repo, revision, files)
        return self._answer(200, {"commitOid": made, "commitUrl": f"{hub.url}/{repo}/commit/{made}"})

    do_GET = do_POST = do_HEAD = _handle  # noqa: N815 - as http.server wants them


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """Runs a hub at `.url` during the block."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
