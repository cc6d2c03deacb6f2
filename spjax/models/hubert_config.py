"""Configuration of a HuBERT encoder. The defaults are hubert_base: 94,370,816 parameters.

In a module without the encoder, since storage and encoders both use it and do not import each other.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class HubertConfig:
    """Architecture of a HuBERT of the "base" kind: group norm in the first convolution, post-norm layers.

    Attributes:
      conv_dim: channels of the convolutions over the waveform, which have no bias.
      conv_kernels: kernel widths.
      conv_strides: strides.
      dim: D, model width.
      layers: L.
      heads: H.
      ffn_dim: width of the feed-forward.
      position_width: kernel width of the positional convolution, in frames.
      position_groups: channel groups of the positional convolution.
    """

    conv_dim: int = 512
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    dim: int = 768
    layers: int = 12
    heads: int = 12
    ffn_dim: int = 3072
    position_width: int = 128
    position_groups: int = 16

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            parts = value if isinstance(value, tuple) else (value,)
            if isinstance(value, tuple) != field.name.startswith(("conv_k", "conv_s")) or not parts:
                raise ValueError(f"HuBERT: {field.name} is {value!r}, which has the wrong type")
            if any(type(part) is not int or part < 1 for part in parts):
                raise ValueError(f"HuBERT: {field.name} is {value!r}, must be positive integers")
        if len(self.conv_kernels) != len(self.conv_strides):
            raise ValueError(
                f"HuBERT: {len(self.conv_kernels)} conv_kernels, but {len(self.conv_strides)} conv_strides"
            )
        if any(kernel < stride for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True)):
            raise ValueError(f"HuBERT: conv_kernels {self.conv_kernels} skip samples at strides {self.conv_strides}")
        for name in ("heads", "position_groups"):
            if self.dim % getattr(self, name):
                raise ValueError(f"HuBERT: dim {self.dim} is not a multiple of {name} {getattr(self, name)}")

    @property
    def head_dim(self) -> int:
        """Dh, width of an attention head."""
        return self.dim // self.heads

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.conv_strides)

    @property
    def field(self) -> int:
        """Receptive field of a frame in samples, the length of the shortest waveform."""
        reach, hop = 1, 1
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            reach += (kernel - 1) * hop
            hop *= stride
        return reach

    def frames(self, samples: int) -> int:
        """Number of frames of a waveform; 0 if it is shorter than `field`."""
        return max(0, (samples - self.field) // self.hop + 1)

    @property
    def num_params(self) -> int:
        """Number of parameters of the encoder, with weight norm folded in and without pretraining heads."""
        c, d, f = self.conv_dim, self.dim, self.ffn_dim
        convs = self.conv_kernels[0] * c + sum(self.conv_kernels[1:]) * c * c
        position = self.position_width * d * (d // self.position_groups) + d
        block = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 4 * d
        return convs + 2 * c + 2 * c + (c * d + d) + position + 2 * d + self.layers * block
