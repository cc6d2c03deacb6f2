"""The upload gate, tested with ASGI messages: limits on size and time, and the responses when they are exceeded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spjax.serving.api import FAILED
from spjax.serving.upload_gate import UploadGate

pytest.importorskip("starlette", reason="starlette is in the extra serve")


async def reads_all(scope: Any, receive: Any, send: Any) -> None:
    """An app that responds when it has read the body."""
    while (await receive()).get("more_body"):
        await asyncio.sleep(0)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"taken"})


async def ask(
    gate: UploadGate,
    parts: Sequence[bytes],
    path: str = "/gradio_api/upload",
    length: int | None = None,
    pause: float = 0,
) -> tuple[int, str]:
    """Status and text of the response to a request whose body comes in parts."""
    left, sent = list(parts), []

    async def receive() -> Any:
        await asyncio.sleep(pause)
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if length is None else [(b"content-length", b"%d" % length)]
    await gate({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send)
    start, *body = sent
    assert start["type"] == "http.response.start"
    assert not body[-1].get("more_body", False)
    return start["status"], b"".join(part["body"] for part in body).decode()


@pytest.mark.parametrize(
    ("parts", "length", "status"),
    [([b"12345"] * 2, 10, 200), ([b"12345"] * 2, None, 200), ([b"12345"] * 3, 15, 413), ([b"12345"] * 3, None, 413)],
)
def test_requests_are_limited_with_any_content_length(tmp_path: Path, parts: list[bytes], length: int, status: int):
    gate = UploadGate(reads_all, tmp_path, upload_bytes=10)
    got, message = asyncio.run(ask(gate, parts, length=length))
    assert got == status
    assert ("the most allowed" in message) == (status == 413)


def test_calls_without_files_are_limited_more_and_other_paths_not(tmp_path: Path):
    gate = UploadGate(reads_all, tmp_path)
    large = [bytes(1_000_000)] * 5
    assert asyncio.run(ask(gate, large, "/gradio_api/queue/join"))[0] == 413
    assert asyncio.run(ask(gate, large))[0] == 200
    assert asyncio.run(ask(gate, large, "/predict"))[0] == 200, "the API has other limits"


def test_slow_uploads_are_closed(tmp_path: Path):
    gate = UploadGate(reads_all, tmp_path, grace=0.1)
    status, message = asyncio.run(ask(gate, [b"a"] * 1000, pause=0.02))
    assert (status, "too slow" in message) == (408, True)
    assert asyncio.run(ask(gate, [bytes(16_000)] * 15, pause=0.02))[0] == 200, "as long, but at a fair rate"


def test_all_uploads_together_are_limited(tmp_path: Path):
    (tmp_path / "kept.wav").write_bytes(bytes(50_000))
    gate = UploadGate(reads_all, tmp_path, folder_bytes=100_000)

    async def several() -> list[tuple[int, str]]:
        return await asyncio.gather(*(ask(gate, [bytes(20_000)], length=20_000, pause=0.05) for _ in range(4)))

    responses = asyncio.run(several())
    assert sorted(status for status, _ in responses) == [200, 200, 507, 507], "uploads in progress count"
    assert all("try again later" in text for status, text in responses if status == 507)


def test_errors_of_the_app_are_logged_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def breaks(scope: Any, receive: Any, send: Any) -> None:
        raise TypeError("File is not an instance")

    status, message = asyncio.run(ask(UploadGate(breaks, tmp_path), [b"a"]))
    assert status == 400
    assert "cannot be read" in message
    assert "TypeError" in caplog.text
    assert "Traceback" not in caplog.text
    assert asyncio.run(ask(UploadGate(breaks, tmp_path), [b"a"], "/gradio_api/queue/join"))[0] == 400

    async def no_space(scope: Any, receive: Any, send: Any) -> None:
        raise OSError(28, "No space left on device")

    assert asyncio.run(ask(UploadGate(no_space, tmp_path), [b"a"])) == (500, FAILED)

    async def tells(scope: Any, receive: Any, send: Any) -> None:
        """As in Starlette: a 500 response, then the exception."""
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": 500, "headers": headers})
        await send({"type": "http.response.body", "body": b"Internal Server Error"})
        raise TypeError("no argument")

    status, message = asyncio.run(ask(UploadGate(tells, tmp_path), [b"a"], "/gradio_api/call/predict"))
    assert (status, "cannot be read" in message) == (400, True)
