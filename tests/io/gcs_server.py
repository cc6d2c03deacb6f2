"""Fake Cloud Storage under its real names: a proxy that answers for *.googleapis.com with a local certificate.

Code that runs with `Bucket.environment` takes the same path as in Google's cloud, in every library: TensorFlow's file
system, TensorStore, google-cloud-storage. A client without a token is refused.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "token-of-the-tests"
UPDATED = "2026-01-02T03:04:05.678Z"
HOSTS = ("www.googleapis.com", "storage.googleapis.com", "oauth2.googleapis.com")


class Bucket:
    """Objects of a bucket by name, and the environment of its clients.

    Attributes:
      name: of the only bucket.
      objects: content by name; clients change it.
      environment: environment variables for client processes.
      asked: number of requests of each kind: "GET object", "POST upload" and so on.
      status: returned for every request, if set.
    """

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.name, self.environment = name, environment
        self.objects: dict[str, bytes] = {}
        self.generations: Counter[str] = Counter()
        self.sessions: dict[str, tuple[str, bytearray]] = {}
        self.asked: Counter[str] = Counter()
        self.status: int | None = None
        self.lock = threading.Lock()

    def put(self, name: str, content: bytes) -> None:
        """Writes an object, atomically as in Cloud Storage."""
        self.objects[name] = content
        self.generations[name] += 1

    def put_tree(self, folder: Path, under: str) -> None:
        """Uploads every file of a folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{under}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def get_tree(self, under: str, folder: Path) -> Path:
        """Downloads every object under a prefix to a folder."""
        for name, content in self.objects.items():
            if name.startswith(f"{under}/") and not name.endswith("/"):
                path = folder / name.removeprefix(f"{under}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return folder


class _Handler(http.server.BaseHTTPRequestHandler):
    bucket: Bucket
    tls: ssl.SSLContext
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        return None

    def do_CONNECT(self) -> None:
        """Accepts a tunnel; this server then answers for the requested host."""
        self.send_response(200)
        self.end_headers()
        self.wfile.flush()
        self.connection = self.tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb")
        self.close_connection = False

    def handle_expect_100(self) -> bool:
        proceed = super().handle_expect_100()
        self.wfile.flush()  # otherwise libcurl waits a second for it
        return proceed

    def _answer(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _serve(self) -> None:
        content = self._body()
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        if url.path in ("/token", "/oauth2/v3/token"):
            return self._answer(200, {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"})
        with self.bucket.lock:
            if self.bucket.status is not None:
                return self._answer(self.bucket.status, {"error": {"code": self.bucket.status, "message": "as told"}})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._answer(401, {"error": {"code": 401, "message": "Anonymous caller does not have access"}})
            return self._route(url.path, query, content)

    do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - the server's names

    def _route(self, path: str, query: dict[str, str], content: bytes) -> None:
        if found := re.fullmatch(r"/upload/session/(\d+)", path):
            return self._resume(found[1], content)
        found = re.match(r"(?:/(upload))?(?:/storage/v1/b)?/([^/]+)(?:/o(?:/([^/]+))?)?(?:/(.+))?$", path)
        if not found:
            return self._answer(404, {"error": {"code": 404, "message": f"no such path {path}"}})
        upload, bucket, name, rest = found.groups()
        plain = not path.startswith(("/storage/v1/", "/upload/"))  # storage.googleapis.com/BUCKET/NAME
        name = unquote(rest if plain else name or "")
        if bucket != self.bucket.name:
            return self._answer(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
        kind = (
            "upload"
            if upload
            else "copy"
            if rest and not plain
            else "object"
            if name
            else "list"
            if "/o" in path
            else ""
        )
        self.bucket.asked[f"{self.command} {kind or 'bucket'}"] += 1
        if path.endswith(f"/b/{bucket}/storageLayout"):
            return self._answer(200, {"bucket": bucket, "location": "EU", "hierarchicalNamespace": {"enabled": False}})
        if upload:
            return self._upload(query, content)
        if kind == "copy":
            return self._copy(name, rest)
        if kind == "list":
            return self._list(query)
        return self._object(name, plain or query.get("alt") == "media") if name else self._answer(200, self._bucket())

    def _bucket(self) -> dict[str, Any]:
        return {"kind": "storage#bucket", "id": self.bucket.name, "name": self.bucket.name, "location": "EU"}

    def _described(self, name: str) -> dict[str, Any]:
        content = self.bucket.objects[name]
        return {
            "kind": "storage#object", "name": name, "bucket": self.bucket.name, "size": str(len(content)),
            "generation": str(self.bucket.generations[name]), "metageneration": "1", "updated": UPDATED,
            "timeCreated": UPDATED, "contentType": "application/octet-stream",
        }  # fmt: skip

    def _object(self, name: str, media: bool) -> None:
        if name not in self.bucket.objects:
            return self._answer(404, {"error": {"code": 404, "message": f"No such object: {name}"}})
        if self.command == "DELETE":
            del self.bucket.objects[name]
            return self._answer(204)
        if not media:
            return self._answer(200, self._described(name))
        content = self.bucket.objects[name]
        headers = {
            "x-goog-generation": str(self.bucket.generations[name]),
            "ETag": f'"{self.bucket.generations[name]}"',
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self._answer(200, content, headers)
        start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
        if start >= len(content):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        part = content[start:stop]
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        return self._answer(206, part, headers)

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], []
        for name in sorted(self.bucket.objects):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            inside, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if cut:
                prefixes.append(f"{prefix}{inside}{delimiter}")
            else:
                items.append(self._described(name))
        first, most = int(query.get("pageToken") or 0), int(query.get("maxResults") or 1000)
        # small pages, so that clients must request several
        entries = [(one, None) for one in dict.fromkeys(prefixes)] + [(None, one) for one in items]
        page = entries[first : first + min(most, 50)]
        answer: dict[str, Any] = {
            "kind": "storage#objects",
            "prefixes": [one for one, _ in page if one],
            "items": [one for _, one in page if one],
        }
        if first + len(page) < len(entries):
            answer["nextPageToken"] = str(first + len(page))
        self._answer(200, answer)

    def _matches(self, name: str, query: dict[str, str]) -> bool:
        now = self.bucket.generations[name] if name in self.bucket.objects else 0
        return "ifGenerationMatch" not in query or int(query["ifGenerationMatch"]) == now

    def _upload(self, query: dict[str, str], content: bytes) -> None:
        name = query["name"]
        if not self._matches(name, query):
            return self._answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        if query["uploadType"] == "media":
            self.bucket.put(name, content)
            return self._answer(200, self._described(name))
        number = str(len(self.bucket.sessions))
        self.bucket.sessions[number] = name, bytearray()
        return self._answer(200, b"", {"Location": f"https://www.googleapis.com/upload/session/{number}"})

    def _resume(self, number: str, content: bytes) -> None:
        name, held = self.bucket.sessions[number]
        span = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range") or "bytes */*")
        assert span, self.headers
        held[int(span[1] or len(held)) :] = content
        if span[3] != "*" and len(held) == int(span[3]):
            self.bucket.put(name, bytes(held))
            return self._answer(200, self._described(name))
        return self._answer(308, b"", {"Range": f"bytes=0-{len(held) - 1}"} if held else {})

    def _copy(self, name: str, rest: str) -> None:
        found = re.fullmatch(r"(?:rewriteTo|copyTo)/b/([^/]+)/o/(.+)", rest)
        if not found or name not in self.bucket.objects:
            return self._answer(404, {"error": {"code": 404, "message": f"No such object: {name}"}})
        target = unquote(found[2])
        self.bucket.put(target, self.bucket.objects[name])
        return self._answer(200, {"done": True, "resource": self._described(target)})


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        return None  # a killed client disconnects


@contextlib.contextmanager
def running(folder: Path, name: str = "spjax-tests") -> Iterator[Bucket]:
    """Runs a bucket during the block. `folder`: for certificates and a token file."""
    import trustme

    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*HOSTS).configure_cert(tls)
    certificate, account = folder / "ca.pem", folder / "account.json"
    authority.cert_pem.write_to_path(certificate)
    account.write_text(
        json.dumps({"type": "authorized_user", "client_id": "id", "client_secret": "secret", "refresh_token": "again"})
    )
    server = _Server(("127.0.0.1", 0), _Handler)
    place = f"http://127.0.0.1:{server.server_address[1]}"
    bucket = Bucket(
        name,
        {
            **dict.fromkeys(("https_proxy", "HTTPS_PROXY"), place),
            **dict.fromkeys(("no_proxy", "NO_PROXY"), "localhost,127.0.0.1"),
            **dict.fromkeys(("CURL_CA_BUNDLE", "TENSORSTORE_CA_BUNDLE", "REQUESTS_CA_BUNDLE"), str(certificate)),
            "GOOGLE_APPLICATION_CREDENTIALS": str(account),
            "GOOGLE_CLOUD_PROJECT": "spjax-tests",
            "NO_GCE_CHECK": "true",
        },
    )
    server.RequestHandlerClass = type("Handler", (_Handler,), {"bucket": bucket, "tls": tls})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
