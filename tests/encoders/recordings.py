"""A complete recording in every supported container, written by libsndfile and PyAV."""

from __future__ import annotations

import functools
import struct
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tests.encoders.bad_files import encoded, noise

SECONDS = 2.0


def by_av(
    form: str,
    codec: str,
    rate: int = 16_000,
    options: dict[str, str] | None = None,
    streams: int = 1,
    video: bool = False,
) -> bytes:
    """Noise in a container written by libav, or only an image."""
    import av

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        with av.open(str(path), "w", format=form, options=options or {}) as container:
            made: list[Any] = [container.add_stream(codec, rate=rate, layout="mono") for _ in range(streams)]
            if video:
                images: Any = container.add_stream("mpeg4", rate=10)
                images.width, images.height, images.pix_fmt = 32, 32, "yuv420p"
                for number in range(5):
                    image = av.VideoFrame(32, 32, "yuv420p")
                    image.pts, image.time_base = number, Fraction(1, 10)
                    container.mux(images.encode(image))
                container.mux(images.encode(None))
            samples = noise(SECONDS, rate=rate).T.astype(np.float32)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, 0
            for one in made:
                one.codec_context.open(strict=False)
                size = one.codec_context.frame_size
                resampler = av.AudioResampler(one.format.name, "mono", rate, frame_size=size or None)
                for part in (*resampler.resample(frame), *resampler.resample(None), None):
                    container.mux(one.encode(part))
        return path.read_bytes()


@functools.cache
def whole() -> dict[str, bytes]:
    """Name → a recording of 2 s of noise (lossy ones may be a frame or two longer)."""
    samples = noise(SECONDS)
    made = {kind: encoded(samples, kind=kind) for kind in ("WAV", "RF64", "W64", "AIFF", "CAF", "AU", "NIST", "FLAC")}
    made["WAV float"] = encoded(samples, subtype="FLOAT")
    made["WAV extensible"] = encoded(samples, kind="WAVEX")
    made["WAV GSM"] = encoded(samples, subtype="GSM610")
    made["WAV ADPCM"] = encoded(samples, subtype="MS_ADPCM")
    made["WAV MP3"] = by_av("wav", "libmp3lame")
    made["BW64"] = b"BW64" + made["RF64"][4:]
    made["CAF ALAC"] = encoded(samples, kind="CAF", subtype="ALAC_16")
    made["Ogg Vorbis"] = encoded(samples, kind="OGG")
    made["Ogg Opus"] = encoded(samples, kind="OGG", subtype="OPUS")
    made["MP3"] = encoded(samples, kind="MP3")
    made["MP3 no Xing"] = by_av("mp3", "libmp3lame", options={"write_xing": "0", "id3v2_version": "0"})
    made["M4A"] = by_av("mp4", "aac")
    made["M4A moov first"] = by_av("mp4", "aac", options={"movflags": "faststart"})
    made["MP4 fragmented"] = by_av("mp4", "aac", options={"movflags": "frag_keyframe+empty_moov"})
    made["M4A ALAC"] = by_av("ipod", "alac")
    made["MOV"] = by_av("mov", "aac")
    made["MOV PCM"] = by_av("mov", "pcm_s16le")
    made["CAF ALAC of libav"] = by_av("caf", "alac")  # its header counts the last packet as full
    made["WebM"] = by_av("webm", "libopus", 48_000)
    made["WebM live"] = by_av("webm", "libopus", 48_000, options={"live": "1"})
    made["Matroska"] = by_av("matroska", "aac")
    made["ADTS"] = by_av("adts", "aac")
    return made


def put(data: bytes, position: int, form: str, value: int) -> bytes:
    """Overwrite a number in a header."""
    return data[:position] + struct.pack(form, value) + data[position + struct.calcsize(form) :]


def ape(content: bytes, header: bool = True) -> bytes:
    """An APE tag of one item, as version 2 with a header or as version 1 without."""
    item = struct.pack("<II", len(content), 0) + b"Comment\0" + content
    head, foot = (
        b"APETAGEX" + struct.pack("<IIII", 2000, len(item) + 32, 1, flags) + bytes(8)
        for flags in (0xA0 << 24, 0x80 << 24 if header else 0)
    )
    return (head if header else b"") + item + foot


def pages(data: bytes) -> list[bytes]:
    """Split an Ogg file into pages."""
    found = []
    while data:
        length = 27 + data[26] + sum(data[27 : 27 + data[26]])
        found.append(data[:length])
        data = data[length:]
    return found


def id3(size: int, content: bytes = b"", footer: bool = False) -> bytes:
    """An ID3v2 tag with so many bytes after its header."""
    length = bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
    flags = b"\4\0\x10" if footer else b"\3\0\0"
    tail = b"3DI" + flags + length if footer else b""
    return b"ID3" + flags + length + content.ljust(size, b"\0") + tail
