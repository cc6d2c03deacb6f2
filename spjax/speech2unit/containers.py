"""What a recording is, by its first bytes, and whether all that its header promises is there.

`examine` looks at a file before any decoder does. A file that was cut off is refused; one whose length field is wrong
while its samples are all there is handed on with the field corrected, and a note of it. The policy for each container
stands in docs/audio.md. Containers that hold one block of samples are here, those made of frames in `framed`.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

UNKNOWN_BYTES = 0x7FFFF000  # and more: what programs that write to a pipe put for a size
MOST_CHUNKS = 10_000
_TAIL = 2**16  # bytes at the end of a file in which chunks are sought where the length field is of no use
_BLOCK = 2**20

# Chunks that stand after samples in files of the RIFF and AIFF families.
_TRAILERS = (
    *(b"LIST", b"list", b"id3 ", b"ID3 ", b"ID32", b"cue ", b"plst", b"fact", b"bext", b"iXML", b"axml", b"_PMX"),
    *(b"JUNK", b"junk", b"PAD ", b"FLLR", b"smpl", b"inst", b"acid", b"strc", b"PEAK", b"cart", b"chna", b"afsp"),
    *(b"umid", b"minf", b"elm1", b"regn", b"DGDA", b"DISP", b"levl", b"MD5 ", b"SAUR", b"LGWV", b"Trkn", b"tlst"),
    *(b"MARK", b"INST", b"MIDI", b"AESD", b"APPL", b"COMT", b"NAME", b"AUTH", b"(c) ", b"ANNO", b"CHAN", b"COMM"),
)
_W64 = bytes.fromhex("726966662e91cf11a5d628db04c10000")
_W64_DATA = b"data" + bytes.fromhex("f3acd3118cd100c04f8edb8a")
_SAMPLES = (b"data", b"SSND", _W64_DATA)  # chunks of which a file has one
_MAGICS = (  # of files that hold one recording
    *(b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"caff", b".snd", b"dns.", b"riff", b"NIST_1A", b"fLaC", b"OggS"),
)
_MPEG = (0x50, 0x55)  # codes of MPEG audio in a WAV file
_EBML = b"\x1aE\xdf\xa3"
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide")  # one of which an MP4 or QuickTime file begins with

# First bytes of what people take for recordings.
_OTHERS = (
    (b"\x93NUMPY", "a NumPy array: give the samples to spjax.speech2unit.audio.prepare"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"\x1f\x8b", "compressed by gzip: unpack it"),
    (b"BZh", "compressed by bzip2: unpack it"),
    (b"\xfd7zXZ", "compressed by xz: unpack it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"Rar!", "a rar archive: unpack it"),
    (b"version https://git-lfs", "a pointer of Git LFS: fetch the file itself by git lfs pull"),
    (b"\x89PNG", "an image (PNG)"),
    (b"\xff\xd8\xff", "an image (JPEG)"),
    (b"GIF8", "an image (GIF)"),
    (b"%PDF", "a PDF"),
    (b"\x89HDF", "an HDF5 file"),
    (b"SQLite", "an SQLite database"),
    (b"MThd", "MIDI, notes without sound"),
    (b"\x7fELF", "a program"),
    (b"\0\5\x16\7", "what macOS keeps beside a recording, in a file of nearly the same name"),
    (b"#!AMR", "AMR"),
    (b"\x30\x26\xb2\x75", "Windows Media (ASF)"),
    (b"FLV", "a Flash video"),
    (b"Creative Voice File", "Creative Voice (VOC)"),
    (b"wvpk", "WavPack"),
    (b"MAC ", "Monkey's Audio"),
    (b"DSD ", "DSD"),
)


class ContainerError(ValueError):
    """What is wrong with a container: the predicate of a sentence whose subject is the file."""


class Examined(NamedTuple):
    """A file that may be decoded.

    Attributes:
      decoder: "sndfile", or the name by which libav knows the container.
      file: what to decode, its length fields corrected.
      frames: sample frames that frame headers were counted to hold; None where libsndfile reads it in a header.
      repairs: notes of what was corrected.
      suspect: what is wrong with it unless a decoder finds all packets that an index lists.
      packets: at least so many are in it, of all streams together.
    """

    decoder: str
    file: BinaryIO
    frames: int | None = None
    repairs: tuple[str, ...] = ()
    suspect: ContainerError | None = None
    packets: int = 0


class View(io.RawIOBase):
    """Reads `file` up to byte `end` as if `patches`, bytes by their positions, stood in it."""

    def __init__(self, file: BinaryIO, end: int, patches: dict[int, bytes] | None = None) -> None:
        self._file, self._end, self._patches, self._position = file, end, patches or {}, 0

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
        """Moves, beyond the end too."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._end}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fills a buffer as far as there are bytes."""
        begin = self._position
        data = bytearray(at(self._file, begin, max(0, min(len(buffer), self._end - begin))))
        for place, patch in self._patches.items():
            first, last = max(place, begin), min(place + len(patch), begin + len(data))
            if first < last:
                data[first - begin : last - begin] = patch[first - place : last - place]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def patched(file: BinaryIO, end: int, patches: dict[int, bytes] | None = None) -> BinaryIO:
    """A file that reads as `View` says."""
    return io.BufferedReader(View(file, end, patches))  # type: ignore[arg-type]


def at(file: BinaryIO, position: int, count: int) -> bytes:
    """Up to `count` bytes from a position."""
    file.seek(position)
    return file.read(count)


def cut_off(promised: int, size: int) -> ContainerError:
    """The error of a file whose header promises more bytes than are there."""
    return ContainerError(f"is cut off: its header promises {promised} bytes, {size} are there")


def several() -> ContainerError:
    """The error of a file that holds recordings one after another."""
    return ContainerError("holds several recordings, one after another. Split it into a file for each")


def examine(file: BinaryIO, size: int, cropped: bool = False) -> Examined:
    """Finds out what a file of `size` bytes, more than 0, is, and whether it is whole.

    Args:
      file: can be searched.
      size: bytes.
      cropped: only a part is wanted: what would need all of a file that can be searched is not looked for.

    Raises:
      ContainerError: no recording, cut off, damaged, or several recordings.
    """
    from spjax.speech2unit import framed

    head = at(file, 0, 4096)
    kind = head[:4]
    if kind in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] in (b"WAVE", b""):
        return _wav(file, size, kind)
    if kind == b"FORM" and head[8:12] in (b"AIFF", b"AIFC", b""):
        return _aiff(file, size)
    if head[:16] == _W64:
        return _w64(file, size)
    if kind == b"caff":
        return _caf(file, size)
    if kind in (b".snd", b"dns."):
        return _au(file, size, head)
    if head[:7] == b"NIST_1A":
        return _sphere(file, size, head)
    if kind == b"OggS":
        return framed.ogg(at(file, 0, size))
    if kind == _EBML:
        return framed.matroska(file, size)
    if head[4:8] in _BOXES:
        return framed.mp4(file, size)
    first = framed.after_tags(file, size)
    if at(file, first, 4) == b"fLaC":
        return framed.flac(file, first, size, cropped)
    found = framed.mpeg(file, first, size)
    if found is None:
        raise ContainerError(f"is no audio that is read here: it is {what_it_is(head)}")
    return found


def what_it_is(head: bytes) -> str:
    """What a file that is no recording is, by its first bytes."""
    for magic, name in _OTHERS:
        if head.startswith(magic):
            return name
    if head[:4] in (b"RIFF", b"FORM"):
        return f"a {head[:4].decode()} file of kind {head[8:12].decode('ascii', 'replace')!r}"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if not head.strip(b"\0"):
        return "zeros from its first byte on"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if not re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]", head):
        return "text"
    return f"of an unknown kind, its first bytes are {head[:8].hex(' ')}"


class _Style(NamedTuple):
    """How a family of files writes chunks: a name, a length, the contents."""

    name: int  # bytes of a name
    length: str  # struct of the length
    counted: bool = False  # the length counts name and length too
    pad: int = 1  # chunks begin at multiples of it


_RIFF, _RIFX, _CAF = _Style(4, "<I", pad=2), _Style(4, ">I", pad=2), _Style(4, ">q")
_W64_STYLE = _Style(16, "<Q", counted=True, pad=8)
_PLAIN = _Style(0, "")  # no chunks at all


def _chunk(file: BinaryIO, position: int, size: int, style: _Style) -> tuple[bytes, int, int, int] | None:
    """Name, length field, where contents begin, and where the next chunk begins; None where no header is."""
    header = style.name + struct.calcsize(style.length)
    if position + header > size:
        return None
    data = at(file, position, header)
    (length,) = struct.unpack(style.length, data[style.name :])
    end = position + max(header, length) if style.counted else position + header + max(0, length)
    return data[: style.name], length, position + header, -(-end // style.pad) * style.pad


def _trailing(file: BinaryIO, position: int, size: int, style: _Style, whole: bool = True) -> bool:
    """Whether nothing from `position` to the end is a sample: chunks, tags, and after `whole` samples zeros."""
    if _is_tag(at(file, position, 8), size - position) or (whole and zeros(file, position, size)):
        return True
    if style is _PLAIN:
        return False
    for _ in range(MOST_CHUNKS):
        found = _chunk(file, position, size, style)
        if found is None:
            return True
        name, length, _, after = found
        if length < 0 or (style.name == 4 and not all(32 <= letter < 127 for letter in name)):
            return _is_tag(at(file, position, 8), size - position)
        if name in _SAMPLES:
            raise several()
        if after >= size:  # of one that was cut off the name must be known: samples may look like a header
            return after <= size + style.pad - 1 or name in _TRAILERS
        position = after
    return False


def _is_tag(head: bytes, size: int) -> bool:
    return (head[:3] == b"TAG" and size == 128) or head[:8] == b"APETAGEX" or (head[:3] == b"ID3" and size > 10)


def zeros(file: BinaryIO, position: int, size: int) -> bool:
    """Whether nothing but zeros follows."""
    while position < size:
        data = at(file, position, min(_BLOCK, size - position))
        if not data or data.count(0) < len(data):
            return False
        position += len(data)
    return True


def _trailer(file: BinaryIO, start: int, size: int, style: _Style) -> int:
    """Where samples end by what stands after them: known chunks that fill the file to its end, or nothing."""
    if style not in (_RIFF, _RIFX):
        return size
    begin = max(start, size - _TAIL)
    begin += begin % 2
    tail, good = at(file, begin, size - begin), set()
    names = b"|".join(re.escape(name) for name in _TRAILERS)
    for match in reversed(list(re.finditer(names, tail))):
        place = begin + match.start()
        found = _chunk(file, place, size, style)
        if place % 2 == 0 and found is not None and (size <= found[3] <= size + 1 or found[3] in good):
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
    """Where samples end that begin at `start`, and a note if the length field is wrong.

    Args:
      file, size: to look in.
      start: first byte of the samples.
      length: bytes by the field; None where the format lets it be unknown and it is.
      style: of the chunks that may follow.
      block: bytes of a sample frame.
      others: ends of the file by other fields of the header.

    Raises:
      ContainerError: cut off, or another recording follows.
    """
    if start > size:
        raise cut_off(start + (length or 0), size)
    if length is None:
        return _trailer(file, start, size, style), ()
    end = start + length
    if end <= size and length:
        after = -(-end // style.pad) * style.pad
        if at(file, end, 16).lstrip(b"\0").startswith(_MAGICS):
            raise several()
        less = (length + size - after) // block == length // block  # than a sample frame
        if less or _trailing(file, after, size, style, whole=not length % block):
            return end, ()
    # 44 too many: the header was counted too. Where another field ends with the file, nothing was cut off.
    missing = end - size
    if missing > 0 and length < UNKNOWN_BYTES and missing not in (start, 44) and size not in others:
        raise cut_off(end, size)
    if not length and (size - start < block or _trailing(file, start, size, style)):
        return start, ()
    there = _trailer(file, start, size, style)
    return there, (f"its length field says {length} bytes, {there - start} are there: read to the end",)


def _sound(file: BinaryIO, size: int, end: int, patches: dict[int, bytes], repairs: tuple[str, ...]) -> Examined:
    """What libsndfile decodes, with length fields corrected, without what follows the samples."""
    if not patches and end >= size:
        return Examined("sndfile", file)
    return Examined("sndfile", patched(file, end, patches), repairs=repairs)


def _wav(file: BinaryIO, size: int, kind: bytes) -> Examined:
    """RIFF, RIFX, RF64 and BW64 (BWF is a RIFF file)."""
    style = _RIFX if kind == b"RIFX" else _RIFF
    position, code, block, wide, odd = 12, 1, 1, None, ""
    for _ in range(MOST_CHUNKS):
        found = _chunk(file, position, size, style)
        if found is None:
            break
        name, length, start, after = found
        if name == b"fmt " and length >= 16:
            fields = at(file, start, 16)
            if len(fields) == 16:
                code, channels, rate, speed, block, bits = struct.unpack(f"{style.length[0]}HHIIHH", fields)
                width = channels * -(-bits // 8)  # which decoders go by
                if code == 1 and width not in (block, speed // max(1, rate)) and (bits, block) != (24, 4 * channels):
                    odd = f"{bits} bits a sample of {channels} channels, and {block} bytes for all of these"
        elif name == b"ds64":
            wide = start
        elif name == b"data":
            break
        position = after
    else:
        raise ContainerError("is damaged: it has too many chunks before its samples")
    if found is None:
        raise cut_off(position + 8, size) if position + 8 > size > 12 or size < 20 else _no_samples("data")
    if odd:
        raise ContainerError(f"is damaged: its header says {odd}")
    _, field, start, _ = found
    length, place, form = field, start - 4, style.length
    outer = struct.unpack(form, at(file, 4, 4))[0]
    if kind in (b"RF64", b"BW64") and wide is not None and field == 0xFFFFFFFF:
        place, form = wide + 8, "<Q"
        outer, length = struct.unpack("<QQ", at(file, wide, 16).ljust(16, b"\0"))
    patches = {0: b"RF64"} if kind == b"BW64" else {}
    block = 1 if code in _MPEG else max(1, block)
    end, repairs = _end_of_samples(file, size, start, length, style, block, [outer + 8])
    if repairs:
        patches[place] = struct.pack(form, min(end - start, 0xFFFFFFFF if place == start - 4 else 2**62))
    if code in _MPEG:
        from spjax.speech2unit import framed

        frames = framed.whole_mpeg(at(file, start, end - start))
        return _sound(file, size, end, patches, repairs)._replace(frames=frames)
    return _sound(file, size, end if repairs else size, patches, repairs)


def _no_samples(name: str) -> ContainerError:
    return ContainerError(f"holds no samples: it has no {name} chunk")


def _aiff(file: BinaryIO, size: int) -> Examined:
    """AIFF and AIFF-C, whose chunks come in any order."""
    position, block, frames, where = 12, 0, 0, None
    for _ in range(MOST_CHUNKS):
        found = _chunk(file, position, size, _RIFX)
        if found is None:
            break
        name, length, start, after = found
        if name == b"COMM" and length >= 18:
            channels, frames, bits = struct.unpack(">HIH", at(file, start, 8).ljust(8, b"\0"))
            coding = at(file, start + 18, 4) if at(file, 8, 4) == b"AIFC" else b"NONE"
            plain = coding in (b"NONE", b"sowt", b"twos", b"fl32", b"FL32", b"fl64", b"FL64", b"in24", b"in32")
            block = channels * -(-bits // 8) if plain else 0
        elif name == b"SSND" and where is None:
            where = start, length
            if block:  # nothing after the samples is needed
                break
        position = after
    if where is None:
        raise cut_off(position + 8, size) if position + 8 > size > 12 or size < 20 else _no_samples("SSND")
    start, field = where
    if start + 8 > size:
        raise cut_off(start + field, size)
    start += 8 + struct.unpack(">I", at(file, start, 4))[0]
    skipped = start - where[0]
    length = 0 if field == 0 else max(0, field - skipped)
    outer = struct.unpack(">I", at(file, 4, 4))[0]
    others = [outer + 8, *([start + frames * block] if block and frames else [])]
    end, repairs = _end_of_samples(file, size, start, length, _RIFX, max(1, block), others)
    if not repairs and block and abs(frames * block - length) >= block:
        note = f"its header says {frames} samples, {length // block} are there: read to the end"
        return Examined("sndfile", file, repairs=(note,))
    if not repairs:
        return Examined("sndfile", file)
    patches = {where[0] - 4: struct.pack(">I", min(end - where[0], 0xFFFFFFFF))}
    return _sound(file, size, size, patches, repairs)


def _w64(file: BinaryIO, size: int) -> Examined:
    """Sony Wave64."""
    position = 40
    for _ in range(MOST_CHUNKS):
        found = _chunk(file, position, size, _W64_STYLE)
        if found is None:
            raise cut_off(position + 24, size)
        name, field, start, after = found
        if name == _W64_DATA:
            outer = struct.unpack("<Q", at(file, 16, 8))[0]
            length = field - 24 if field > 24 else 0
            end, repairs = _end_of_samples(file, size, start, length, _W64_STYLE, others=[outer])
            patches = {start - 8: struct.pack("<Q", end - start + 24)} if repairs else {}
            return _sound(file, size, end, patches, repairs)
        position = after
    raise _no_samples("data")


def _caf(file: BinaryIO, size: int) -> Examined:
    """Core Audio Format: a length of -1 says that samples go to the end."""
    position, block, packed = 8, 1, False
    for _ in range(MOST_CHUNKS):
        found = _chunk(file, position, size, _CAF)
        if found is None:
            raise cut_off(position + 12, size)
        name, field, start, after = found
        if name == b"desc":
            width = struct.unpack(">I", at(file, start + 16, 4).ljust(4, b"\0"))[0]
            block, packed = max(1, width), not width  # packets of many lengths stand in a table
        elif name == b"data":
            length = None if field < 0 else max(0, field - 4)  # of which 4 count edits
            end, repairs = _end_of_samples(file, size, start + 4, length, _CAF, block)
            if repairs and packed:
                raise ContainerError(f"is damaged: {repairs[0].partition(':')[0]}")
            patches = {start - 8: struct.pack(">q", end - start)} if repairs or length is None else {}
            return _sound(file, size, size, patches, repairs)
        position = after
    raise _no_samples("data")


def _au(file: BinaryIO, size: int, head: bytes) -> Examined:
    """Sun and NeXT: a length of 0xFFFFFFFF says that samples go to the end."""
    if len(head) < 24:
        raise cut_off(24, len(head))
    order = ">" if head[:1] == b"." else "<"
    start, length, code, _, channels = struct.unpack(f"{order}5I", head[4:24])
    width = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}.get(code, 1)
    known = None if length == 0xFFFFFFFF else length
    end, repairs = _end_of_samples(file, size, start, known, _PLAIN, width * min(max(channels, 1), 1024))
    patches = {8: struct.pack(f"{order}I", min(end - start, 0xFFFFFFFF))} if repairs else {}
    return _sound(file, size, end, patches, repairs)


def _sphere(file: BinaryIO, size: int, head: bytes) -> Examined:
    """NIST SPHERE; libsndfile reads uncompressed ones to the end, whatever their header says."""
    fields = dict(re.findall(rb"^(\w+) -\w+ (.+)$", head[:1024], re.MULTILINE))
    if fields.get(b"sample_coding", b"pcm") not in (b"pcm", b"ulaw", b"alaw", b"mu-law"):
        return Examined("sndfile", file)
    try:
        start = int(head[8:16])
        counts = [int(fields[name]) for name in (b"sample_count", b"sample_n_bytes")]
        length = math.prod(counts) * int(fields.get(b"channel_count", b"1"))
    except (KeyError, ValueError):
        return Examined("sndfile", file)
    if start < 0 or length < 0:
        raise ContainerError("is damaged: its header counts less than 0 samples")
    end, repairs = _end_of_samples(file, size, start, length, _PLAIN)
    return Examined("sndfile", patched(file, end), repairs=repairs)
