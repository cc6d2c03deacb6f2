"""FLAC: check that all frames are there, and count their samples."""

from __future__ import annotations

import re
from typing import BinaryIO

from spjax.encoders.raw_file import ContainerError, Examined, at, damaged, patched, several

_MOST_TRIED = 16  # candidates for the last frame
_MOST_SUMMED = 2**22  # bytes whose check sums are computed for false frame headers
_BLOCK = 2**20
_AGAIN = (b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22")
_SYNC = re.compile(rb"\xff[\xf8\xf9]|fLaC[\0\x80]\0\0\x22")


def _table(bits: int, polynomial: int) -> list[int]:
    """CRC table of `bits` bits: the remainder of each byte."""
    table = []
    for byte in range(256):
        value = byte << bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 else 0)
            value &= (1 << bits) - 1
        table.append(value)
    return table


_CRC8, _CRC16 = _table(8, 0x07), _table(16, 0x8005)


def _crc(data: bytes, table: list[int], bits: int) -> int:
    value, mask = 0, (1 << bits) - 1
    for byte in data:
        value = (value << 8 & mask) ^ table[value >> bits - 8 ^ byte]
    return value


def flac(file: BinaryIO, size: int, cropped: bool) -> Examined:
    """Check a FLAC file. The last frame, searched for from the end, gives the length; a crop checks only that frame."""
    info = at(file, 0, 42)
    if len(info) < 42 or info[4] & 127 or info[5:8] != b"\0\0\x22":
        raise ContainerError("is damaged: it does not begin with a STREAMINFO block")
    block, longest = int.from_bytes(info[10:12], "big"), int.from_bytes(info[15:18], "big")  # over all frames
    total = int.from_bytes(info[21:26], "big") & 0xFFFFFFFFF
    window = min(max(longest + 16, 2**12) if longest else 2**18, 2**21) + 512
    for last in dict.fromkeys((_before_zeros(file, size), size)):
        begin = max(42, last - window)
        end = _last_flac_frame(at(file, begin, last - begin), block)
        if end is not None:
            break
    else:
        if not total and size <= 42:
            raise ContainerError("holds no samples: it has no frames")
        raise ContainerError("is cut off or damaged: it does not end with a whole frame")
    if end < total:
        raise ContainerError(f"is cut off: its header promises {total} samples, {end} are there")
    if not cropped:
        _check_frames(file, last, block, end)
    if end == total and last == size:
        return Examined("sndfile", file)
    notes = (f"its header says {total} samples, {end} are there: read to the end",) if 0 < total < end else ()
    right = (int.from_bytes(info[18:26], "big") >> 36 << 36 | end).to_bytes(8, "big")
    return Examined("sndfile", patched(file, last, {18: right}), repairs=notes)


def _before_zeros(file: BinaryIO, size: int) -> int:
    """Where the zeros at the end of a file begin; a few are kept, since a check sum may end in zeros."""
    end = size
    while end > 0:
        block = at(file, max(0, end - 2**16), min(end, 2**16))
        end -= len(block) - len(block.rstrip(b"\0"))
        if block.strip(b"\0"):
            break
    return min(size, end + 8)


def _check_frames(file: BinaryIO, size: int, fixed: int, samples: int) -> None:
    """Raise ContainerError unless each frame begins with the sample after the last one of the frame before."""
    position, last = 4, False
    while not last:
        block = at(file, position, 4)
        if len(block) < 4:
            raise damaged(position, "there is no metadata block")
        position, last = position + 4 + int.from_bytes(block[1:], "big"), block[0] > 127
    begin, expected = position, 0  # start of the last frame, and first sample of the next one
    tried = 0
    while position < size:
        data = at(file, position, min(_BLOCK + 16, size - position))
        for match in _SYNC.finditer(data):
            place = match.start()
            head = _flac_header(data[place : place + 16], fixed)
            here = position + place
            if place >= _BLOCK:
                break
            if data[place : place + 8] in _AGAIN:
                raise several()
            if head is None:
                continue
            if head[0] == expected:
                begin, expected = here, head[1]
                continue
            # Samples may look like a header, but then the check sum of the frame up to it is wrong.
            tried += here - begin
            if tried < _MOST_SUMMED and not _crc(at(file, begin, here - begin), _CRC16, 16):
                raise damaged(here, f"a frame begins with sample {head[0]}, not {expected},")
        position += _BLOCK
    if expected != samples:
        raise damaged(begin, f"after sample {expected} frames are missing: the last one ends with {samples},")


def _last_flac_frame(tail: bytes, fixed: int) -> int | None:
    """Number of samples up to the last complete frame, which must end with `tail`; None if there is none."""
    tried = 0
    for match in reversed(list(re.finditer(rb"\xff[\xf8\xf9]", tail))):
        head = _flac_header(tail[match.start() : match.start() + 16], fixed)
        if head is None:
            continue
        if not _crc(tail[match.start() :], _CRC16, 16):  # the CRC of a frame with its check sum is 0
            return head[1]
        tried += 1
        if tried == _MOST_TRIED:
            break
    return None


def _flac_header(data: bytes, fixed: int) -> tuple[int, int] | None:
    """Number of a frame's first sample and of the one after its last, from its header; None if it is not a header."""
    if len(data) < 6 or data[2] >> 4 == 0 or data[2] & 15 == 15 or data[3] >> 4 > 10 or data[3] & 1:
        return None
    lead = data[4]
    more = 0 if lead < 0x80 else 8 - (~lead & 0xFF).bit_length() - 1
    if (lead >= 0x80 and not 1 <= more <= 6) or len(data) < 5 + more:
        return None
    number = lead if lead < 0x80 else lead & (0x3F >> more)
    for byte in data[5 : 5 + more]:
        if byte >> 6 != 2:
            return None
        number = number << 6 | byte & 63
    place, code = 5 + more, data[2] >> 4
    if code in (6, 7):
        width = code - 5
        block = int.from_bytes(data[place : place + width], "big") + 1
        place += width
    else:
        block = 192 if code == 1 else 576 << code - 2 if code < 6 else 256 << code - 8
    place += {12: 1, 13: 2, 14: 2}.get(data[2] & 15, 0)
    if len(data) <= place or _crc(data[: place + 1], _CRC8, 8):
        return None
    first = number if data[1] & 1 else number * (fixed or block)
    return first, first + block
