"""Limits on uploads to the page: bytes per request, bytes in all, and time."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

from spjax.serving.api import DRAIN_SECONDS, FAILED, drain
from spjax.serving.limits import MEGABYTE
from spjax.serving.upload_folder import used_bytes

UPLOAD_BYTES = 256 * MEGABYTE  # most of a request with files
CALL_BYTES = 4 * MEGABYTE  # most of a request without files: file names, tasks, units
FOLDER_BYTES = 4000 * MEGABYTE  # most of all uploads, including those in progress
GRACE_SECONDS, LEAST_RATE, MOST_SECONDS = 30.0, 16_000.0, 900.0  # a body may take grace + bytes / rate, up to the last
COUNTED_SECONDS = 5.0  # for which the folder's size is cached

_TEXT = (b"content-type", b"text/plain; charset=utf-8")  # of Starlette's 500, which is sent before the exception

_log = logging.getLogger(__name__)
Scope: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Any]]
Send: TypeAlias = Callable[[Any], Awaitable[None]]


@dataclasses.dataclass
class UploadGate:
    """ASGI middleware that limits Gradio's upload routes, which only limit single files.

    Refused requests get one sentence: 413 for a request that is too large, 408 for one that is too slow, 507 if all
    uploads together are too large. A client that disconnects is not logged.

    Attributes:
      app: the wrapped application.
      folder: where uploads are written.
      upload_bytes: most bytes of a request with files.
      folder_bytes: most bytes of all uploads.
      grace: seconds before a body must keep to `LEAST_RATE` bytes a second.
    """

    app: Callable[[Scope, Receive, Send], Awaitable[None]]
    folder: Path
    upload_bytes: int = UPLOAD_BYTES
    folder_bytes: int = FOLDER_BYTES
    grace: float = GRACE_SECONDS

    def __post_init__(self) -> None:
        self._coming = 0  # bytes that requests in progress may still write
        self._used, self._counted = 0, float("-inf")  # size of the folder, and when it was measured
        self._counting = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle an ASGI request."""
        if scope["type"] != "http" or scope["method"] != "POST" or "/gradio_api/" not in scope["path"]:
            await self.app(scope, receive, send)
            return
        upload = scope["path"].rstrip("/").endswith("/upload")
        most = self.upload_bytes if upload else CALL_BYTES
        length = dict(scope["headers"]).get(b"content-length", b"")
        promised = int(length) if length.isdigit() else most  # a chunked body has no length: assume the most
        if promised > most:
            await _refuse(413, _too_large(most), receive, send, self.grace)
        elif not upload:
            await self._pass(scope, receive, send, most)
        elif not await self._room(promised):
            message = "the server's upload folder is full: try again later"
            await _refuse(507, message, receive, send, self.grace)
        else:
            self._coming += promised
            try:
                await self._pass(scope, receive, send, most)
            finally:
                self._coming -= promised
                self._used += promised  # until the folder is measured again

    async def _room(self, promised: int) -> bool:
        clock = asyncio.get_running_loop().time
        async with self._counting:
            if clock() - self._counted > COUNTED_SECONDS:
                self._used = await asyncio.to_thread(used_bytes, self.folder)
                self._counted = clock()
        return self._used + self._coming + promised <= self.folder_bytes

    async def _pass(self, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        """Call the app with a body that is bounded in size and time, and replace its response if the bound is hit."""
        from starlette.formparsers import MultiPartException
        from starlette.requests import ClientDisconnect

        clock = asyncio.get_running_loop().time
        began, got, ended, started = clock(), 0, False, False
        refusal: tuple[int, str] | None = None

        async def bounded() -> Any:
            nonlocal got, ended, refusal
            if ended:  # only the client's disconnect can follow
                return await receive()
            until = began + min(MOST_SECONDS, self.grace + got / LEAST_RATE)
            try:
                async with asyncio.timeout(until - clock()):
                    message = await receive()
            except TimeoutError:
                refusal = 408, "the upload is too slow: send it again over a faster connection, or a smaller file"
            else:
                got += len(message.get("body", b""))
                ended = not message.get("more_body", False)
                if got <= most:
                    return message
                refusal = 413, _too_large(most)
            raise MultiPartException(refusal[1])  # the only error after which gradio deletes its partial file

        failed = False

        async def sending(message: Any) -> None:
            nonlocal started, failed
            failed = failed or (message.get("status") == 500 and _TEXT in message["headers"])
            if refusal is None and not failed:
                started = True
                await send(message)

        try:
            await self.app(scope, bounded, sending)
        except (MultiPartException, ClientDisconnect):
            if refusal is None and not started and not ended:
                refusal = 400, "the upload broke off: send it again"
        except Exception as error:
            # Gradio's: a form with parts other than files, an unknown function or wrong arguments.
            _log.warning("%s failed: %s: %s", scope["path"][:100], type(error).__name__, str(error)[:200])
            if refusal is None and not started and isinstance(error, OSError):  # such as a full disk: not a bad request
                refusal = 500, FAILED
            elif refusal is None and not started:
                refusal = (
                    400,
                    "the request cannot be read: send files in a form, each as `files`; calls as in `/info`",
                )
        if refusal is not None:
            await _refuse(*refusal, receive, send, 0.0 if ended or refusal[0] == 408 else self.grace)


def _too_large(most: int) -> str:
    return f"the request is larger than {most / MEGABYTE:g} MB, the most allowed: send fewer files at a time"


async def _refuse(status: int, sentence: str, receive: Receive, send: Send, seconds: float) -> None:
    """Read and discard the body for up to `seconds`, then respond: a client that is still sending would miss it."""
    await drain(receive, seconds)
    body = sentence.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if status == 408:
        await drain(receive, DRAIN_SECONDS)
    await send({"type": "http.response.body", "body": b""})
