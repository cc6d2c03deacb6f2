"""Detect the format of a recording from its first bytes, and check that it is complete.

`examine` runs before any decoder. A file that was cut off is refused; a file whose length field is wrong but whose
samples are complete is passed on with the field corrected and a note. docs/audio.md has the rules for each container.
"""

from __future__ import annotations

import re
from typing import BinaryIO

from spjax import paths
from spjax.encoders import chunks, framed
from spjax.encoders.flac import flac
from spjax.encoders.joined import W64
from spjax.encoders.mpeg import mpeg
from spjax.encoders.raw_file import ContainerError, Examined, after_tags, at, before_tags, cut_off, patched

_EBML = b"\x1aE\xdf\xa3"
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide")  # possible first boxes of an MP4 or QuickTime file

# First bytes of files that are mistaken for recordings.
_OTHERS = (
    (b"\x93NUMPY", "a NumPy array: give the samples to spjax.encoders.audio.prepare"),
    (b"version https://git-lfs", "a Git LFS pointer: run git lfs pull to get the file"),
    (b"\x89PNG", "an image (PNG)"),
    (b"\xff\xd8\xff", "an image (JPEG)"),
    (b"GIF8", "an image (GIF)"),
    (b"%PDF", "a PDF"),
    (b"\x89HDF", "an HDF5 file"),
    (b"SQLite", "an SQLite database"),
    (b"MThd", "MIDI, which has notes but no sound"),
    (b"\x7fELF", "a program"),
    (b"\0\5\x16\7", "a macOS metadata file; the recording has nearly the same name"),
    (b"#!AMR", "AMR"),
    (b"\x30\x26\xb2\x75", "Windows Media (ASF)"),
    (b"FLV", "a Flash video"),
    (b"Creative Voice File", "Creative Voice (VOC)"),
    (b"wvpk", "WavPack"),
    (b"MAC ", "Monkey's Audio"),
    (b"DSD ", "DSD"),
)


def examine(file: BinaryIO, size: int, cropped: bool = False) -> Examined:
    """Detect the format of a file and check that it is complete.

    Args:
      file: seekable.
      size: bytes, at least 1.
      cropped: only a part will be decoded: checks that need the whole of a seekable file are skipped.

    Raises:
      ContainerError: not a recording, cut off, damaged, or several recordings.
    """
    first, end = after_tags(file, 0, size), before_tags(file, size)
    if first > size:
        raise cut_off(first, size)
    if first >= end:
        raise ContainerError("holds no samples: it has nothing but tags")
    if first or end < size:
        file, size = patched(file, end, first=first), end - first
    head = at(file, 0, 4096)
    kind = head[:4]
    if kind in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] in (b"WAVE", b""):
        return chunks.wav(file, size)
    if kind == b"FORM" and head[8:12] in (b"AIFF", b"AIFC", b""):
        return chunks.aiff(file, size)
    if head[:16] == W64:
        return chunks.w64(file, size)
    if kind == b"caff":
        return chunks.caf(file, size)
    if kind in (b".snd", b"dns."):
        return chunks.au(file, size)
    if head[:7] == b"NIST_1A":
        return chunks.sphere(file, size)
    if kind == b"OggS":
        return framed.ogg(at(file, 0, size))
    if kind == _EBML:
        return framed.matroska(file, size)
    if head[4:8] in _BOXES:
        return framed.mp4(file, size)
    begin = at(file, 0, 2**16)
    blank = len(begin) - len(begin.lstrip(b"\0"))
    if blank:
        file, size = patched(file, size, first=blank), size - blank
    if at(file, 0, 4) == b"fLaC":
        return flac(file, size, cropped)
    # A UTF-16 byte order mark looks like the header of an MPEG frame.
    found = None if _is_utf16(head) else mpeg(file, size)
    if found is None:
        raise ContainerError(f"is no audio that is read here: it is {what_it_is(head)}")
    return found


def what_it_is(head: bytes) -> str:
    """What a file that is not a recording is, by its first bytes."""
    for magic, name in _OTHERS:
        if head.startswith(magic):
            return name
    if packed := paths.packed(head):
        return f"{packed}: unpack it"
    if head[4:8] in (b"styp", b"sidx", b"moof"):
        return "a fragment of an MP4 file without its beginning: join the fragments in order"
    if head[:4] in (b"RIFF", b"FORM"):
        return f"a {head[:4].decode()} file of kind {head[8:12].decode('ascii', 'replace')!r}"
    if not head.strip(b"\0"):
        return "all zeros at its beginning"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if _is_utf16(head):
        return "text in UTF-16"
    if not re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]", head):
        return "text"
    return f"of an unknown kind, its first bytes are {head[:8].hex(' ')}"


def _is_utf16(head: bytes) -> bool:
    """Whether this is UTF-16 text of mostly Latin letters, with a byte order mark."""
    zeros = {b"\xff\xfe": head[3:64:2], b"\xfe\xff": head[2:64:2]}.get(head[:2])
    return zeros is not None and zeros.count(0) > len(zeros) / 2
