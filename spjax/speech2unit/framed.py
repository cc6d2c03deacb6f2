"""Containers made of frames, pages, blocks or boxes, walked one by one: FLAC, MP3, ADTS, Ogg, MP4 and Matroska."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from spjax.speech2unit.containers import ContainerError, Examined, View, at, cut_off, patched, several, zeros

_MOST_TAGS = 100
_MOST_BOXES = 200_000
_INDEX_BYTES = 2**24  # at the end of an MP4 file, in which its index is sought
_MOST_TRIED = 16  # places that may be the last frame of a FLAC file

_BITRATES = {  # kbit/s by (version 1, layer) and index
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def _damaged(position: int, found: str) -> ContainerError:
    return ContainerError(f"is damaged: {found} at byte {position}")


def after_tags(file: BinaryIO, size: int) -> int:
    """Where the ID3v2 tags that a file begins with end, and the zeros after them."""
    position = 0
    for _ in range(_MOST_TAGS):
        head = at(file, position, 10)
        if len(head) < 10 or head[:3] != b"ID3" or max(head[6:10]) > 127:
            break
        length = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        position += 10 + length + (10 if head[5] & 0x10 else 0)  # a footer is as long as the header
        if position > size:
            raise cut_off(position, size)
    if position:
        padding = at(file, position, 2**16)
        position += len(padding) - len(padding.lstrip(b"\0"))
    return position


class _Frame(NamedTuple):
    """A frame of MPEG audio: its bytes, its samples a channel, what all frames of a stream share, where Xing may be."""

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


def mpeg(file: BinaryIO, first: int, size: int) -> Examined | None:
    """An MP3 or ADTS file whose frames begin at `first`; None where no two frames of a kind stand there."""
    begin = at(file, first, 2**15)
    for read, decoder in ((_mp3_frame, "sndfile"), (_adts_frame, "aac")):
        one = read(begin, 0)
        if one is None:
            continue
        two = read(begin, one.length)
        if first + one.length >= size or (two is not None and two.kind == one.kind):
            data = at(file, first, size - first)
            frames, end, repaired, notes = _walk(data, read, first)
            return Examined(decoder, io.BytesIO(repaired if repaired else data[:end]), frames, notes)
    return None


def whole_mpeg(data: bytes) -> int | None:
    """Samples a channel of MPEG audio within another container; None where they are not counted.

    Raises:
      ContainerError: it does not consist of whole frames.
    """
    return None if _mp3_frame(data, 0) is None else _walk(data, _mp3_frame, 0)[0]


def _walk(
    data: bytes, read: Callable[[bytes, int], _Frame | None], offset: int
) -> tuple[int | None, int, bytes, tuple[str, ...]]:
    """Goes through all frames.

    Returns:
      Samples a channel, None where a decoder trims them by the Xing header; where the last frame ends; all of it with
      a corrected Xing header, b"" if it is right; and a note of that.
    """
    head = read(data, 0)
    assert head is not None
    position, count, samples = 0, 0, 0
    promised = _xing(data, 0, head)
    while position < len(data):
        frame = read(data, position)
        if frame is None or frame.kind != head.kind:
            if _ends(data, position):
                break
            raise _damaged(offset + position, "there is no frame of the kind of the first")
        if count and _xing(data, position, frame) is not None:
            raise several()
        if position + frame.length > len(data):
            raise cut_off(offset + position + frame.length, offset + len(data))
        position, count, samples = position + frame.length, count + 1, samples + frame.samples
    if promised is None:
        return samples, position, b"", ()
    count -= 1
    frames, bytes_, place = promised
    if frames is None:
        return samples - head.samples, position, data[head.length : position], ()
    if frames == count:
        return None, position, b"", ()
    if frames > count and bytes_ != position:
        raise ContainerError(f"is cut off: its header promises {frames} frames, {count} are there")
    note = (f"its header says {frames} frames, {count} are there: read to the end",)
    return None, position, data[:place] + struct.pack(">I", count) + data[place + 4 : position], note


def counted(data: bytes, samples: int) -> bytes:
    """MP3 frames that hold so many samples a channel, behind a Xing header that says so.

    Without one libsndfile guesses how many there are by the first of them, and reads no more than that.
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


def _ends(data: bytes, position: int) -> bool:
    """Whether only tags or zeros follow; raises ContainerError if frames of another recording do."""
    left = len(data) - position
    head = data[position : position + 11]
    if head[:3] == b"ID3" and left > 10:
        after = after_tags(io.BytesIO(data[position:]), left)
        if after < left and _mp3_frame(data, position + after) is not None:
            raise several()
        return True
    if (head[:3] == b"TAG" and left in (128, 355)) or head[:8] == b"APETAGEX" or head == b"LYRICSBEGIN":
        return True
    if left < 4 and b"\xff\xff\xff".startswith(head[:1]):
        raise cut_off(position + 4, len(data))
    return not data[position:].strip(b"\0")


def _xing(data: bytes, position: int, frame: _Frame) -> tuple[int | None, int | None, int] | None:
    """Frames and bytes that a Xing, Info or VBRI header promises, and where the former stand; None if it is none."""
    for place in (position + frame.side, position + frame.side + 2):  # a check sum may stand before it
        header = data[place : place + 16]
        if not frame.side or len(header) < 16 or header[:4] not in (b"Xing", b"Info"):
            continue
        if not data[position + 6 : place].strip(b"\0"):  # else libmpg123 does not take it for one
            flags, first, second = struct.unpack(">III", header[4:])
            frames = first if flags & 1 else None
            return frames, (second if flags & 1 else first) if flags & 2 else None, place + 8
    place = position + 36
    if frame.side and data[place : place + 4] == b"VBRI" and place + 18 <= len(data):
        bytes_, frames = struct.unpack(">II", data[place + 10 : place + 18])
        return frames, bytes_, place + 14
    return None


def _table(bits: int, polynomial: int) -> list[int]:
    """Remainders of a byte each, for a check sum of `bits`."""
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


def flac(file: BinaryIO, first: int, size: int, cropped: bool) -> Examined:
    """FLAC: the last frame is sought from the end, it says how many samples there are."""
    info = at(file, first, 42)
    if len(info) < 42 or info[4] & 127 or info[5:8] != b"\0\0\x22":
        raise ContainerError("is damaged: it does not begin with a STREAMINFO block")
    if first:  # libsndfile does not skip every tag
        file, size, first = io.BytesIO(at(file, first, size - first)), size - first, 0
    if not cropped and _again(file, first + 8, size):
        raise several()
    block, longest = int.from_bytes(info[10:12], "big"), int.from_bytes(info[15:18], "big")  # of all frames
    total = int.from_bytes(info[21:26], "big") & 0xFFFFFFFFF
    window = min(max(longest + 16, 2**12) if longest else 2**18, 2**21) + 512
    for last in dict.fromkeys((_before_tags(file, size), size)):
        begin = max(first + 42, last - window)
        end = _last_flac_frame(at(file, begin, last - begin), block)
        if end is not None:
            break
    else:
        if not total and size - first <= 42:
            raise ContainerError("holds no samples: it has no frames")
        raise ContainerError("is cut off or damaged: it does not end with a whole frame")
    if end < total:
        raise ContainerError(f"is cut off: its header promises {total} samples, {end} are there")
    if end == total and last == size:
        return Examined("sndfile", file)
    notes = (f"its header says {total} samples, {end} are there: read to the end",) if 0 < total < end else ()
    right = (int.from_bytes(info[18:26], "big") >> 36 << 36 | end).to_bytes(8, "big")
    view = io.BufferedReader(View(file, last, {first + 18: right}))  # type: ignore[arg-type]
    return Examined("sndfile", view, repairs=notes)


def _before_tags(file: BinaryIO, size: int) -> int:
    """Where the tags ID3v1 and APE, or zeros, begin at the end of a file; some zeros stay: a check sum may be one."""
    if at(file, max(0, size - 128), 3) == b"TAG":
        size -= 128
    footer = at(file, max(0, size - 32), 32)
    if footer[:8] == b"APETAGEX":
        length, _, flags = struct.unpack("<III", footer[12:24])
        size = max(0, size - length - (32 if flags >> 31 else 0))
    end = size
    while end > 0:
        block = at(file, max(0, end - 2**16), min(end, 2**16))
        end -= len(block) - len(block.rstrip(b"\0"))
        if block.strip(b"\0"):
            break
    return min(size, end + 8)


def _again(file: BinaryIO, position: int, size: int) -> bool:
    """Whether a second FLAC file begins after `position`."""
    mark = b"fLaC\0\0\0\x22"
    while position < size:
        if mark in at(file, position, 2**20 + len(mark)):
            return True
        position += 2**20
    return False


def _last_flac_frame(tail: bytes, fixed: int) -> int | None:
    """Samples up to the end of the last frame, which ends with `tail`; None if there is none that is whole."""
    tried = 0
    for match in reversed(list(re.finditer(rb"\xff[\xf8\xf9]", tail))):
        head = _flac_header(tail[match.start() : match.start() + 16], fixed)
        if head is None:
            continue
        if not _crc(tail[match.start() :], _CRC16, 16):  # the sum stands at the end: with it nothing remains
            return head
        tried += 1
        if tried == _MOST_TRIED:
            break
    return None


def _flac_header(data: bytes, fixed: int) -> int | None:
    """Samples up to the end of a frame, by its header; None where there is none."""
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
    return number + block if data[1] & 1 else number * (fixed or block) + block


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_sum(page: bytes) -> int:
    """Check sum of a page: zlib's, with all bits the other way round."""
    data = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED)
    return int(f"{zlib.crc32(data, 0xFFFFFFFF) ^ 0xFFFFFFFF:032b}"[::-1], 2)


def ogg(data: bytes) -> Examined:
    """Ogg: every page is there, whole, and the last one ends its stream."""
    position, begun = 0, False
    streams: dict[int, list[int]] = {}  # number of the last page, whether it ends the stream
    codecs: dict[int, bytes] = {}
    while position < len(data):
        head = data[position : position + 27]
        if head[:4] != b"OggS"[: len(head)]:
            if not data[position:].strip(b"\0") or head[:3] == b"TAG":
                break
            raise _damaged(position, "there is no page")
        lengths = data[position + 27 : position + 27 + head[26]] if len(head) == 27 else b""
        end = position + 27 + (head[26] if len(head) == 27 else 0) + sum(lengths)
        if len(head) < 27 or len(lengths) < head[26] or end > len(data):
            raise cut_off(end, len(data))
        serial, number, total = struct.unpack("<III", head[14:26])
        if _ogg_sum(data[position:end]) != total:
            raise _damaged(position, "the check sum of the page is wrong")
        if head[5] & 2:
            if begun or serial in streams:
                raise several()
            codecs[serial] = data[position + 27 + head[26] : position + 35 + head[26]]
        elif serial not in streams:
            raise _damaged(position, "there is a page of a stream that never began")
        elif number != streams[serial][0] + 1:
            raise _damaged(position, "pages are missing")
        else:
            begun = True
        streams[serial] = [number, head[5] & 4]
        position = end
    if not all(ends for _, ends in streams.values()):
        raise ContainerError("is cut off: its last page does not end the stream")
    known = all(codec.startswith((b"\x01vorbis", b"\x7fFLAC", b"OpusHead")) for codec in codecs.values())
    decoder = "sndfile" if known and len(codecs) == 1 else "ogg"
    return Examined(decoder, io.BytesIO(data[:position]))


def mp4(file: BinaryIO, size: int) -> Examined:
    """MP4, M4A and QuickTime: boxes, of which moov says where samples are, before or after them.

    Where a box does not fit, its length or that of the one before may be wrong, and the samples all there.
    """
    position, data = 0, -1
    seen: set[bytes] = set()
    error: ContainerError | None = None
    for _ in range(_MOST_BOXES):
        head = at(file, position, 16)
        if not head.strip(b"\0") and zeros(file, position, size):  # nothing, too
            break
        length, name = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:
            length = size - position
        if len(head) < 8 or length < 8 or not re.fullmatch(rb"[\x20-\x7e\xa9]{4}", name):
            error = _damaged(position, "there is no box")
            break
        if name == b"ftyp" and b"mdat" in seen:
            raise several()
        if name == b"mdat" and data < 0:
            data = position
        seen.add(name)
        if position + length > size:
            error = cut_off(position + length, size)
            if name == b"moov":
                raise error
            break
        position += length
    else:
        raise ContainerError("is damaged: it has too many boxes")
    if error is None and b"moov" in seen:
        return Examined("mov", file)
    if seen >= {b"moov", b"mdat"} and b"moof" not in seen:
        return Examined("mov", file, suspect=error)
    index = _index(file, data, size) if b"moov" not in seen and data >= 0 else None
    if index is None:
        raise error or ContainerError("is cut off: its index, the box moov, is not there")
    wide = at(file, data, 4) == b"\0\0\0\1"
    patch = {data + 8: struct.pack(">Q", index - data)} if wide else {data: struct.pack(">I", index - data)}
    return Examined(
        "mov", patched(file, size, patch), suspect=error or ContainerError("is cut off: its samples are not all there")
    )


def _index(file: BinaryIO, first: int, size: int) -> int | None:
    """Where the box moov is, after `first`, if lengths do not lead to it; None if it is not whole."""
    begin = max(first + 8, size - _INDEX_BYTES)
    tail = at(file, begin, size - begin)
    place = tail.rfind(b"moov") - 4
    if place < 0 or begin + place - first >= 2**32:
        return None
    length = int.from_bytes(tail[place : place + 4], "big")
    return begin + place if 16 <= length <= len(tail) - place and tail[place + 12 : place + 16] == b"mvhd" else None


_EBML_HEADER, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
_BLOCKS = (0xA3, 0xA0)  # SimpleBlock and BlockGroup


def matroska(file: BinaryIO, size: int) -> Examined:
    """Matroska and WebM: segments and clusters, whose lengths may be unknown, of elements whose lengths are not."""
    data = at(file, 0, size)
    position, segment = 0, 0
    notes: tuple[str, ...] = ()
    end_of_segment: int | None = None
    blocks = 0
    patches: dict[int, bytes] = {}
    while position < size:
        found = _element(data, position)
        if found is None:
            if not data[position:].strip(b"\0"):
                break
            if size - position < 12:
                raise cut_off(position + 12, size)
            raise _damaged(position, "there is no element")
        name, start, length = found
        if name == _EBML_HEADER and segment:
            raise several()
        if name == _SEGMENT:
            if segment:
                raise several()
            segment, end_of_segment = start, None if length is None else start + length
            if end_of_segment is not None and end_of_segment > size:
                raise cut_off(end_of_segment, size)
            position = start
        elif length is not None and start + length > size:
            raise cut_off(start + length, size)
        elif name == _CLUSTER:  # what is in it is gone through too
            position = start
        elif length is None:
            raise _damaged(position, "there is an element of unknown length")
        else:
            position = start + length
            blocks += name in _BLOCKS
    if not segment:
        raise ContainerError("holds no samples: it has no segment")
    if end_of_segment is not None and end_of_segment < size and _CLUSTER.to_bytes(4, "big") in data[end_of_segment:]:
        width = segment - data.rindex(b"\x18\x53\x80\x67", 0, segment) - 4
        patches[segment - width] = ((1 << 7 * width + 1) - 1).to_bytes(width, "big")
        notes = (f"its length field says {end_of_segment} bytes, {size} are there: read to the end",)
    return Examined("matroska", patched(io.BytesIO(data), size, patches), repairs=notes, packets=blocks)


def _element(data: bytes, position: int) -> tuple[int, int, int | None] | None:
    """Name, first byte of contents, and their length (None: unknown) of an EBML element; None if there is none."""
    first = data[position]
    width = 9 - first.bit_length()
    place = position + width
    if width > 4 or place >= len(data) or not data[place]:
        return None
    name = int.from_bytes(data[position:place], "big")
    wide = 9 - data[place].bit_length()
    if place + wide > len(data):
        return None
    length = int.from_bytes(data[place : place + wide], "big") & (1 << 7 * wide) - 1
    return name, place + wide, None if length == (1 << 7 * wide) - 1 else length
