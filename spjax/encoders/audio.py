"""Read audio: a file or array becomes mono float32 at 16 kHz, or is refused with an error that names it.

Waves returned by this module are finite, not constant, and have at least `MIN_SAMPLES` samples.
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

from spjax.encoders import libav
from spjax.encoders.containers import examine
from spjax.encoders.mpeg import counted
from spjax.encoders.raw_file import ContainerError, Examined, at

SAMPLE_RATE = 16_000  # Hz, of every wave in the project
MIN_SAMPLES = 400  # at SAMPLE_RATE: one frame of most encoders
RATES = (1_000, 1_000_000)  # Hz: a header with a rate outside is damaged
MAX_PEAK = 16.0  # full scale is 1, which float files may exceed a little; unscaled integers exceed it by far
MAX_CHANNELS = 64  # of an array: more are a batch or a spectrogram
# File name suffixes of recordings, used when listing folders; the format is detected from the file's bytes.
SUFFIXES = (
    *(".wav", ".wave", ".bwf", ".rf64", ".w64", ".aif", ".aiff", ".aifc", ".caf", ".au", ".snd", ".sph", ".flac"),
    *(".ogg", ".oga", ".opus", ".spx", ".mp3", ".mp2", ".mpga", ".mp4", ".m4a", ".m4b", ".m4v", ".3gp", ".mov"),
    *(".aac", ".webm", ".weba", ".mka", ".mkv"),
)
TOLERANCE = 0.010  # seconds that a crop may extend beyond the end, since lists of crops are rounded

_SCALES = {"i1": (0, 2**7), "u1": (2**7, 2**7), "i2": (0, 2**15), "i4": (0, 2**31)}  # dtype → zero, full scale
_SCALES |= dict.fromkeys(("f2", "f4", "f8"), (0, 1))
_BLOCK = 2**20  # samples decoded at once: the size in a header is not trusted
_FIX = "Take it from its source again, or leave it out."
_MOST_FRAMES = 2**48  # a header with more is damaged
_MPEG_DELAY = 1152  # samples
_CANCEL = 0.1  # of the loudest channel's energy: below, the mean of the channels is what is left after cancellation


class AudioError(ValueError):
    """Audio that cannot be used; the message names the file (or "the array"), the value and what to do."""


class Audio(NamedTuple):
    """An utterance.

    Attributes:
      wave: float32 [n], mono at SAMPLE_RATE, full scale 1.
      source_rate: sample rate of the file or array, Hz.
      repairs: a short note for each defect of the file or channels that was repaired.
    """

    wave: np.ndarray
    source_rate: int
    repairs: tuple[str, ...] = ()


def read_audio(
    path: str | os.PathLike[str], start: float = 0.0, duration: float | None = None, least: int = MIN_SAMPLES
) -> Audio:
    """Read a recording in any format, sample rate, sample type and number of channels listed in docs/audio.md.

    The format is detected from the file's first bytes. Channels are averaged; if they cancel, the loudest is used. Only
    the crop is decoded if the format is seekable.

    Args:
      path: a local path, or gs://BUCKET/PATH.
      start: start of the crop, seconds.
      duration: length of the crop, seconds; None for the rest. A crop that ends up to TOLERANCE after the file is
        shortened.
      least: samples of a frame of the encoder (`Encoder.least`).

    Raises:
      AudioError: the file is absent, unreadable, empty, cut off, damaged or not audio; its samples are NaN, infinite,
        out of scale, constant, or fewer than `least` at SAMPLE_RATE; or the crop is outside the file.
    """
    from spjax.io import places  # imports JAX, which workers that compute only features do not need

    where = str(path)
    if not (math.isfinite(start) and start >= 0 and (duration is None or 0 < duration < math.inf)):
        raise AudioError(
            f"{where}: the crop of {duration} s from {start} s is empty. Give a start of 0 or more, and a duration."
        )
    try:
        place = places.at(where)
        if not place.is_file():
            raise AudioError(_what_it_is(place, where))
        with place.open("rb") as file:
            audio = read_stream(file, where, start, duration)
        check_length(where, audio.wave, least)
        return audio
    except OSError as error:
        raise AudioError(f"{where} cannot be read ({error.strerror or error}). Check its permissions.") from error
    except ValueError as error:
        if isinstance(error, AudioError):
            raise
        raise AudioError(f"{where!r} is not a path ({error}). Give the name of an audio file.") from error


def read_stream(
    file: BinaryIO,
    where: str,
    start: float = 0.0,
    duration: float | None = None,
    check: Callable[[int, int, int], None] | None = None,
) -> Audio:
    """Read an audio file that is open or in memory; see `read_audio` for the rest.

    Args:
      file: seekable.
      where: name of the file in messages.
      start, duration: of the crop, seconds.
      check: called with samples per channel, sample rate and channels, before decoding and, for a recording of unknown
        length, during decoding; raises an error if it must not be decoded.
    """
    samples, rate, repairs = _decode(file, where, start, duration, check or (lambda *_: None))
    return _utterance(samples, rate, where, repairs)


def prepare(array: Any, rate: int) -> Audio:
    """Convert samples in memory to mono at SAMPLE_RATE.

    Args:
      array: [n], [n, channels] or [channels, n] (the longer axis is time), NumPy or convertible to it. Integers of 8,
        16 or 32 bits are scaled by their range (uint8 is centred on 128); floats have full scale 1.
      rate: sample rate, Hz.

    Raises:
      AudioError: not an array of these shapes and types, an implausible rate, or samples that `read_audio` refuses.
    """
    where = "the array"
    if not hasattr(array, "__array__"):
        fix = "Read a file with read_audio." if isinstance(array, str | os.PathLike) else "Give a NumPy array."
        raise AudioError(f"the array is a {type(array).__name__}. {fix}")
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
            raise AudioError(f"{where} of shape {list(samples.shape)} is ambiguous. Give one channel, [n].")
        if channels > MAX_CHANNELS:
            raise AudioError(
                f"{where} of shape {list(samples.shape)} has over {MAX_CHANNELS} channels: a batch, or features? "
                "Give the samples of one utterance."
            )
        samples = samples if samples.shape[0] == n else samples.T
    zero, full = scale
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, and are refused below
        samples = samples.astype(np.float32)
    samples = (samples - zero) / np.float32(full) if full > 1 else samples
    return _utterance(samples if samples.ndim == 2 else samples[:, None], _checked_rate(rate, where), where)


def check_lowpass(hertz: float) -> None:
    """Raise ValueError unless `hertz` is a valid cut-off for `lowpass`."""
    if not isinstance(hertz, int | float) or not 500 <= hertz <= SAMPLE_RATE / 2:
        raise ValueError(f"lowpass is {hertz!r} Hz, must be in 500 .. {SAMPLE_RATE // 2}")


def lowpass(wave: np.ndarray, hertz: float) -> np.ndarray:
    """Remove everything above `hertz`, by resampling to 2 × `hertz` and back.

    Args:
      wave: float32 [n] at 16 kHz.
      hertz: cut-off frequency, 500 to 8,000.

    Returns:
      float32 [n].

    Raises:
      ValueError: a cut-off outside those limits.
    """
    check_lowpass(hertz)
    narrow = soxr.resample(soxr.resample(wave, SAMPLE_RATE, 2 * hertz), 2 * hertz, SAMPLE_RATE)
    return np.pad(narrow, (0, max(0, len(wave) - len(narrow))))[: len(wave)]  # resampling may change the length


def check_length(where: str, wave: np.ndarray, least: int = MIN_SAMPLES, length: str = "") -> None:
    """Raise AudioError if a wave at SAMPLE_RATE has fewer than `least` samples; `length` describes it."""
    if len(wave) < least:
        length = length or f"{len(wave)} samples at {SAMPLE_RATE} Hz"
        milliseconds = f"{1000 * least / SAMPLE_RATE:g} ms"
        raise AudioError(f"{where} is too short: {length}, at least {least} are needed ({milliseconds}). Leave it out.")


def _utterance(samples: np.ndarray, rate: int, where: str, repairs: tuple[str, ...] = ()) -> Audio:
    """float32 [n, channels] to mono at SAMPLE_RATE, after checks."""
    if not samples.size:
        raise AudioError(f"{where} holds no samples. {_FIX}")
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
        raise AudioError(f"{where} holds {kind} samples, the first at {number / rate:.3f} s. {_FIX}")
    if max(-low, high) > MAX_PEAK:
        raise AudioError(
            f"{where} holds floats up to {max(-low, high):.4g}; full scale is 1. "
            "Divide by the range of the original integers (32768 for 16 bits)."
        )
    wave = mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    length = f"{len(mono)} samples at {rate} Hz are {len(wave)} at {SAMPLE_RATE} Hz"
    check_length(where, wave, length=length)
    if low == high:
        raise AudioError(f"{where} is silent: every sample is {low:g}. {_FIX}")
    return Audio(np.ascontiguousarray(wave, np.float32), rate, repairs)


def _loudest_of_cancelling(samples: np.ndarray, mono: np.ndarray) -> int | None:
    """The loudest channel of [n, channels] if channels cancel in their mean [n]; None if the mean is usable.

    Constant offsets are removed first. The mean of unrelated or mostly silent channels is quiet too, but for two
    channels never below the threshold; for more, the mean is also compared with that of unrelated channels.
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
    if of_mean < _CANCEL * energy[:-1].max() and of_mean < 4 * _CANCEL * unrelated:  # False for NaN and infinity
        return int(energy[:-1].argmax())
    return None


def _checked_rate(rate: Any, where: str) -> int:
    low, high = RATES
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not float(rate).is_integer():
        raise AudioError(f"{where} has the sample rate {rate!r}. Give a whole number in Hz, such as 16000.")
    if not low <= float(rate) <= high:
        raise AudioError(f"{where} has the sample rate {rate}; it must be between {low} and {high} Hz. {_FIX}")
    return int(float(rate))


def _what_it_is(place: Any, where: str) -> str:
    if place.is_dir():
        return f"{where} is a directory. Give an audio file in it."
    if place.exists():
        return f"{where} is not a regular file. Give an audio file."
    return f"{where} does not exist. Check the path."


def _decode(
    file: BinaryIO, where: str, start: float, duration: float | None, check: Callable[[int, int, int], None]
) -> tuple[np.ndarray, int, tuple[str, ...]]:
    """Decode a crop: samples float32 [n, channels], their rate, and notes of repairs."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    if not size:
        raise AudioError(f"{where} is empty (0 bytes). {_FIX}")
    try:
        found = examine(file, size, cropped=bool(start or duration))
        if found.decoder == "sndfile":
            found.file.seek(0)
            try:
                sound = soundfile.SoundFile(found.file)
                if found.frames is not None and sound.format == "MP3" and sound.frames < found.frames:
                    sound.close()
                    sound = soundfile.SoundFile(io.BytesIO(counted(at(found.file, 0, -1), found.frames)))
            except TypeError as error:  # the file name ends in .raw, for which soundfile wants a format
                raise _damaged(where, error) from error
            except soundfile.SoundFileError as error:
                form = libav.FORMATS.get(at(found.file, 0, 4))  # a container whose codec libav may support
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
        raise AudioError(f"{where} {error}. {_FIX}") from error


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
        raise AudioError(f"{where} is damaged: its header says that it has {frames} samples. {_FIX}")
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
    # The frames of MPEG audio were counted; a decoder may drop its delay from the first one.
    mpeg = sound.subtype.startswith("MPEG") and (found.frames is not None or sound.format != "MP3")
    if len(samples) < count - (_MPEG_DELAY if mpeg else 0) or (count and not len(samples)):
        raise AudioError(
            f"{where} is cut off or damaged: {count} samples from {start:g} s are expected, {len(samples)} are there. "
            f"{_FIX}"
        )
    return samples, rate


def _decode_by_libav(
    found: Examined,
    where: str,
    start: float,
    duration: float | None,
    check: Callable[[int, int, int], None],
) -> tuple[np.ndarray, int, tuple[str, ...]]:
    """Decode everything up to the end of the crop, since libav does not seek to a sample."""
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
    return AudioError(f"{where} is damaged, or of an unsupported encoding ({reason}). {_FIX}")


def _crop(frames: int, rate: int, start: float, duration: float | None, where: str) -> tuple[int, int]:
    """First frame and number of frames of a crop."""
    first = round(start * rate)
    count = frames - first if duration is None else round(duration * rate)
    if frames and (first >= frames or first + count > frames + TOLERANCE * rate):
        wanted = f"{start:g} s to " + ("its end" if duration is None else f"{start + duration:g} s")
        raise AudioError(f"{where} lasts {frames / rate:g} s; the crop from {wanted} is outside it. Correct the crop.")
    return first, min(count, frames - first)


def _read(sound: Any, count: int) -> np.ndarray:
    """Read up to `count` frames from the current position: float32 [n, channels]."""
    blocks = [np.zeros((0, sound.channels), np.float32)]
    step = max(1, _BLOCK // sound.channels)
    while count > 0:
        blocks.append(sound.read(min(count, step), dtype="float32", always_2d=True))
        count -= len(blocks[-1])
        if len(blocks[-1]) < step:
            break
    return np.concatenate(blocks)
