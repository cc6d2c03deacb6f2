"""Audio from people that nobody knows: what its header promises is held against the limits before it is decoded."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

from spjax.serving.limits import Limits
from spjax.speech2unit.audio import SAMPLE_RATE, Audio, AudioError, read_stream

_ADVICE = re.compile(r"\. (Take it from its source again|Leave it out)\b.*$", re.DOTALL)  # to who makes a data set
MOST_VALUES = 192_000 * 2  # a second of sound, channels counted: bounds what decoding holds (studio rates in stereo)


def read_upload(data: bytes | str | os.PathLike[str], limits: Limits) -> Audio:
    """An utterance out of an upload.

    Formats are those of docs/audio.md. No other program is started on what a stranger sent. Memory is bounded by the
    limits: a small file of silence that would unfold to hours is refused by its header, and where no header tells how
    long a recording is, decoding ends at the limit.

    Args:
      data: the bytes of an audio file, or the place of one.
      limits: on its bytes and seconds.

    Raises:
      TooLargeError: of too many bytes or seconds.
      AudioError: no audio, or such that `read_audio` refuses; of bytes it speaks of "the upload".
    """
    name = "the upload"
    if not isinstance(data, bytes):
        place = Path(data)
        name = place.name  # nobody outside is told of this machine's folders
        if not place.is_file():
            raise AudioError(f"{name} is no file that is there: send it again")
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


def check_audio(said: Audio, limits: Limits) -> None:
    """Raises TooLargeError if samples in memory last longer than is taken."""
    limits.check_seconds(len(said.wave) / SAMPLE_RATE)
