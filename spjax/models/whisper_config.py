"""Configuration of a Whisper encoder. The defaults are Whisper tiny.

In a module without the encoder, since storage and encoders both use it and do not import each other.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """Architecture of a Whisper encoder: two convolutions over a log-mel spectrogram, then pre-norm layers.

    Attributes:
      mels: mel bands: 80, or 128 since large-v3.
      dim: D, model width.
      layers: L.
      heads: H.
      ffn_dim: width of the feed-forward.
      positions: position embeddings, the maximum number of frames of one window: 1,500 are 30 s.
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
            raise ValueError(f"Whisper: dim {self.dim} is not a multiple of heads {self.heads}")

    @property
    def head_dim(self) -> int:
        """Dh, width of an attention head."""
        return self.dim // self.heads

    @property
    def hop(self) -> int:
        """Samples per frame: two steps of the spectrogram."""
        return 320

    def frames(self, samples: int) -> int:
        """Number of frames of a waveform: the spectrogram's step is 160 samples, a frame is two steps."""
        return (samples // 160 + 1) // 2

    @property
    def num_params(self) -> int:
        """Number of parameters of the encoder."""
        d, f = self.dim, self.ffn_dim
        convs = 3 * self.mels * d + d + 3 * d * d + d
        block = 4 * d * d + 3 * d + (d * f + f) + (f * d + d) + 4 * d
        return convs + self.positions * d + self.layers * block + 2 * d
