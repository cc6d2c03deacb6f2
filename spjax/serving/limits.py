"""Limits of a server: upload size, recording length, queue length and timeout."""

from __future__ import annotations

import dataclasses
import math

MEGABYTE = 1_000_000  # bytes


class TooLargeError(ValueError):
    """More bytes, seconds or units than the server accepts; the message names the limit."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
      max_bytes: most bytes of an upload, and of a file on the page.
      max_seconds: most seconds of audio in it.
      queue: most utterances that are waiting or being computed.
      timeout: most seconds from a request to its response, and from its beginning to the end of its body.

    Raises:
      ValueError: a limit that is not a positive number.
    """

    max_bytes: int = 10 * MEGABYTE
    max_seconds: float = 30.0
    queue: int = 512
    timeout: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_bytes", "queue"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a whole number, 1 or more")
        for name in ("max_seconds", "timeout"):
            if not (isinstance(getattr(self, name), int | float) and 0 < getattr(self, name) < math.inf):
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a number of seconds above 0")

    def check_bytes(self, count: int, most: int | None = None) -> None:
        """Raise TooLargeError if an upload has more bytes (so far) than allowed: `most`, by default `max_bytes`."""
        most = self.max_bytes if most is None else most
        if count > most:
            raise TooLargeError(
                f"the upload is larger than {most / MEGABYTE:g} MB, the most allowed: send a shorter "
                "recording, or a compressed one (FLAC, Ogg)"
            )

    def check_seconds(self, seconds: float) -> None:
        """Raise TooLargeError if a recording is longer than allowed."""
        if not seconds <= self.max_seconds:
            raise TooLargeError(
                f"the recording lasts {seconds:.6g} s, at most {self.max_seconds:g} s are allowed: send a shorter part"
            )
