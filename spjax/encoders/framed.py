"""Containers of pages, boxes or elements, which are walked one by one: Ogg, MP4 and Matroska."""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import BinaryIO

from spjax.encoders.joined import another
from spjax.encoders.raw_file import ContainerError, Examined, at, cut_off, damaged, ended, patched, several

_MOST_BOXES = 200_000
_INDEX_BYTES = 2**24  # at the end of an MP4 file, in which its moov box is searched for

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_sum(page: bytes) -> int:
    """Check sum of a page: zlib's CRC with bits reversed."""
    data = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED)
    return int(f"{zlib.crc32(data, 0xFFFFFFFF) ^ 0xFFFFFFFF:032b}"[::-1], 2)


def ogg(data: bytes) -> Examined:
    """Check that every page of an Ogg file is there and complete, and that the last one ends its stream."""
    position, begun = 0, False
    streams: dict[int, list[int]] = {}  # stream → number of its last page, whether it ends the stream
    codecs: dict[int, bytes] = {}
    while position < len(data):
        head = data[position : position + 27]
        if head[:4] != b"OggS"[: len(head)]:
            if ended(io.BytesIO(data), position, len(data)):
                break
            raise damaged(position, "there is no page")
        lengths = data[position + 27 : position + 27 + head[26]] if len(head) == 27 else b""
        end = position + 27 + (head[26] if len(head) == 27 else 0) + sum(lengths)
        if len(head) < 27 or len(lengths) < head[26] or end > len(data):
            raise cut_off(end, len(data))
        serial, number, total = struct.unpack("<III", head[14:26])
        if _ogg_sum(data[position:end]) != total:
            raise damaged(position, "the check sum of the page is wrong")
        if head[5] & 2:
            if begun or serial in streams:
                raise several()
            codecs[serial] = data[position + 27 + head[26] : position + 35 + head[26]]
        elif serial not in streams:
            raise damaged(position, "there is a page of a stream that never began")
        elif number != streams[serial][0] + 1:
            raise damaged(position, "pages are missing")
        else:
            begun = True
        if head[5] & 4 and head[6:14] == b"\xff" * 8 and any(length < 255 for length in lengths):
            raise damaged(position, "the last page does not say where the stream ends")
        streams[serial] = [number, head[5] & 4]
        position = end
    if not all(ends for _, ends in streams.values()):
        raise ContainerError("is cut off: its last page does not end the stream")
    known = all(codec.startswith((b"\x01vorbis", b"\x7fFLAC", b"OpusHead")) for codec in codecs.values())
    decoder = "sndfile" if known and len(codecs) == 1 else "ogg"
    return Examined(decoder, io.BytesIO(data[:position]))


def mp4(file: BinaryIO, size: int) -> Examined:
    """Check the boxes of MP4, M4A and QuickTime; moov, the index, may be before or after the samples.

    If a box does not fit, its length or that of the box before may be wrong while the samples are complete.
    """
    position, data = 0, -1
    seen: set[bytes] = set()
    error: ContainerError | None = None
    for _ in range(_MOST_BOXES):
        head = at(file, position, 16)
        length, name = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0 and name == b"mdat":
            length = size - position
        if len(head) < 8 or length < 8 or not re.fullmatch(rb"[\x20-\x7e\xa9]{4}", name):
            if not ended(file, position, size):
                error = damaged(position, "there is no box")
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
    if error is not None and another(file, position, size):
        raise several()
    if error is None and b"moov" in seen:
        return Examined("mov", file)
    if seen >= {b"moov", b"mdat"} and b"moof" not in seen:
        return Examined("mov", file, suspect=error)
    index = _index(file, data, size) if b"moov" not in seen and data >= 0 else None
    if index is None:
        raise error or ContainerError("is cut off: its index, the box moov, is missing")
    wide = at(file, data, 4) == b"\0\0\0\1"
    patch = {data + 8: struct.pack(">Q", index - data)} if wide else {data: struct.pack(">I", index - data)}
    return Examined(
        "mov", patched(file, size, patch), suspect=error or ContainerError("is cut off: samples are missing")
    )


def _index(file: BinaryIO, first: int, size: int) -> int | None:
    """Position of the moov box after `first`, for files with wrong box lengths; None if it is incomplete."""
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
    """Check the elements of Matroska and WebM; only segments and clusters may have an unknown length."""
    data = at(file, 0, size)
    position, segment = 0, 0
    notes: tuple[str, ...] = ()
    end_of_segment: int | None = None
    blocks = 0
    patches: dict[int, bytes] = {}
    while position < size:
        found = _element(data, position)
        if (found is None or position == end_of_segment) and ended(file, position, size):
            break
        if found is None:
            if size - position < 12 and (end_of_segment is None or position < end_of_segment):
                raise cut_off(position + 12, size)
            raise damaged(position, "there is no element")
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
            if end_of_segment is not None and position >= end_of_segment:
                raise damaged(position, "there is no element")
            raise cut_off(start + length, size)
        elif name == _CLUSTER:  # descend into it
            position = start
        elif length is None:
            raise damaged(position, "there is an element of unknown length")
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
    """Name, start of the contents, and length (None: unknown) of an EBML element; None if there is none."""
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
