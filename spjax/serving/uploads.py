"""The limits on uploads: their bytes and a deadline while they arrive, their length before they are decoded."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

from spjax.encoders.audio import Audio, AudioError, read_stream
from spjax.serving.limits import MEGABYTE, Limits, TooLargeError

MOST_FILES = 500  # of one table on the page
TABLE_BYTES = 256 * MEGABYTE  # of all of them, or of one file if it may be larger
PAGE = "/gradio_api/"  # in the paths of the page's requests

_ADVICE = re.compile(r"\. (Take it from its source again|Leave it out)\b.*$", re.DOTALL)  # advice for data sets
MOST_VALUES = 192_000 * 2  # samples × channels per second of audio (stereo studio rate): bounds the decoder's memory
_DRAIN_SECONDS = 1.0  # for which a refused upload is read: a client that is still sending would not see the response

Receive: TypeAlias = Callable[[], Awaitable[Any]]


class UploadLimit:
    """ASGI middleware that limits the bytes of a request's body, and the time until all of it has arrived.

    A request that exceeds them gets `receive`'s exception: HTTPException with status 413 or 408 on the API, and on the
    page MultiPartException, on which gradio deletes the part that it has written. Gradio checks the size of each file
    of a table.

    Attributes:
      app: the wrapped application.
      limits: on bytes and seconds; an upload to the page, which may hold many files, on `TABLE_BYTES`.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Callable[[Any], Awaitable[None]]) -> None:
        """Handle an ASGI request."""
        if scope["type"] == "http":
            receive = self._limited(scope, receive)
        await self.app(scope, receive, send)

    def _limited(self, scope: dict[str, Any], receive: Receive) -> Receive:
        from starlette.exceptions import HTTPException
        from starlette.formparsers import MultiPartException

        page = PAGE in scope["path"]
        table = page and scope["path"].rstrip("/").endswith("/upload")
        most = max(self.limits.max_bytes, TABLE_BYTES) if table else self.limits.max_bytes
        length = dict(scope["headers"]).get(b"content-length", b"")
        promised, received, ended = int(length) if length.isdigit() else 0, 0, False
        deadline = asyncio.get_running_loop().time() + self.limits.timeout

        def error(status: int, sentence: str) -> Exception:
            return MultiPartException(sentence) if page else HTTPException(status, sentence)

        async def limited() -> Any:
            nonlocal received, ended
            if ended:  # only the client's disconnect can follow
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    self.limits.check_bytes(promised, most)
                    message = await receive()
                    received += len(message.get("body", b""))
                    ended = not message.get("more_body", False)
                    self.limits.check_bytes(received, most)
            except TimeoutError:
                sentence = f"the upload did not arrive within {self.limits.timeout:g} s: {received} bytes so far. Send "
                raise error(408, sentence + "it again, or a shorter or compressed file (FLAC, Ogg)") from None
            except TooLargeError as refused:
                if not ended:
                    await _drain(receive, self.limits.max_bytes)
                raise error(413, str(refused)) from None
            if page and message["type"] == "http.disconnect":
                raise error(400, "the upload broke off: send it again")
            return message

        return limited


async def _drain(receive: Receive, most: int) -> None:
    """Read and discard the rest of a body, for a while: a connection that closes early loses the response."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            more = True
            while more and most > 0:
                message = await receive()
                most -= len(message.get("body", b""))
                more = message.get("more_body", False)


def read_upload(data: bytes | str | os.PathLike[str], limits: Limits) -> Audio:
    """Decode an upload to an utterance.

    Formats: see docs/audio.md. No external program is started on untrusted input. Memory is bounded by the limits: a
    small file that would decode to hours is refused by its header; without a length in the header, decoding stops at
    the limit.

    Args:
      data: the bytes of an audio file, or its path.
      limits: on bytes and seconds.

    Raises:
      TooLargeError: too many bytes or seconds.
      AudioError: not audio, or audio that `read_audio` refuses; bytes are called "the upload" in the message.
    """
    name = "the upload"
    if not isinstance(data, bytes):
        place = Path(data)
        name = place.name  # without the folders, which clients should not see
        if not place.is_file():
            raise AudioError(f"{name} does not exist: send it again")
        limits.check_bytes(place.stat().st_size)
        data = place.read_bytes()
    limits.check_bytes(len(data))
    if not data:
        raise AudioError(f"{name} is empty (0 bytes): send an audio file")

    def check(frames: int, rate: int, channels: int) -> None:
        limits.check_seconds(frames / rate)
        if frames * channels > limits.max_seconds * MOST_VALUES:
            raise AudioError(
                f"{name} has {channels} channels of {rate} samples a second: send one channel, 16000 samples a second "
                "are enough"
            )

    try:
        return read_stream(io.BytesIO(data), name, check=check)
    except AudioError as error:
        raise AudioError(_ADVICE.sub(": record it again, or send another file", str(error))) from error
