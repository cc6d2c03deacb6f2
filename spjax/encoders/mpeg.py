"""MP3 and ADTS: files of MPEG audio frames from the first byte to the last, which are walked one by one."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from spjax.encoders.raw_file import ContainerError, Examined, after_tags, at, cut_off, damaged, ended, several

_BITRATES = {  # kbit/s by (version 1, layer) and index
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


class _Frame(NamedTuple):
    """An MPEG audio frame: bytes, samples per channel, header bits shared by the stream, offset of a Xing header."""

    length: int
    samples: int
    kind: int
    side: int = 0


def _mp3_frame(data: bytes, position: int) -> _Frame | None:
    head = int.from_bytes(data[position : position + 4], "big")
    version, layer = head >> 19 & 3, 4 - (head >> 17 & 3)
    bitrate, rate = head >> 12 & 15, head >> 10 & 3
    if head >> 21 != 0x7FF or version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3 or head & 3 == 2:
        return None
    first = version == 3
    hertz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits = 1000 * _BITRATES[first, layer][bitrate]
    padding = head >> 9 & 1
    mono = head >> 6 & 3 == 3
    kind = head & 0xFFFE0C00
    if layer == 1:
        return _Frame((12 * bits // hertz + padding) * 4, 384, kind)
    samples = 1152 if layer == 2 or first else 576
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return _Frame(samples // 8 * bits // hertz + padding, samples, kind, 4 + side)


def _adts_frame(data: bytes, position: int) -> _Frame | None:
    head = data[position : position + 7]
    if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
        return None
    length = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    if length < 7 or head[2] >> 2 & 15 > 12:
        return None
    return _Frame(length, 1024 * (1 + (head[6] & 3)), head[1] << 16 | head[2] << 8 | head[3] & 0xC0)


_Reader = Callable[[bytes, int], _Frame | None]


def reader(begin: bytes) -> _Reader | None:
    """The parser of the frames at the start of `begin`; None unless there are two frames of one kind."""
    for read in (_mp3_frame, _adts_frame):
        one = read(begin, 0)
        two = one and read(begin, one.length)
        if one is not None and two is not None and two.kind == one.kind:
            return read
    return None


def mpeg(file: BinaryIO, size: int) -> Examined | None:
    """Check an MP3 or ADTS file; None if it does not begin with a frame."""
    begin = at(file, 0, 2**15)
    read = reader(begin)
    if read is None:  # a file of a single frame
        read = next(
            (read for read in (_mp3_frame, _adts_frame) if (one := read(begin, 0)) and one.length >= size), None
        )
    if read is None:
        return None
    data = at(file, 0, size)
    frames, end, repaired, notes = _walk(data, read)
    decoder = "aac" if read is _adts_frame else "sndfile"
    return Examined(decoder, io.BytesIO(repaired if repaired else data[:end]), frames, notes)


def whole_mpeg(data: bytes) -> int | None:
    """Samples per channel of MPEG audio in another container; None if it does not start with an MP3 frame.

    Raises:
      ContainerError: it is not made of complete frames.
    """
    return None if _mp3_frame(data, 0) is None else _walk(data, _mp3_frame)[0]


def _walk(data: bytes, read: _Reader) -> tuple[int | None, int, bytes, tuple[str, ...]]:
    """Walk all frames.

    Returns:
      Samples per channel, None if decoders trim them by the Xing header; end of the last frame; the data with a
      corrected Xing header, b"" if it is right; and a note of the correction.
    """
    head = read(data, 0)
    assert head is not None
    position, count, samples = 0, 0, 0
    promised = _xing(data, 0, head)
    while position < len(data):
        frame = read(data, position)
        if frame is None or frame.kind != head.kind:
            rest = data[position:]
            if not rest.strip(b"\xff") and len(rest) < 4:
                raise cut_off(position + 4, len(data))
            left = io.BytesIO(rest)
            if reader(rest[after_tags(left, 0, len(rest)) :][: 2**15]) is not None:
                raise several()
            if ended(left, 0, len(rest)):
                break
            raise damaged(position, "there is no frame of the kind of the first")
        if count and _xing(data, position, frame) is not None:
            raise several()
        if position + frame.length > len(data):
            raise cut_off(position + frame.length, len(data))
        position, count, samples = position + frame.length, count + 1, samples + frame.samples
    if promised is None:
        return samples, position, b"", ()
    count -= 1
    frames, bytes_, place = promised
    most = count if place else count + 1  # VBRI may count its own frame
    if frames is not None and frames > most and bytes_ != position:
        raise ContainerError(f"is cut off: its header promises {frames} frames, {count} are there")
    note: tuple[str, ...] = ()
    if frames not in (None, count, most):
        note = (f"its header says {frames} frames, {count} are there: read to the end",)
    if frames is None or not place:  # libsndfile would decode the header frame as sound
        return samples - head.samples, position, data[head.length : position], note
    return None, position, data[:place] + struct.pack(">I", count) + data[place + 4 : position] if note else b"", note


def counted(data: bytes, samples: int) -> bytes:
    """MP3 frames with `samples` samples per channel, behind a Xing header with their number.

    Without a Xing header libsndfile estimates the number from the first frame, and reads no more than that.
    """
    first = _mp3_frame(data, 0)
    if first is None or not first.side:
        return data
    count = samples // first.samples
    for bitrate in range(1, 15):
        head = bytes([data[0], data[1] | 1, bitrate << 4 | data[2] & 0x0C, data[3]])
        frame = _mp3_frame(head, 0)
        if frame is not None and frame.length >= frame.side + 12:
            return (head.ljust(frame.side, b"\0") + b"Xing" + struct.pack(">II", 1, count)).ljust(
                frame.length, b"\0"
            ) + data
    return data


def _xing(data: bytes, position: int, frame: _Frame) -> tuple[int | None, int | None, int] | None:
    """Parse a Xing, Info or VBRI header; None if there is none.

    Returns:
      Number of frames; bytes; and the position of the former, 0 for VBRI.
    """
    for place in (position + frame.side, position + frame.side + 2):  # a check sum may come before it
        header = data[place : place + 16]
        if not frame.side or len(header) < 16 or header[:4] not in (b"Xing", b"Info"):
            continue
        if not data[position + 6 : place].strip(b"\0"):  # else libmpg123 ignores it
            flags, first, second = struct.unpack(">III", header[4:])
            frames = first if flags & 1 else None
            return frames, (second if flags & 1 else first) if flags & 2 else None, place + 8
    place = position + 36
    if frame.side and data[place : place + 4] == b"VBRI" and place + 18 <= len(data):
        bytes_, frames = struct.unpack(">II", data[place + 10 : place + 18])
        return frames, bytes_, 0
    return None
