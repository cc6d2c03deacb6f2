"""Binary files before decoding: reading bytes, patching them, and skipping tags."""

from __future__ import annotations

import io
import os
import re
import struct
from typing import BinaryIO, NamedTuple

_MOST_TAGS = 100
_BLOCK = 2**20
_TAIL = 2**16  # bytes at the end of a file in which tags are searched for


class ContainerError(ValueError):
    """A defect of a container; the message is a predicate whose subject is the file."""


class Examined(NamedTuple):
    """A file that may be decoded.

    Attributes:
      decoder: "sndfile", or libav's name of the container.
      file: what to decode, with length fields corrected.
      frames: sample frames, counted in the frame headers; None if libsndfile's number is right.
      repairs: notes of corrections.
      suspect: the error to raise unless the decoder finds all packets of the index.
      packets: minimum number of packets over all streams.
    """

    decoder: str
    file: BinaryIO
    frames: int | None = None
    repairs: tuple[str, ...] = ()
    suspect: ContainerError | None = None
    packets: int = 0


class View(io.RawIOBase):
    """Bytes `first` to `end` of a file, with `patches` (position → bytes) applied."""

    def __init__(self, file: BinaryIO, end: int, patches: dict[int, bytes], first: int) -> None:
        self._file, self._end, self._patches, self._first, self._position = file, end - first, patches, first, 0

    def seekable(self) -> bool:
        """True."""
        return True

    def readable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position, which may be beyond the end."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._end}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer as far as there are bytes."""
        begin = self._position
        data = bytearray(at(self._file, self._first + begin, max(0, min(len(buffer), self._end - begin))))
        for place, patch in self._patches.items():
            first, last = max(place, begin), min(place + len(patch), begin + len(data))
            if first < last:
                data[first - begin : last - begin] = patch[first - place : last - place]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def patched(file: BinaryIO, end: int, patches: dict[int, bytes] | None = None, first: int = 0) -> BinaryIO:
    """A buffered `View`."""
    return io.BufferedReader(View(file, end, patches or {}, first))  # type: ignore[arg-type]


def at(file: BinaryIO, position: int, count: int) -> bytes:
    """Read up to `count` bytes from a position."""
    file.seek(position)
    return file.read(count)


def cut_off(promised: int, size: int) -> ContainerError:
    """The error for a file whose header promises more bytes than there are."""
    return ContainerError(f"is cut off: its header promises {promised} bytes, {size} are there")


def damaged(position: int, found: str) -> ContainerError:
    """The error for a defect at a byte, counted from the end of the leading tags."""
    return ContainerError(f"is damaged: {found} at byte {position}")


def several() -> ContainerError:
    """The error for a file that holds several recordings."""
    return ContainerError("holds several recordings, one after another. Split it into a file for each")


def zeros(file: BinaryIO, position: int, size: int) -> bool:
    """Whether all remaining bytes are zeros."""
    step = 64  # most files have other bytes right away
    while position < size:
        data = at(file, position, min(step, size - position))
        if not data or data.count(0) < len(data):
            return False
        position, step = position + len(data), _BLOCK
    return True


def after_tags(file: BinaryIO, position: int, size: int) -> int:
    """End of the ID3v2, APE and ID3v1 tags that begin at `position`; beyond `size` if the last one is cut off."""
    for _ in range(_MOST_TAGS):
        head = at(file, position, 32)
        if head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 128:
            footer = 10 if head[5] & 0x10 else 0
            position += 10 + _seven_bits(head[6:10]) + footer
        elif head[:8] == b"APETAGEX" and len(head) == 32:
            length, _, flags = struct.unpack("<III", head[12:24])
            position += 32 + (length if flags >> 29 & 1 else 0)  # a header before the tag, or only a footer
        elif head[:3] == b"TAG" and position + 128 <= size:
            position += 128
        else:
            break
        if position >= size:
            break
    return position


def before_tags(file: BinaryIO, size: int) -> int:
    """Start of the ID3v1, APE, Lyrics3 and (short) ID3v2 tags at the end of a file."""
    for _ in range(_MOST_TAGS):
        length = _last_tag(at(file, max(0, size - _TAIL), min(size, _TAIL)))
        if not 0 < length < size:
            break
        size -= length
    return size


def _last_tag(tail: bytes) -> int:
    """Bytes of the tag at the end of a file, 0 if there is none."""
    if tail[-128:-125] == b"TAG":
        return 355 if tail[-355:-351] == b"TAG+" else 128
    if tail[-32:-24] == b"APETAGEX":
        length, _, flags = struct.unpack("<III", tail[-20:-8])
        return length + (32 if flags >> 31 else 0)  # the length does not include the header
    if tail.endswith((b"LYRICS200", b"LYRICSEND")):
        return len(tail) - tail.rfind(b"LYRICSBEGIN") if b"LYRICSBEGIN" in tail else 0
    if tail[-10:-7] == b"3DI":
        return 20 + _seven_bits(tail[-4:])
    for match in re.finditer(rb"ID3[\x02-\x04].{6}", tail, re.DOTALL):
        within = re.search(rb"id3[ 2]", tail[max(0, match.start() - 16) : match.start()].lower())  # a chunk or a box
        if match.end() + _seven_bits(match[0][6:]) == len(tail) and not within:
            return len(tail) - match.start()
    return 0


def _seven_bits(data: bytes) -> int:
    """The length of an ID3v2 tag: 4 bytes of 7 bits."""
    return data[0] << 21 | data[1] << 14 | data[2] << 7 | data[3]


def ended(file: BinaryIO, position: int, size: int) -> bool:
    """Whether only tags and zeros follow."""
    position = after_tags(file, position, size)
    return position >= size or zeros(file, position, size)
