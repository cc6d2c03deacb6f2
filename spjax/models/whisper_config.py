"""Sizes of a Whisper encoder. The defaults are those of Whisper tiny.

Apart from the encoder itself, since files (storage) and features (speech2unit) both need them and know nothing of each
other.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """Architecture of the encoder of a Whisper: pre-norm layers behind two convolutions over a log-mel spectrum.

    Attributes:
      mels: bands of the spectrum: 80, or 128 since large-v3.
      dim: D, model width.
      layers: L.
      heads: H.
      ffn_dim: width of the feed-forward.
      positions: frames that there are position embeddings for, the longest stretch encoded at once: 1,500 are 30 s.
    """

    mels: int = 80
    dim: int = 384
    layers: int = 4
    heads: int = 6
    ffn_dim: int = 1536
    positions: int = 1500

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ValueError(f"Whisper: {field.name} is {value!r}, must be a positive integer")
        if self.dim % self.heads:
            raise ValueError(f"Whisper: dim {self.dim} is no multiple of heads {self.heads}")

    @property
    def head_dim(self) -> int:
        """Dh."""
        return self.dim // self.heads

    @property
    def hop(self) -> int:
        """Samples from one frame to the next: two steps of the spectrum."""
        return 320

    def frames(self, samples: int) -> int:
        """Frames of a wave: one of two steps of the spectrum, which has one of every 160 samples."""
        return (samples // 160 + 1) // 2

    @property
    def num_params(self) -> int:
        """Weights of the encoder."""
        d, f = self.dim, self.ffn_dim
        convs = 3 * self.mels * d + d + 3 * d * d + d
        block = 4 * d * d + 3 * d + (d * f + f) + (f * d + d) + 4 * d
        return convs + self.positions * d + self.layers * block + 2 * d
