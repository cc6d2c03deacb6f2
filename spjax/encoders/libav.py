"""Decode what libsndfile cannot, with PyAV (ffmpeg's libraries in this process; no program is started)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from spjax.encoders.raw_file import ContainerError

# Containers that libsndfile opens but whose codec it may not support: first bytes → libav's name.
FORMATS = {b"RIFF": "wav", b"RF64": "wav", b"FORM": "aiff", b"caff": "caf", b".snd": "au", b"OggS": "ogg"}

_JUMP = 0.05  # seconds; timestamps written by browsers are not sample-exact
_SKIP_MANUAL = 1 << 29  # AV_CODEC_FLAG2_SKIP_MANUAL
_SCALES = {"u8": (128, 2**7), "s16": (0, 2**15), "s32": (0, 2**31), "flt": (0, 1), "dbl": (0, 1)}  # zero, full scale


class Stream:
    """The first audio stream of an open container.

    Attributes:
      rate: sample rate, Hz.
      channels: number of channels.
      frames: approximate samples per channel according to the container; 0 if unknown.
      packets: number of packets according to the container; 0 if unknown.
      repairs: notes of repairs.
    """

    def __init__(self, container: Any) -> None:
        streams = container.streams.audio
        if not streams:
            raise ContainerError("holds no audio stream")
        self._container, self._stream = container, streams[0]
        context = self._stream.codec_context
        if context is None:
            raise ContainerError("has an encoding that is not supported")
        self.rate, self.channels = context.sample_rate, context.channels
        if not self.channels:
            raise ContainerError("is damaged: its audio has no channels")
        self.repairs: tuple[str, ...] = ()
        if len(streams) > 1:
            self.repairs = (f"{len(streams)} audio streams: took the first",)
        caf, pcm = container.format.name == "caf", context.name.startswith("pcm_")
        if caf and context.name == "alac":  # its last frame is short already: libav would trim it again
            context.flags2 |= _SKIP_MANUAL
        # For PCM, MP4 counts samples, of which libav reads many as one packet.
        self.packets = self._stream.frames if container.format.name.startswith("mov") and not pcm else 0
        seconds = 0.0
        if self._stream.duration and self._stream.time_base:
            seconds = float(self._stream.duration * self._stream.time_base)
        elif container.duration and container.format.name.startswith("matroska"):
            seconds = container.duration / 1e6
        self.frames = max(0, round(seconds * self.rate))
        # Samples that must be there; CAF may count the padding of the last packet.
        self._promised = max(0, self.frames - max(0, context.frame_size - 1)) if caf or pcm else 0

    def blocks(self, most: float, of_all: int = 0) -> Iterator[np.ndarray]:
        """Decode samples, float32 [n, channels], until `most` are yielded; later packets are only counted.

        Args:
          most: samples.
          of_all: minimum number of packets over all streams.

        Raises:
          ContainerError: damaged, or packets or samples are missing.
        """
        import av

        packets, samples, every = 0, 0, 0
        jumps: list[float] = []  # seconds
        time = None
        try:
            for packet in self._container.demux():
                every += packet.size > 0
                if packet.stream.index != self._stream.index:
                    continue
                if packet.is_corrupt:
                    raise ContainerError(f"is cut off or damaged: packet {packets + 1} is incomplete")
                packets += packet.size > 0
                if samples < most:
                    for frame in packet.decode():
                        samples += frame.samples
                        if time is not None and frame.time is not None and abs(frame.time - time) > _JUMP:
                            jumps.append(abs(frame.time - time))
                        time = None if frame.time is None else frame.time + frame.samples / self.rate
                        yield self._samples(frame)
        except av.FFmpegError as error:
            raise ContainerError(f"is damaged: packet {packets} cannot be decoded ({error.strerror})") from error
        if jumps:
            note = f"its time jumps {len(jumps)} times, by {sum(jumps):.2f} s in all: parts are missing or repeated"
            self.repairs = (*self.repairs, note)
        if packets < self.packets:
            raise ContainerError(f"is cut off: its header promises {self.packets} packets, {packets} are there")
        if every < of_all:
            raise ContainerError(f"is damaged: of {of_all} packets {every} can be read")
        if samples < min(self._promised, most):
            raise ContainerError(
                f"is cut off or damaged: its header promises {self.frames} samples, {samples} are there"
            )

    def _samples(self, frame: Any) -> np.ndarray:
        name = frame.format.name
        scale = _SCALES.get(name.removesuffix("p"))
        if scale is None:
            raise ContainerError(f"holds samples of type {name}, which are not supported")
        if frame.sample_rate != self.rate or frame.layout.nb_channels != self.channels:
            raise ContainerError("changes its rate or its channels in the middle")
        values = frame.to_ndarray()
        values = values.T if name.endswith("p") else values.reshape(-1, self.channels)
        zero, full = scale
        samples = values.astype(np.float32)
        return (samples - zero) / np.float32(full) if full > 1 else samples


@contextlib.contextmanager
def opened(file: BinaryIO, form: str) -> Iterator[Stream]:
    """Open the first audio stream of a file; `form` is the container's name in libav.

    Raises:
      ContainerError: damaged, without audio, or of an unsupported encoding.
    """
    import av  # slow

    file.seek(0)
    try:
        container = av.open(file, format=form, metadata_errors="ignore")
    except (av.FFmpegError, ValueError) as error:
        raise ContainerError(
            f"is damaged, or of an unsupported encoding ({getattr(error, 'strerror', error)})"
        ) from error
    with container:
        yield Stream(container)
