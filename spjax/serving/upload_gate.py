"""What the page's server takes in: so much a request, so much in all, and none of it forever."""

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

UPLOAD_BYTES = 256 * MEGABYTE  # of a request with files
CALL_BYTES = 4 * MEGABYTE  # of one without: names of files, tasks, units
FOLDER_BYTES = 4000 * MEGABYTE  # of all uploads together, those on their way too
GRACE_SECONDS, LEAST_RATE, MOST_SECONDS = 30.0, 16_000.0, 900.0  # a body may take grace + bytes / rate, and no more
COUNTED_SECONDS = 5.0  # that a count of the folder holds

_TEXT = (b"content-type", b"text/plain; charset=utf-8")  # Starlette's 500, which an error follows

_log = logging.getLogger(__name__)
Scope: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Any]]
Send: TypeAlias = Callable[[Any], Awaitable[None]]


@dataclasses.dataclass
class UploadGate:
    """ASGI middleware in front of gradio's own routes, which bound single files and nothing else.

    What is refused is answered with a sentence: 413 for a request that is too large, 408 for one that comes too
    slowly, 507 where all uploads together are too many. A client that leaves in the middle costs no line in the log.

    Attributes:
      app: what is behind it.
      folder: where uploads are written.
      upload_bytes: the most of a request with files.
      folder_bytes: the most of all uploads.
      grace: seconds that a body may take before its rate counts, `LEAST_RATE` bytes a second.
    """

    app: Callable[[Scope, Receive, Send], Awaitable[None]]
    folder: Path
    upload_bytes: int = UPLOAD_BYTES
    folder_bytes: int = FOLDER_BYTES
    grace: float = GRACE_SECONDS

    def __post_init__(self) -> None:
        self._coming = 0  # bytes that requests on their way may still write
        self._used, self._counted = 0, float("-inf")  # of the folder, and when
        self._counting = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request, as ASGI has it."""
        if scope["type"] != "http" or scope["method"] != "POST" or "/gradio_api/" not in scope["path"]:
            await self.app(scope, receive, send)
            return
        upload = scope["path"].rstrip("/").endswith("/upload")
        most = self.upload_bytes if upload else CALL_BYTES
        length = dict(scope["headers"]).get(b"content-length", b"")
        promised = int(length) if length.isdigit() else most  # in chunks: as much as may come
        if promised > most:
            await _refuse(413, _too_large(most), receive, send, self.grace)
        elif not upload:
            await self._pass(scope, receive, send, most)
        elif not await self._room(promised):
            told = "the server holds as many uploads as it can: try again in a while"
            await _refuse(507, told, receive, send, self.grace)
        else:
            self._coming += promised
            try:
                await self._pass(scope, receive, send, most)
            finally:
                self._coming -= promised
                self._used += promised  # until it is counted again

    async def _room(self, promised: int) -> bool:
        clock = asyncio.get_running_loop().time
        async with self._counting:
            if clock() - self._counted > COUNTED_SECONDS:
                self._used = await asyncio.to_thread(used_bytes, self.folder)
                self._counted = clock()
        return self._used + self._coming + promised <= self.folder_bytes

    async def _pass(self, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        """Lets the app answer; what its body breaks is refused in the app's place."""
        from starlette.formparsers import MultiPartException
        from starlette.requests import ClientDisconnect

        clock = asyncio.get_running_loop().time
        began, got, ended, started = clock(), 0, False, False
        refusal: tuple[int, str] | None = None

        async def bounded() -> Any:
            nonlocal got, ended, refusal
            if ended:  # nothing but the client's leaving can come
                return await receive()
            until = began + min(MOST_SECONDS, self.grace + got / LEAST_RATE)
            try:
                async with asyncio.timeout(until - clock()):
                    message = await receive()
            except TimeoutError:
                refusal = 408, "the upload came too slowly: send it again over a better line, or a smaller file"
            else:
                got += len(message.get("body", b""))
                ended = not message.get("more_body", False)
                if got <= most:
                    return message
                refusal = 413, _too_large(most)
            raise MultiPartException(refusal[1])  # the one error after which gradio deletes what it has written so far

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
            # Gradio's own: a form with other parts than files, a function or arguments that are none.
            _log.warning("%s failed: %s: %s", scope["path"][:100], type(error).__name__, str(error)[:200])
            if refusal is None and not started and isinstance(error, OSError):  # a full disk is not the client's fault
                refusal = 500, FAILED
            elif refusal is None and not started:
                refusal = (
                    400,
                    "the request cannot be read: send files in a form, each as `files`; calls as `/info` says",
                )
        if refusal is not None:
            await _refuse(*refusal, receive, send, 0.0 if ended or refusal[0] == 408 else self.grace)


def _too_large(most: int) -> str:
    return f"the request is larger than {most / MEGABYTE:g} MB, the most that is taken at once: send fewer files"


async def _refuse(status: int, sentence: str, receive: Receive, send: Send, patience: float) -> None:
    """Answers, and reads on for so many seconds before it: a client that still sends would lose the answer."""
    await drain(receive, patience)
    body = sentence.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if status == 408:
        await drain(receive, DRAIN_SECONDS)
    await send({"type": "http.response.body", "body": b""})
