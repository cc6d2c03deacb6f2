"""Detect further recordings in a file that should hold one."""

from __future__ import annotations

import re
from typing import BinaryIO

from spjax.encoders import mpeg
from spjax.encoders.raw_file import after_tags, at

W64 = bytes.fromhex("726966662e91cf11a5d628db04c10000")
_BLOCK = 2**20
_LONGEST = 80  # bytes of the longest pattern below
# Beginnings of files, long enough that samples do not match by chance.
_BEGINNINGS = re.compile(
    b"|".join(
        [
            rb"(?:RIFF|RIFX|RF64|BW64)....WAVE",
            rb"FORM....AIF[FC]",
            re.escape(W64),
            rb"caff\x00\x01",
            rb"\.snd\0\0......\0\0\0[\x01-\x1b]\0",
            rb"dns\...\0\0....[\x01-\x1b]\0\0\0",
            rb"NIST_1A",
            rb"fLaC[\0\x80]\0\0\x22",
            rb"OggS\x00\x02",
            rb"\0\0\0.ftyp",
            rb"\x1aE\xdf\xa3.{0,60}?(?:webm|matroska)",
        ]
    ),
    re.DOTALL,
)


def begins(file: BinaryIO, position: int) -> bool:
    """Whether a recording other than MPEG audio begins at `position`."""
    return _BEGINNINGS.match(at(file, position, _LONGEST)) is not None


def another(file: BinaryIO, position: int, size: int, frames: bool = True) -> bool:
    """Whether a recording begins anywhere from `position` on; MPEG audio only at `position`, after tags and zeros.

    Args:
      file, position, size: where to search.
      frames: whether MPEG frames count as another recording.
    """
    start = at(file, after_tags(file, position, size), 2**16).lstrip(b"\0")
    if frames and mpeg.reader(start[: 2**15]) is not None:
        return True
    while position < size:
        if _BEGINNINGS.search(at(file, position, min(_BLOCK + _LONGEST, size - position))):
            return True
        position += _BLOCK
    return False
