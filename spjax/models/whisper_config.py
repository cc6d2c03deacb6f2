"""Configuration of a Whisper encoder. The defaults are Whisper tiny.

In a module without the encoder, since storage and encoders both use it and do not import each other.
"""

from __future__ import annotations

import dataclasses
import math


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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by path, as of `HubertConfig`; key projections have no bias."""
        d, f = self.dim, self.ffn_dim
        shapes: dict[str, tuple[int, ...]] = {"position/table": (self.positions, d)}
        shapes |= {
            "conv/0/kernel": (3, self.mels, d),
            "conv/1/kernel": (3, d, d),
            "conv/0/bias": (d,),
            "conv/1/bias": (d,),
        }
        norms = ["norm"]
        for number in range(self.layers):
            part = f"layers/{number}"
            dense = dict.fromkeys(("query", "key", "value", "out"), (d, d)) | {"ffn_in": (d, f), "ffn_out": (f, d)}
            shapes |= {f"{part}/{name}/kernel": shape for name, shape in dense.items()}
            shapes |= {f"{part}/{name}/bias": shape[1:] for name, shape in dense.items() if name != "key"}
            norms += [f"{part}/attn_norm", f"{part}/ffn_norm"]
        return shapes | {f"{name}/{part}": (d,) for name in norms for part in ("scale", "bias")}

    @property
    def num_params(self) -> int:
        """Number of parameters of the encoder."""
        return sum(map(math.prod, self.shapes.values()))
