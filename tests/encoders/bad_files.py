"""Kinds of bad audio files that a corpus may contain, generated on the fly."""

from __future__ import annotations

import gzip
import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000


def noise(seconds: float = 0.5, channels: int = 1, rate: int = RATE) -> np.ndarray:
    """float64 [n, channels] of quiet noise with a fixed seed."""
    samples = np.random.default_rng(0).normal(0, 0.1, (round(seconds * rate), channels))
    return samples.clip(-0.9, 0.9)


def encoded(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """A complete audio file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def wav(
    data: bytes, rate: int = RATE, channels: int = 1, code: int = 1, bits: int = 16, promised: int | None = None
) -> bytes:
    """A WAV file with any header."""
    size = len(data) if promised is None else promised
    block = channels * bits // 8
    header = struct.pack("<HHIIHH", code, channels, rate & 0xFFFFFFFF, rate * block & 0xFFFFFFFF, block, bits)
    chunks = b"fmt " + struct.pack("<I", 16) + header + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks) + size) + b"WAVE" + chunks + data


def png() -> bytes:
    """A PNG of one grey pixel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0\x7f")) + chunk(b"IEND", b"")


def zipped(name: str, data: bytes) -> bytes:
    """A zip archive of one file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
    return file.getvalue()


def contents() -> dict[str, tuple[str, bytes]]:
    """Kind → (extension, contents) of a bad file."""
    good = encoded(noise())
    data = good[44:]
    hole = noise()
    hole[1000:1010] = np.nan
    burst = noise()
    burst[1000] = np.inf
    array = io.BytesIO()
    np.save(array, noise())
    flac, ogg, mp3 = (encoded(noise(), kind=kind) for kind in ("FLAC", "OGG", "MP3"))
    damaged = bytearray(flac)
    damaged[len(flac) // 2 : len(flac) // 2 + 64] = bytes(64)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 32044\n"
    return {
        "empty": ("wav", b""),
        "text": ("wav", b"what was said: stop\n" * 100),
        "UTF-16 text": ("mp3", "what was said: stop\n".encode("utf-16") * 20),
        "UTF-16 text, the other way round": ("mp3", b"\xfe\xff" + ("what was said: stop\n" * 20).encode("utf-16-be")),
        "web page": ("wav", b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body></body></html>"),
        "large file pointer": ("wav", pointer.encode()),
        "image": ("wav", png()),
        "zip": ("wav", zipped("a.wav", good)),
        "gzip": ("wav", gzip.compress(good)),
        "numpy array": ("wav", array.getvalue()),
        "random bytes": ("wav", np.random.default_rng(1).bytes(20_000)),
        "zero bytes": ("wav", bytes(20_000)),
        "resource fork": ("wav", b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(200)),
        "video": ("wav", b"RIFF" + struct.pack("<I", 4 + 24) + b"AVI LIST" + struct.pack("<I", 16) + bytes(16)),
        "midi": ("wav", b"MThd" + struct.pack(">IHHH", 6, 0, 1, 96) + b"MTrk" + struct.pack(">I", 4) + b"\0\xff\x2f\0"),
        "headerless": ("raw", data),
        "first bytes only": ("wav", good[:12]),
        "header only": ("wav", good[:44]),
        "no data chunk": ("wav", good[:36]),
        "no samples": ("wav", encoded(np.zeros((0, 1)))),
        "cut off wav": ("wav", good[: len(good) // 2]),
        "last sample missing": ("wav", good[:-2]),
        "cut off 24-bit wav": ("wav", encoded(noise(), subtype="PCM_24")[:-1000]),
        "cut off flac": ("flac", flac[: len(flac) // 2]),
        "cut off ogg": ("ogg", ogg[: len(ogg) * 3 // 4]),
        "cut off mp3": ("mp3", mp3[: len(mp3) // 2]),
        "cut off aiff": ("aiff", encoded(noise(), kind="AIFF")[:-1000]),
        "cut off au": ("au", encoded(noise(), kind="AU")[:-1000]),
        "cut off sphere": ("sph", encoded(noise(), kind="NIST")[:-1000]),
        "damaged flac": ("flac", bytes(damaged)),
        "silent": ("wav", encoded(np.zeros((8000, 1)))),
        "silent flac": ("flac", encoded(np.zeros((8000, 1)), kind="FLAC")),
        "constant": ("wav", encoded(np.full((8000, 1), 0.25))),
        "too short": ("wav", encoded(noise()[:399])),
        "too short at its rate": ("wav", encoded(noise(rate=48_000)[:1000], 48_000)),
        "nan": ("wav", encoded(hole, subtype="FLOAT")),
        "infinite": ("wav", encoded(burst, subtype="DOUBLE")),
        "integers as floats": ("wav", encoded(noise() * 32768, subtype="FLOAT")),
        "rate 0": ("wav", wav(data, rate=0)),
        "rate 4 GHz": ("wav", wav(data, rate=4_000_000_000)),
        "rate 10": ("wav", wav(data, rate=10)),
        "no channels": ("wav", wav(data, channels=0)),
        "unknown codec": ("wav", wav(data, code=0x1234)),
        "promises gigabytes": ("wav", wav(data, promised=0x70000000)),
    }


def make_bad_files(folder: Path) -> dict[str, Path]:
    """Write a file of every kind: kind → path. Reading any of them must raise AudioError with its path."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for kind, (extension, data) in contents().items():
        made[kind] = folder / f"{kind.replace(' ', '_')}.{extension}"
        made[kind].write_bytes(data)
    made["missing"] = folder / "missing.wav"
    made["directory"] = folder / "directory.wav"
    made["directory"].mkdir(exist_ok=True)
    made["broken link"] = folder / "broken_link.wav"
    if not made["broken link"].is_symlink():
        made["broken link"].symlink_to(folder / "gone.wav")
    if hasattr(os, "mkfifo"):  # reading one would block forever
        made["pipe"] = folder / "pipe.wav"
        if not made["pipe"].exists():
            os.mkfifo(made["pipe"])
    if hasattr(os, "geteuid") and os.geteuid() != 0:  # root may read everything
        made["forbidden"] = folder / "forbidden.wav"
        if not made["forbidden"].exists():
            made["forbidden"].write_bytes(encoded(noise()))
        made["forbidden"].chmod(0)
    return made
