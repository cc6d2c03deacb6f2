"""Audio in: a file or an array of any kind becomes mono float32 at 16 kHz, or is refused by name.

Everything behind this module may rely on what it returns: finite samples, not constant, at least `MIN_SAMPLES`.
"""

from __future__ import annotations

import io
import math
import numbers
import os
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr

from spjax.speech2unit import libav
from spjax.speech2unit.containers import examine
from spjax.speech2unit.mpeg import counted
from spjax.speech2unit.raw_file import ContainerError, Examined, at

SAMPLE_RATE = 16_000  # Hz, of every wave in the project
MIN_SAMPLES = 400  # at SAMPLE_RATE: one frame of every encoder
RATES = (1_000, 1_000_000)  # Hz: outside, a header is damaged
MAX_PEAK = 16.0  # full scale is 1, a hot float file may pass it; integers written as floats lie far beyond
MAX_CHANNELS = 64  # of an array: more are a batch or a spectrogram
# Endings of the names of recordings. What a file is, its bytes decide.
SUFFIXES = (
    *(".wav", ".wave", ".bwf", ".rf64", ".w64", ".aif", ".aiff", ".aifc", ".caf", ".au", ".snd", ".sph", ".flac"),
    *(".ogg", ".oga", ".opus", ".spx", ".mp3", ".mp2", ".mpga", ".mp4", ".m4a", ".m4b", ".m4v", ".3gp", ".mov"),
    *(".aac", ".webm", ".weba", ".mka", ".mkv"),
)
TOLERANCE = 0.010  # seconds that a crop may reach beyond the end: lists of crops round their times

_SCALES = {"i1": (0, 2**7), "u1": (2**7, 2**7), "i2": (0, 2**15), "i4": (0, 2**31)}  # dtype → zero, full scale
_SCALES |= dict.fromkeys(("f2", "f4", "f8"), (0, 1))
_BLOCK = 2**20  # samples decoded at once: a header may promise more than memory holds
_WAY_OUT = "Take it from its source again, or leave it out."
_MOST_FRAMES = 2**48  # a header that promises more is damaged
_MPEG_DELAY = 1152  # samples
_CANCEL = 0.1  # of the energy of the loudest channel: a mean of less is what is left where channels cancel


class AudioError(ValueError):
    """Audio that cannot be used; the message names the file (or "the array"), the value and the way out."""


class Audio(NamedTuple):
    """An utterance.

    Attributes:
      wave: float32 [n], mono, SAMPLE_RATE a second, full scale 1.
      source_rate: samples a second where it was taken from.
      repairs: what was wrong with its file or channels and could be put right, a short note each.
    """

    wave: np.ndarray
    source_rate: int
    repairs: tuple[str, ...] = ()


def read_audio(path: str | os.PathLike[str], start: float = 0.0, duration: float | None = None) -> Audio:
    """Reads a recording of any format that docs/audio.md lists: any rate, channels and sample type.

    What a file is, its first bytes say. Channels are averaged; where they cancel, the loudest is taken. Only the crop
    is decoded where the format can be searched.

    Args:
      path: local, or gs:// and its like.
      start: seconds into the file.
      duration: seconds; None for all the rest. A crop that ends up to TOLERANCE beyond the file ends with it.

    Raises:
      AudioError: the file is absent, unreadable, empty, cut off, damaged or no audio; its samples are NaN, infinite,
        out of scale, constant, or fewer than MIN_SAMPLES at SAMPLE_RATE; or the crop is not within it.
    """
    from spjax.storage import places  # with JAX, which workers that compute features alone do without

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


def read_stream(
    file: BinaryIO,
    where: str,
    start: float = 0.0,
    duration: float | None = None,
    check: Callable[[int, int, int], None] | None = None,
) -> Audio:
    """Reads an audio file that is open, or in memory; arguments and errors otherwise as `read_audio` has them.

    Args:
      file: can be searched.
      where: what messages call it.
      start, duration: of the crop.
      check: raises an error if a recording of so many samples a channel, samples a second, and channels must not be
        decoded. It is called before decoding, and while a recording of unknown length is decoded.
    """
    samples, rate, repairs = _decode(file, where, start, duration, check or (lambda *_: None))
    return _utterance(samples, rate, where, repairs)


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
    check_lowpass(hertz)
    narrow = soxr.resample(soxr.resample(wave, SAMPLE_RATE, 2 * hertz), 2 * hertz, SAMPLE_RATE)
    return np.pad(narrow, (0, max(0, len(wave) - len(narrow))))[: len(wave)]  # the rates may not divide


def _utterance(samples: np.ndarray, rate: int, where: str, repairs: tuple[str, ...] = ()) -> Audio:
    """float32 [n, channels] to mono at SAMPLE_RATE, if it is fit for use."""
    if not samples.size:
        raise AudioError(f"{where} holds no samples. {_WAY_OUT}")
    with np.errstate(over="ignore", invalid="ignore"):
        mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
        loudest = _loudest_of_cancelling(samples, mono)
    if loudest is not None:
        mono = samples[:, loudest]
        repairs = (*repairs, f"channels cancel: took the loudest, {loudest + 1} of {samples.shape[1]}")
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
    return Audio(np.ascontiguousarray(wave, np.float32), rate, repairs)


def _loudest_of_cancelling(samples: np.ndarray, mono: np.ndarray) -> int | None:
    """The loudest channel of [n, channels] if little is left of it in the mean [n]; None where the mean will do.

    An offset is no sound, and counts nowhere. The mean of channels that are not alike, or of which most are silent, is
    quiet too, but of two never so much; among more, the mean is held against that of channels that have nothing in
    common as well.
    """
    n, channels = samples.shape
    if channels == 1:
        return None
    energy = np.zeros(channels + 1)
    means = [*samples.mean(axis=0, dtype=np.float64), mono.mean(dtype=np.float64)]
    for first in range(0, n, _BLOCK):
        block = np.column_stack([samples[first : first + _BLOCK], mono[first : first + _BLOCK]])
        energy += np.square(block - means).sum(axis=0)
    of_mean = energy[-1]
    unrelated = energy[:-1].sum() / channels**2
    if of_mean < _CANCEL * energy[:-1].max() and of_mean < 4 * _CANCEL * unrelated:  # false where one is not finite
        return int(energy[:-1].argmax())
    return None


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


def _decode(
    file: BinaryIO, where: str, start: float, duration: float | None, check: Callable[[int, int, int], None]
) -> tuple[np.ndarray, int, tuple[str, ...]]:
    """The crop's samples, float32 [n, channels], their rate, and notes of repairs."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    if not size:
        raise AudioError(f"{where} is empty (0 bytes). {_WAY_OUT}")
    try:
        found = examine(file, size, cropped=bool(start or duration))
        if found.decoder == "sndfile":
            found.file.seek(0)
            try:
                sound = soundfile.SoundFile(found.file)
                if found.frames is not None and sound.format == "MP3" and sound.frames < found.frames:
                    sound.close()
                    sound = soundfile.SoundFile(io.BytesIO(counted(at(found.file, 0, -1), found.frames)))
            except TypeError as error:  # by its name it has no header
                raise _damaged(where, error) from error
            except soundfile.SoundFileError as error:
                form = libav.FORMATS.get(at(found.file, 0, 4))  # a container that may hold what libav knows
                if form is None:
                    raise _damaged(where, error) from error
                found = found._replace(decoder=form)
            else:
                with sound:
                    samples, rate = _decode_by_libsndfile(sound, found, where, start, duration, check)
                return samples, rate, found.repairs
        samples, rate, repairs = _decode_by_libav(found, where, start, duration, check)
        return samples, rate, (*found.repairs, *repairs)
    except ContainerError as error:
        raise AudioError(f"{where} {error}. {_WAY_OUT}") from error


def _decode_by_libsndfile(
    sound: Any,
    found: Examined,
    where: str,
    start: float,
    duration: float | None,
    check: Callable[[int, int, int], None],
) -> tuple[np.ndarray, int]:
    rate = _checked_rate(sound.samplerate, where)
    frames = sound.frames if found.frames is None else found.frames
    if not 0 <= frames < _MOST_FRAMES:
        raise AudioError(f"{where} is damaged: its header says that it has {frames} samples. {_WAY_OUT}")
    check(frames, rate, sound.channels)
    first, count = _crop(frames, rate, start, duration, where)
    try:
        if first and sound.seekable():
            sound.seek(first)
            samples = _read(sound, count)
        else:
            samples = _read(sound, first + count)[first:]
    except soundfile.SoundFileError as error:
        raise _damaged(where, error) from error
    # The frames of MPEG audio were counted; what a decoder makes of the first may be less by its delay.
    mpeg = sound.subtype.startswith("MPEG") and (found.frames is not None or sound.format != "MP3")
    if len(samples) < count - (_MPEG_DELAY if mpeg else 0) or (count and not len(samples)):
        raise AudioError(
            f"{where} is cut off or damaged: {count} samples from {start:g} s are promised, {len(samples)} are there. "
            f"{_WAY_OUT}"
        )
    return samples, rate


def _decode_by_libav(
    found: Examined,
    where: str,
    start: float,
    duration: float | None,
    check: Callable[[int, int, int], None],
) -> tuple[np.ndarray, int, tuple[str, ...]]:
    """A crop is cut out of all that is before its end: libav does not seek to a sample."""
    with libav.opened(found.file, found.decoder) as stream:
        rate = _checked_rate(stream.rate, where)
        if stream.frames:
            check(stream.frames, rate, stream.channels)
        first = round(start * rate)
        end = math.inf if duration is None else first + round(duration * rate)
        parts, position = [np.zeros((0, stream.channels), np.float32)], 0
        for block in stream.blocks(end, found.packets):
            check(position + len(block), rate, stream.channels)
            if position + len(block) > first:
                parts.append(block[max(0, first - position) :])
            position += len(block)
        repairs = stream.repairs
        if found.suspect is not None:
            if not stream.packets:
                raise found.suspect
            repairs = (*repairs, "the length of a box is wrong, all samples are there")
    _, count = _crop(position, rate, start, duration, where) if position < end else (first, int(end) - first)
    return np.concatenate(parts)[:count], rate, repairs


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
