"""Audio in: a file or an array of any kind becomes mono float32 at 16 kHz, or is refused by name.

Everything behind this module may rely on what it returns: finite samples, not constant, at least `MIN_SAMPLES`.
"""

from __future__ import annotations

import math
import numbers
import os
import re
import shutil
import struct
import tempfile
import warnings
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr

from spjax.storage import places

SAMPLE_RATE = 16_000  # Hz, of every wave in the project
MIN_SAMPLES = 400  # at SAMPLE_RATE: one frame of every encoder
RATES = (1_000, 1_000_000)  # Hz: outside, a header is damaged
MAX_PEAK = 16.0  # full scale is 1, a hot float file may pass it; integers written as floats lie far beyond
MAX_CHANNELS = 64  # of an array: more are a batch or a spectrogram
# Endings of the names of recordings. What a file is, its bytes decide.
SUFFIXES = (
    *(".wav", ".wave", ".bwf", ".rf64", ".w64", ".aif", ".aiff", ".aifc", ".caf", ".au", ".snd", ".sph", ".flac"),
    *(".ogg", ".oga", ".opus", ".mp3", ".mp4", ".m4a", ".aac", ".webm", ".mka", ".mkv", ".mov"),
)
TOLERANCE = 0.010  # seconds that a crop may reach beyond the end: lists of crops round their times

_SCALES = {"i1": (0, 2**7), "u1": (2**7, 2**7), "i2": (0, 2**15), "i4": (0, 2**31)}  # dtype → zero, full scale
_SCALES |= dict.fromkeys(("f2", "f4", "f8"), (0, 1))
_BLOCK = 2**20  # samples decoded at once: a header may promise more than memory holds
_UNKNOWN_BYTES = 0x7FFFF000  # and more: what programs that write to a pipe put for a size
# First bytes of what libsndfile decodes: where it fails on these, they are damaged.
_KNOWN = (b"RIFF", b"RIFX", b"RF64", b"FORM", b".snd", b"NIST", b"fLaC", b"OggS", b"caff")
_WAY_OUT = "Take it from its source again, or leave it out."


class AudioError(ValueError):
    """Audio that cannot be used; the message names the file (or "the array"), the value and the way out."""


class Audio(NamedTuple):
    """An utterance.

    Attributes:
      wave: float32 [n], mono, SAMPLE_RATE a second, full scale 1.
      source_rate: samples a second where it was taken from.
    """

    wave: np.ndarray
    source_rate: int


def read_audio(path: str | os.PathLike[str], start: float = 0.0, duration: float | None = None) -> Audio:
    """Reads a file that soundfile or, failing that, librosa decodes: any format, rate, channels and sample type.

    Channels are averaged. Only the crop is decoded where the format can be searched.

    Args:
      path: local, or gs:// and its like.
      start: seconds into the file.
      duration: seconds; None for all the rest. A crop that ends up to TOLERANCE beyond the file ends with it.

    Raises:
      AudioError: the file is absent, unreadable, empty, cut off, damaged or no audio; its samples are NaN, infinite,
        out of scale, constant, or fewer than MIN_SAMPLES at SAMPLE_RATE; or the crop is not within it.
    """
    where = str(path)
    if not (math.isfinite(start) and start >= 0 and (duration is None or 0 < duration < math.inf)):
        raise AudioError(
            f"{where}: a crop of {duration} s from {start} s is none. Give a start of 0 or more, and more than 0 s."
        )
    try:
        place = places.at(where)
        if not place.is_file():
            raise AudioError(_what_it_is(place, where))
        with place.open("rb") as file:
            return read_stream(file, where, start, duration)
    except OSError as error:
        raise AudioError(f"{where} cannot be read ({error.strerror or error}). Check its permissions.") from error
    except ValueError as error:
        if isinstance(error, AudioError):
            raise
        raise AudioError(f"{where!r} is no path ({error}). Give the name of an audio file.") from error


def read_stream(file: BinaryIO, where: str, start: float = 0.0, duration: float | None = None) -> Audio:
    """Reads an audio file that is open, or in memory; arguments and errors otherwise as `read_audio` has them.

    Args:
      file: can be searched.
      where: what messages call it.
      start, duration: of the crop.
    """
    return _utterance(*_decode(file, where, start, duration), where)


def prepare(array: Any, rate: int) -> Audio:
    """Brings samples in memory to mono at SAMPLE_RATE.

    Args:
      array: [n], [n, channels] or [channels, n]: the longer axis is time. NumPy, or what turns into it. Integers of
        8, 16 or 32 bits are scaled by their range (uint8 has its zero at 128); floats have the full scale 1 already.
      rate: samples a second.

    Raises:
      AudioError: no array of those shapes and types, an unlikely rate, or samples that `read_audio` refuses too.
    """
    where = "the array"
    if not hasattr(array, "__array__"):
        way_out = "Read a file by read_audio." if isinstance(array, str | os.PathLike) else "Give a NumPy array."
        raise AudioError(f"the array is a {type(array).__name__}. {way_out}")
    samples = np.asarray(array)
    scale = _SCALES.get(f"{samples.dtype.kind}{samples.dtype.itemsize}")
    if scale is None:
        raise AudioError(
            f"{where} holds {samples.dtype}, whose full scale is unknown. "
            "Give floats between -1 and 1, or integers as int8, uint8, int16 or int32."
        )
    if samples.ndim not in (1, 2):
        raise AudioError(f"{where} has shape {list(samples.shape)}. Give one utterance, [n] or [n, channels].")
    if samples.ndim == 2:
        channels, n = sorted(samples.shape)
        if channels == n > 1:
            raise AudioError(f"{where} of shape {list(samples.shape)} could be read both ways. Give [n], one channel.")
        if channels > MAX_CHANNELS:
            raise AudioError(
                f"{where} of shape {list(samples.shape)} has over {MAX_CHANNELS} channels: a batch, or features? "
                "Give the samples of one utterance."
            )
        samples = samples if samples.shape[0] == n else samples.T
    zero, full = scale
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
        samples = samples.astype(np.float32)
    samples = (samples - zero) / np.float32(full) if full > 1 else samples
    return _utterance(samples if samples.ndim == 2 else samples[:, None], _checked_rate(rate, where), where)


def check_lowpass(hertz: float) -> None:
    """Raises ValueError unless `hertz` is a band width for `lowpass`."""
    if not isinstance(hertz, int | float) or not 500 <= hertz <= SAMPLE_RATE / 2:
        raise ValueError(f"lowpass is {hertz!r} Hz, must lie in 500 .. {SAMPLE_RATE // 2}")


def lowpass(wave: np.ndarray, hertz: float) -> np.ndarray:
    """A wave as if it had been recorded at 2 × `hertz` samples a second: nothing above `hertz` is left of it.

    Args:
      wave: float32 [n] at 16 kHz.
      hertz: band width, 500 to 8,000.

    Returns:
      float32 [n].

    Raises:
      ValueError: a band width outside those limits.
    """
    import soxr

    check_lowpass(hertz)
    narrow = soxr.resample(soxr.resample(wave, SAMPLE_RATE, 2 * hertz), 2 * hertz, SAMPLE_RATE)
    return np.pad(narrow, (0, max(0, len(wave) - len(narrow))))[: len(wave)]  # the rates may not divide


def _utterance(samples: np.ndarray, rate: int, where: str) -> Audio:
    """float32 [n, channels] to mono at SAMPLE_RATE, if it is fit for use."""
    if not samples.size:
        raise AudioError(f"{where} holds no samples. {_WAY_OUT}")
    with np.errstate(over="ignore", invalid="ignore"):
        mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    low, high = mono.min(), mono.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        number = int(np.argmin(np.isfinite(mono)))
        kind = "NaN" if np.isnan(samples).any() else "infinite"
        raise AudioError(f"{where} holds {kind} samples, the first at {number / rate:.3f} s. {_WAY_OUT}")
    if max(-low, high) > MAX_PEAK:
        raise AudioError(
            f"{where} holds floats up to {max(-low, high):.4g}; full scale is 1. "
            "Divide by the range of the integers that they once were (32768 for 16 bits)."
        )
    wave = mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    if len(wave) < MIN_SAMPLES:
        raise AudioError(
            f"{where} is too short: {len(mono)} samples at {rate} Hz are {len(wave)} at {SAMPLE_RATE} Hz, "
            f"{MIN_SAMPLES} are needed ({1000 * MIN_SAMPLES / SAMPLE_RATE:g} ms). Leave it out."
        )
    if low == high:
        raise AudioError(f"{where} is silent: every sample is {low:g}. {_WAY_OUT}")
    return Audio(np.ascontiguousarray(wave, np.float32), rate)


def _checked_rate(rate: Any, where: str) -> int:
    low, high = RATES
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not float(rate).is_integer():
        raise AudioError(f"{where} has the rate {rate!r}. Give whole samples a second, such as 16000.")
    if not low <= float(rate) <= high:
        raise AudioError(f"{where} has the rate {rate}; between {low} and {high} Hz are likely. {_WAY_OUT}")
    return int(float(rate))


def _what_it_is(place: Any, where: str) -> str:
    if place.is_dir():
        return f"{where} is a directory. Give an audio file in it."
    if place.exists():
        return f"{where} is no regular file. Give an audio file."
    return f"{where} does not exist. Check the path."


def _decode(file: BinaryIO, where: str, start: float, duration: float | None) -> tuple[np.ndarray, int]:
    """The crop's samples, float32 [n, channels], and their rate."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    if not size:
        raise AudioError(f"{where} is empty (0 bytes). {_WAY_OUT}")
    file.seek(0)
    head = file.read(4096)
    end = _promised_end(file, head, size)
    if end is not None and end > size:
        raise AudioError(f"{where} is cut off: its header promises {end} bytes, {size} are there. {_WAY_OUT}")
    file.seek(0)
    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: by its name it has no header
        if head[:4] in _KNOWN or isinstance(error, TypeError):
            raise _damaged(where, error) from error
        samples, rate = _decode_by_librosa(file, where)
        first, count = _crop(len(samples), rate, start, duration, where)
        return samples[first : first + count], rate
    with sound:
        rate = _checked_rate(sound.samplerate, where)
        first, count = _crop(sound.frames, rate, start, duration, where)
        try:
            if first:
                sound.seek(first)
            samples = _read(sound, count)
        except soundfile.SoundFileError as error:
            raise _damaged(where, error) from error
        # Without a Xing or Info header the length of an MP3 is an estimate.
        known = sound.format != "MP3" or b"Xing" in head or b"Info" in head
    if known and len(samples) < count:
        raise AudioError(
            f"{where} is cut off or damaged: {count} samples from {start:g} s are promised, {len(samples)} are there. "
            f"{_WAY_OUT}"
        )
    return samples, rate


def _damaged(where: str, error: Exception) -> AudioError:
    reason = getattr(error, "error_string", error)
    return AudioError(f"{where} is damaged, or of an unsupported encoding ({reason}). {_WAY_OUT}")


def _crop(frames: int, rate: int, start: float, duration: float | None, where: str) -> tuple[int, int]:
    """First frame and number of frames of a crop."""
    first = round(start * rate)
    count = frames - first if duration is None else round(duration * rate)
    if frames and (first >= frames or first + count > frames + TOLERANCE * rate):
        wanted = f"{start:g} s to " + ("its end" if duration is None else f"{start + duration:g} s")
        raise AudioError(
            f"{where} lasts {frames / rate:g} s; the crop from {wanted} is not within it. Correct the crop."
        )
    return first, min(count, frames - first)


def _read(sound: Any, count: int) -> np.ndarray:
    """Up to `count` frames from where the file stands: float32 [n, channels]."""
    blocks = [np.zeros((0, sound.channels), np.float32)]
    step = max(1, _BLOCK // sound.channels)
    while count > 0:
        blocks.append(sound.read(min(count, step), dtype="float32", always_2d=True))
        count -= len(blocks[-1])
        if len(blocks[-1]) < step:
            break
    return np.concatenate(blocks)


def _decode_by_librosa(file: BinaryIO, where: str) -> tuple[np.ndarray, int]:
    """All of a file that soundfile does not know (M4A and video, where librosa finds a decoder for them)."""
    import librosa

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ("audio" + Path(where).suffix)  # decoders want a local file
        file.seek(0)
        with copy.open("wb") as target:
            shutil.copyfileobj(file, target)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of the very way that is taken here
                samples, rate = librosa.load(copy, sr=None, mono=False)
        except Exception as error:  # each decoder has errors of its own
            raise AudioError(
                f"{where} is no audio, or of a format that neither soundfile nor librosa decodes here. "
                "Leave it out, or convert it to WAV or FLAC first."
            ) from error
    return np.atleast_2d(samples).T.astype(np.float32), _checked_rate(rate, where)


def _promised_end(file: BinaryIO, head: bytes, size: int) -> int | None:
    """Byte where the audio data ends by the file's own header; None where it does not say.

    libsndfile shortens what it reports to what is there, so a file that was cut off looks like a shorter one.
    """
    kind = head[:4]
    if kind in (b"RIFF", b"RIFX", b"FORM"):
        return _end_of_chunk(file, b"SSND" if kind == b"FORM" else b"data", "<" if kind == b"RIFF" else ">", size)
    if kind == b".snd" and len(head) >= 12:
        offset, length = struct.unpack(">II", head[4:12])
        return None if length >= _UNKNOWN_BYTES else offset + length
    if kind == b"OggS":
        return _end_of_last_page(file, size)
    if kind == b"NIST":
        return _end_of_sphere(head)
    return None


def _end_of_chunk(file: BinaryIO, name: bytes, order: str, size: int) -> int | None:
    """End of the chunk of audio data in a RIFF or AIFF file."""
    position = 12
    while position + 8 <= size:
        file.seek(position)
        found, length = struct.unpack(f"{order}4sI", file.read(8))
        if found == name:
            return None if length >= _UNKNOWN_BYTES else position + 8 + length
        position += 8 + length + length % 2
    return None


def _end_of_last_page(file: BinaryIO, size: int) -> int | None:
    """End of the last page of an Ogg file: 27 bytes, the lengths of its segments, the segments."""
    position = max(0, size - 2**17)  # a page is at most 65,307 bytes
    file.seek(position)
    tail = file.read()
    page = tail.rfind(b"OggS")
    if page < 0:
        return None
    header = tail[page : page + 27]
    lengths = tail[page + 27 : page + 27 + header[26]] if len(header) == 27 else b""
    if len(header) < 27 or len(lengths) < header[26]:
        return size + 1  # not even its header is whole
    return position + page + 27 + len(lengths) + sum(lengths)


def _end_of_sphere(head: bytes) -> int | None:
    """End of the samples of an uncompressed NIST SPHERE file."""
    fields = dict(re.findall(rb"^(\w+) -\w+ (.+)$", head[:1024], re.MULTILINE))
    if fields.get(b"sample_coding", b"pcm") not in (b"pcm", b"ulaw", b"alaw", b"mu-law"):
        return None
    try:
        offset = int(head[8:16])
        counts = [int(fields[name]) for name in (b"sample_count", b"sample_n_bytes")]
        return offset + math.prod(counts) * int(fields.get(b"channel_count", b"1"))
    except (KeyError, ValueError):
        return None
