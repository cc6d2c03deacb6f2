"""What a server takes on: sizes and lengths of what it is sent, how much may wait, and how long."""

from __future__ import annotations

import dataclasses
import math

MEGABYTE = 1_000_000  # bytes


class TooLargeError(ValueError):
    """More bytes, seconds or units than a server takes; the message says how many it does."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
      max_bytes: of an upload.
      max_seconds: of sound in it.
      queue: utterances that are taken on and not answered yet.
      timeout: seconds that an answer may take.

    Raises:
      ValueError: one that is no positive number.
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

    def check_bytes(self, count: int) -> None:
        """Raises TooLargeError if an upload of so many bytes, or an unfinished one of as many so far, is not taken."""
        if count > self.max_bytes:
            raise TooLargeError(
                f"the upload is larger than {self.max_bytes / MEGABYTE:g} MB, the most that is taken: send a shorter "
                "recording, or a compressed one (FLAC, Ogg)"
            )

    def check_seconds(self, seconds: float) -> None:
        """Raises TooLargeError if a recording of so many seconds is not taken."""
        if not seconds <= self.max_seconds:
            raise TooLargeError(
                f"the recording lasts {seconds:.6g} s, {self.max_seconds:g} s are the most that is taken: send a part "
                "of it"
            )
