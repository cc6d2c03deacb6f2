"""Chunk-based containers of uncompressed samples: WAV and its variants, AIFF, Wave64, CAF, AU and NIST SPHERE."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

from spjax.encoders.joined import another, begins
from spjax.encoders.mpeg import whole_mpeg
from spjax.encoders.raw_file import ContainerError, Examined, after_tags, at, cut_off, patched, several, zeros

UNKNOWN_BYTES = 0x7FFFF000  # sizes from here on are placeholders of programs that write to a pipe
MOST_CHUNKS = 10_000
_TAIL = 2**16  # bytes at the end of a file in which chunks are searched for if the length field is wrong
_NEAR = 2**11  # likewise if it looks right

# Chunks that follow the samples in files of the RIFF and AIFF families.
_TRAILERS = (
    *(b"LIST", b"list", b"id3 ", b"ID3 ", b"ID32", b"cue ", b"plst", b"fact", b"bext", b"iXML", b"axml", b"_PMX"),
    *(b"JUNK", b"junk", b"PAD ", b"FLLR", b"smpl", b"inst", b"acid", b"strc", b"PEAK", b"cart", b"chna", b"afsp"),
    *(b"umid", b"minf", b"elm1", b"regn", b"DGDA", b"DISP", b"levl", b"MD5 ", b"SAUR", b"LGWV", b"Trkn", b"tlst"),
    *(b"MARK", b"INST", b"MIDI", b"AESD", b"APPL", b"COMT", b"NAME", b"AUTH", b"(c) ", b"ANNO", b"CHAN", b"COMM"),
)
_W64_DATA = b"data" + bytes.fromhex("f3acd3118cd100c04f8edb8a")
_SAMPLES = (b"data", b"SSND", _W64_DATA)  # chunks that occur once in a file
_MPEG, _GSM = (0x50, 0x55), 0x31  # codes in a WAV file
_GSM_BYTES, _GSM_SAMPLES = 65, 320  # of a block


class _Style(NamedTuple):
    """How a family of formats writes chunks: name, length, contents."""

    name: int  # bytes of the name
    length: str  # struct format of the length
    counted: bool = False  # the length includes name and length field
    pad: int = 1  # chunks are aligned to multiples of this


_RIFF, _RIFX, _CAF = _Style(4, "<I", pad=2), _Style(4, ">I", pad=2), _Style(4, ">q")
_W64 = _Style(16, "<Q", counted=True, pad=8)
_PLAIN = _Style(0, "")  # no chunks at all


class _Chunk(NamedTuple):
    """A chunk: its name, its length field, the start of its contents, and the start of the next chunk."""

    name: bytes
    length: int
    start: int
    after: int


def _chunk(file: BinaryIO, position: int, size: int, style: _Style) -> _Chunk | None:
    """The chunk at a position; None if the header does not fit in the file."""
    header = style.name + struct.calcsize(style.length)
    if position + header > size:
        return None
    data = at(file, position, header)
    (length,) = struct.unpack(style.length, data[style.name :])
    end = position + max(header, length) if style.counted else position + header + max(0, length)
    return _Chunk(data[: style.name], length, position + header, -(-end // style.pad) * style.pad)


def _chunks(file: BinaryIO, position: int, size: int, style: _Style, *wanted: bytes) -> dict[bytes, _Chunk]:
    """The chunks from `position` on, the first of each name, until all wanted ones are found.

    Raises:
      ContainerError: the last of `wanted` is missing.
    """
    found: dict[bytes, _Chunk] = {}
    for _ in range(MOST_CHUNKS):
        chunk = _chunk(file, position, size, style)
        if chunk is None:
            break
        found.setdefault(chunk.name, chunk)
        if all(name in found for name in wanted):
            return found
        position = chunk.after
    else:
        raise ContainerError("is damaged: it has too many chunks")
    if wanted[-1] not in found:
        raise cut_off(position + style.name + struct.calcsize(style.length), size)
    return found


def _trailing(file: BinaryIO, position: int, size: int, style: _Style, whole: bool) -> bool:
    """Whether only chunks and tags (and, if `whole` samples end before `position`, zeros) follow up to the end."""
    first = position
    for _ in range(MOST_CHUNKS):
        tagged = after_tags(file, position, size)
        if tagged >= size or ((whole or tagged > position) and zeros(file, tagged, size)):
            return True
        position = tagged
        if begins(file, position):
            raise several()
        chunk = _chunk(file, position, size, style) if style is not _PLAIN else None
        if chunk is None:
            return style is not _PLAIN and position > first
        if chunk.length < 0 or (style.name == 4 and not all(32 <= letter < 127 for letter in chunk.name)):
            return False
        if chunk.name in _SAMPLES:
            raise several()
        if chunk.after >= size:  # the name of a chunk that is cut off must be known, since samples may look like one
            return chunk.after <= size + style.pad - 1 or chunk.name in _TRAILERS
        position = chunk.after
    return False


def _trailer(file: BinaryIO, start: int, size: int, style: _Style) -> int:
    """Where the samples end: at the known chunks that fill the file up to its end, or at its end."""
    if style not in (_RIFF, _RIFX):
        return size
    begin = max(start, size - _TAIL)
    begin += begin % 2
    tail, good = at(file, begin, size - begin), set()
    names = b"|".join(re.escape(name) for name in _TRAILERS)
    for match in reversed(list(re.finditer(names, tail))):
        place = begin + match.start()
        chunk = _chunk(file, place, size, style)
        if place % 2 == 0 and chunk is not None and (size <= chunk.after <= size + 1 or chunk.after in good):
            good.add(place)
    return min(good, default=size)


def _end_of_samples(
    file: BinaryIO,
    size: int,
    start: int,
    length: int | None,
    style: _Style,
    block: int = 1,
    others: Iterable[int] = (),
) -> tuple[int, tuple[str, ...]]:
    """Find the end of the samples, and make a note if the length field is wrong.

    Args:
      file, size: the file.
      start: first byte of the samples.
      length: the length field, bytes; None if it says unknown, where the format allows that.
      style: of the chunks that may follow.
      block: bytes of a sample frame; 0 for MPEG audio.
      others: end of the file according to other fields of the header.

    Raises:
      ContainerError: the file is cut off, or another recording follows.
    """
    if start > size:
        raise cut_off(start + (length or 0), size)
    end = start + (length or 0)
    if length and end <= size:
        after = -(-end // style.pad) * style.pad
        unit = max(1, block)
        whole = not length % unit
        less = (size - start) // unit == length // unit  # less than a sample frame follows
        if less:
            right = _trailer(file, max(start, size - _NEAR), size, style) >= end
        else:
            right = (whole or after < size) and _trailing(file, after, size, style, whole)
        if right:
            return end, ()
    there = _trailer(file, start, size, style)
    # Some writers count the 44 bytes of the header too. If known chunks end with the file, or another length field is
    # right, nothing was cut off.
    missing = end - size
    complete = there < size or size in others or missing in (start, 44)
    if length and missing > 0 and length < UNKNOWN_BYTES and not complete:
        raise cut_off(end, size)
    if length == 0 and (size - start < max(1, block) or _trailing(file, start, size, style, whole=True)):
        return start, ()
    if another(file, end if length and end < size else start, size, frames=block > 0):
        raise several()
    if length is None:
        return there, ()
    return there, (f"its length field says {length} bytes, {there - start} are there: read to the end",)


def _sound(file: BinaryIO, size: int, end: int, patches: dict[int, bytes], repairs: tuple[str, ...]) -> Examined:
    """For libsndfile: the file with length fields corrected, without what follows the samples."""
    if not patches and end >= size:
        return Examined("sndfile", file)
    return Examined("sndfile", patched(file, end, patches), repairs=repairs)


def wav(file: BinaryIO, size: int) -> Examined:
    """RIFF, RIFX, RF64 and BW64 (BWF is a RIFF file)."""
    kind = at(file, 0, 4)
    style = _RIFX if kind == b"RIFX" else _RIFF
    found = _chunks(file, 12, size, style, b"data")
    code, block = 1, 1
    if b"fmt " in found and found[b"fmt "].length >= 16:
        fields = at(file, found[b"fmt "].start, 16)
        code, channels, rate, speed, block, bits = struct.unpack(f"{style.length[0]}HHIIHH", fields)
        width = channels * -(-bits // 8)  # the block size that decoders compute
        if code == 1 and width not in (block, speed // max(1, rate)) and (bits, block) != (24, 4 * channels):
            odd = f"{bits} bits a sample of {channels} channels, and {block} bytes for all of these"
            raise ContainerError(f"is damaged: its header says {odd}")
    _, length, start, _ = found[b"data"]
    place, form = start - 4, style.length
    outer = struct.unpack(form, at(file, 4, 4))[0]
    patches = {0: b"RF64"} if kind == b"BW64" else {}
    if kind in (b"RF64", b"BW64") and b"ds64" in found:  # libsndfile reads the lengths from ds64
        place, form = found[b"ds64"].start + 8, "<Q"
        wide = struct.unpack("<QQ", at(file, place - 8, 16))
        if length == 0xFFFFFFFF:
            outer, length = wide
        elif length != wide[1]:
            patches[place] = struct.pack("<Q", length)
    block = 0 if code in _MPEG else max(1, block)
    end, repairs = _end_of_samples(file, size, start, length, style, block, [outer + 8])
    if repairs:
        patches[place] = struct.pack(form, min(end - start, 0xFFFFFFFF if place == start - 4 else 2**62))
    frames = None
    if code in _MPEG:
        frames = whole_mpeg(at(file, start, end - start))
    elif code == _GSM:  # libsndfile would decode the chunk's padding byte as a block
        frames = (end - start) // _GSM_BYTES * _GSM_SAMPLES
    trimmed = end if patches or code in _MPEG else size
    return _sound(file, size, trimmed, patches, repairs)._replace(frames=frames)


def aiff(file: BinaryIO, size: int) -> Examined:
    """AIFF and AIFF-C, whose chunks may be in any order."""
    found = _chunks(file, 12, size, _RIFX, b"COMM", b"SSND")
    block, frames = 0, 0
    if b"COMM" in found and found[b"COMM"].length >= 18:
        channels, frames, bits = struct.unpack(">HIH", at(file, found[b"COMM"].start, 8).ljust(8, b"\0"))
        coding = at(file, found[b"COMM"].start + 18, 4) if at(file, 8, 4) == b"AIFC" else b"NONE"
        plain = coding in (b"NONE", b"sowt", b"twos", b"fl32", b"FL32", b"fl64", b"FL64", b"in24", b"in32")
        block = channels * -(-bits // 8) if plain else 0
    _, field, content, _ = found[b"SSND"]
    if content + 8 > size:
        raise cut_off(content + field, size)
    start = content + 8 + struct.unpack(">I", at(file, content, 4))[0]
    length = max(0, field - (start - content))
    outer = struct.unpack(">I", at(file, 4, 4))[0]
    others = [outer + 8, *([start + frames * block] if block and frames else [])]
    end, repairs = _end_of_samples(file, size, start, length, _RIFX, max(1, block), others)
    if repairs:
        return _sound(file, size, size, {content - 4: struct.pack(">I", min(end - content, 0xFFFFFFFF))}, repairs)
    if block and abs(frames * block - length) >= block:
        repairs = (f"its header says {frames} samples, {length // block} are there: read to the end",)
    return Examined("sndfile", file, repairs=repairs)


def w64(file: BinaryIO, size: int) -> Examined:
    """Sony Wave64."""
    _, field, start, _ = _chunks(file, 40, size, _W64, _W64_DATA)[_W64_DATA]
    outer = struct.unpack("<Q", at(file, 16, 8))[0]
    end, repairs = _end_of_samples(file, size, start, max(0, field - 24), _W64, others=[outer])
    patches = {start - 8: struct.pack("<Q", end - start + 24)} if repairs else {}
    return _sound(file, size, end, patches, repairs)


def caf(file: BinaryIO, size: int) -> Examined:
    """Core Audio Format; a length of -1 means up to the end of the file."""
    found = _chunks(file, 8, size, _CAF, b"data")
    width = 0
    if b"desc" in found:
        width = struct.unpack(">I", at(file, found[b"desc"].start + 16, 4))[0]
    _, field, content, _ = found[b"data"]
    start, length = content + 4, None if field < 0 else max(0, field - 4)  # the first 4 bytes are the edit count
    end, repairs = _end_of_samples(file, size, start, length, _CAF, max(1, width))
    if repairs and not width:  # packets of variable length are listed in a table
        raise ContainerError(f"is damaged: {repairs[0].partition(':')[0]}")
    patches = {content - 8: struct.pack(">q", end - content)} if repairs or length is None else {}
    return _sound(file, size, size, patches, repairs)


def au(file: BinaryIO, size: int) -> Examined:
    """Sun and NeXT AU; a length of 0xFFFFFFFF means up to the end of the file."""
    head = at(file, 0, 24)
    if len(head) < 24:
        raise cut_off(24, len(head))
    order = ">" if head[:1] == b"." else "<"
    start, length, code, _, channels = struct.unpack(f"{order}5I", head[4:])
    width = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}.get(code, 1)
    known = None if length == 0xFFFFFFFF else length
    end, repairs = _end_of_samples(file, size, start, known, _PLAIN, width * min(max(channels, 1), 1024))
    patches = {8: struct.pack(f"{order}I", min(end - start, 0xFFFFFFFF))} if repairs else {}
    return _sound(file, size, end, patches, repairs)


def sphere(file: BinaryIO, size: int) -> Examined:
    """NIST SPHERE; libsndfile reads uncompressed ones up to the end, whatever the header says."""
    head = at(file, 0, 1024)
    fields = dict(re.findall(rb"^(\w+) -\w+ (.+)$", head, re.MULTILINE))
    if fields.get(b"sample_coding", b"pcm") not in (b"pcm", b"ulaw", b"alaw", b"mu-law"):
        return Examined("sndfile", file)
    try:
        start = int(head[8:16])
        counts = [int(fields[name]) for name in (b"sample_count", b"sample_n_bytes")]
        block = counts[1] * int(fields.get(b"channel_count", b"1"))
    except (KeyError, ValueError):
        return Examined("sndfile", file)
    length = counts[0] * block
    if start < 0 or length < 0:
        raise ContainerError("is damaged: its header has a negative number of samples")
    end, repairs = _end_of_samples(file, size, start, length, _PLAIN, max(1, block))
    return Examined("sndfile", patched(file, end), repairs=repairs)
