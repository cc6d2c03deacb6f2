"""Sizes of a HuBERT encoder. The defaults are hubert_base (FACTS.md): 94,370,816 parameters.

Apart from the encoder itself, since files (storage) and features (speech2unit) both need them and know nothing of each
other.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class HubertConfig:
    """Architecture of a HuBERT of the "base" kind: group norm in the first convolution, post-norm layers.

    Attributes:
      conv_dim: channels of every convolution over the wave; none has a bias.
      conv_kernels: their widths.
      conv_strides: their strides.
      dim: D, model width.
      layers: L.
      heads: H.
      ffn_dim: width of the feed-forward.
      position_width: width of the positional convolution, in frames.
      position_groups: its groups of channels.
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
                raise ValueError(f"HuBERT: {field.name} is {value!r}, which is not of its type")
            if any(type(part) is not int or part < 1 for part in parts):
                raise ValueError(f"HuBERT: {field.name} is {value!r}, must be of positive integers")
        if len(self.conv_kernels) != len(self.conv_strides):
            raise ValueError(
                f"HuBERT: {len(self.conv_kernels)} conv_kernels, but {len(self.conv_strides)} conv_strides"
            )
        if any(kernel < stride for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True)):
            raise ValueError(f"HuBERT: conv_kernels {self.conv_kernels} skip samples at strides {self.conv_strides}")
        for name in ("heads", "position_groups"):
            if self.dim % getattr(self, name):
                raise ValueError(f"HuBERT: dim {self.dim} is no multiple of {name} {getattr(self, name)}")

    @property
    def head_dim(self) -> int:
        """Dh."""
        return self.dim // self.heads

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.conv_strides)

    @property
    def field(self) -> int:
        """Samples that one frame is computed of: the shortest wave."""
        reach, hop = 1, 1
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            reach += (kernel - 1) * hop
            hop *= stride
        return reach

    def frames(self, samples: int) -> int:
        """Frames of a wave; 0 where it is shorter than `field`."""
        return max(0, (samples - self.field) // self.hop + 1)

    @property
    def num_params(self) -> int:
        """Weights of the encoder, weight norm resolved, what only pretraining uses left out."""
        c, d, f = self.conv_dim, self.dim, self.ffn_dim
        convs = self.conv_kernels[0] * c + sum(self.conv_kernels[1:]) * c * c
        position = self.position_width * d * (d // self.position_groups) + d
        block = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 4 * d
        return convs + 2 * c + 2 * c + (c * d + d) + position + 2 * d + self.layers * block
