"""The limits on uploads: bytes and a deadline while they arrive, with the API's errors and with the page's."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spjax.serving import page_guard, uploads
from spjax.serving.limits import Limits

starlette = pytest.importorskip("starlette", reason="starlette is in the extra serve")
PATHS = ("/predict", "/gradio_api/queue/join")


def ask(parts: Sequence[bytes], path: str = "/predict", length: int | None = None, stalls: bool = False) -> Any:
    """The number of bytes that an application read, or the exception of its `receive`.

    `stalls`: more is promised and never comes.
    """
    left, read = list(parts), 0

    async def receive() -> Any:
        if not left:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or stalls}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal read
        more = True
        while more:
            message = await receive()
            read += len(message["body"])
            more = message["more_body"]

    headers = [] if length is None else [(b"content-length", b"%d" % length)]
    limited = uploads.UploadLimit(app, Limits(max_bytes=10, timeout=0.05 if stalls else 60))
    try:
        asyncio.run(limited({"type": "http", "path": path, "headers": headers}, receive, None))  # type: ignore[arg-type]
    except Exception as error:
        return error
    return read


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("count", "length", "accepted"), [(2, 10, True), (2, None, True), (3, 15, False), (3, None, False)]
)
def test_bodies_are_limited_with_any_content_length(path: str, count: int, length: int | None, accepted: bool):
    found = ask([b"12345"] * count, path, length)
    assert (found == 5 * count) if accepted else ("the most allowed" in _text(found, 413))


def test_a_table_may_have_many_files(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(uploads, "TABLE_BYTES", 5000)
    assert ask([bytes(100)] * 40, "/gradio_api/upload") == 4000
    assert "larger than 0.005 MB" in _text(ask([bytes(100)] * 51, "/gradio_api/upload"), 413)
    monkeypatch.setattr(uploads, "TABLE_BYTES", 1)
    assert ask([b"12345"], "/gradio_api/upload") == 5, "a file of the size that is allowed alone"


@pytest.mark.parametrize("path", PATHS)
def test_a_body_must_arrive_before_the_deadline(path: str):
    assert "did not arrive within 0.05 s: 5 bytes so far" in _text(ask([b"12345"], path, stalls=True), 408)


def _text(error: Any, status: int) -> str:
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartException

    assert isinstance(error, HTTPException | MultiPartException), error
    assert not isinstance(error, HTTPException) or error.status_code == status
    return str(error.detail if isinstance(error, HTTPException) else error.message)


def test_old_files_are_deleted(tmp_path: Path):
    ages = {"a/old.wav": 1900, "b/new.wav": 100, "tmpold": 1900, "tmpnew": 100}
    for name, age in ages.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"part of a file")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / "empty").mkdir()
    os.utime(tmp_path / "empty", (time.time() - 1900,) * 2)
    page_guard.delete_old(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"a", "b", "b/new.wav", "tmpnew"}, "a folder goes when it was empty for as long"


def test_the_folder_of_a_killed_server_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next start; those of running servers, and of ones that start just now, are kept."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lock = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(1, flush=True); input()"
    for name in ("killed", "running", "starting"):
        (tmp_path / f"spjax-uploads-{name}").mkdir()
        (tmp_path / f"spjax-uploads-{name}" / "a.wav").write_bytes(b"1")
    for name in ("killed", "running"):
        os.utime(tmp_path / f"spjax-uploads-{name}", (0, 0))
    servers = {
        name: subprocess.Popen(
            [sys.executable, "-c", lock, str(tmp_path / f"spjax-uploads-{name}")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for name in ("killed", "running")
    }  # fmt: skip
    for server in servers.values():
        assert server.stdout is not None
        server.stdout.readline()  # it has the lock
    servers["killed"].kill()
    servers["killed"].wait()
    with page_guard._folder.__wrapped__() as made:
        kept = {path.name for path in tmp_path.iterdir()}
        assert kept == {"spjax-uploads-running", "spjax-uploads-starting", Path(made).name}
    servers["running"].communicate(b"")
