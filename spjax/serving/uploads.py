"""Decode untrusted audio: the length in the header is checked against the limits before decoding."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

from spjax.serving.limits import Limits
from spjax.speech2unit.audio import SAMPLE_RATE, Audio, AudioError, read_stream

_ADVICE = re.compile(r"\. (Take it from its source again|Leave it out)\b.*$", re.DOTALL)  # advice for data sets
MOST_VALUES = 192_000 * 2  # samples × channels per second of audio (stereo studio rate): bounds the decoder's memory


def read_upload(data: bytes | str | os.PathLike[str], limits: Limits) -> Audio:
    """Decode an upload to an utterance.

    Formats: see docs/audio.md. No external program is started on untrusted input. Memory is bounded by the limits: a
    small file that would decode to hours is refused by its header; without a length in the header, decoding stops at
    the limit.

    Args:
      data: the bytes of an audio file, or its path.
      limits: on bytes and seconds.

    Raises:
      TooLargeError: too many bytes or seconds.
      AudioError: not audio, or audio that `read_audio` refuses; bytes are called "the upload" in the message.
    """
    name = "the upload"
    if not isinstance(data, bytes):
        place = Path(data)
        name = place.name  # without the folders, which clients should not see
        if not place.is_file():
            raise AudioError(f"{name} does not exist: send it again")
        limits.check_bytes(place.stat().st_size)
        data = place.read_bytes()
    limits.check_bytes(len(data))
    if not data:
        raise AudioError(f"{name} is empty (0 bytes): send an audio file")

    def check(frames: int, rate: int, channels: int) -> None:
        limits.check_seconds(frames / rate)
        if frames * channels > limits.max_seconds * MOST_VALUES:
            raise AudioError(
                f"{name} has {channels} channels of {rate} samples a second: send one channel, 16000 samples a second "
                "are enough"
            )

    try:
        return read_stream(io.BytesIO(data), name, check=check)
    except AudioError as error:
        raise AudioError(_ADVICE.sub(": record it again, or send another file", str(error))) from error


def check_audio(audio: Audio, limits: Limits) -> None:
    """Raise TooLargeError if the samples are longer than allowed."""
    limits.check_seconds(len(audio.wave) / SAMPLE_RATE)
