"""Configuration of HuBERT, wav2vec2 and WavLM encoders. The defaults are hubert_base: 94,370,816 parameters.

In a module without the encoder, since storage and encoders both use it and do not import each other.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class HubertConfig:
    """Architecture of a HuBERT, a wav2vec2 or a WavLM, which differ only in the fields below.

    Attributes:
      conv_dim: channels of the convolutions over the waveform.
      conv_kernels: kernel widths.
      conv_strides: strides.
      dim: D, model width.
      layers: L.
      heads: H.
      ffn_dim: width of the feed-forward.
      position_width: kernel width of the positional convolution, in frames.
      position_groups: channel groups of the positional convolution.
      conv_layer_norm: a layer norm after each convolution ("large"), instead of a group norm after the first.
      conv_bias: the convolutions have a bias.
      pre_norm: norms precede attention and feed-forward ("stable layer norm"), instead of following them.
      position_norm: a batch norm before the positional convolution (mHuBERT 25 Hz), instead of its weight norm.
      buckets: buckets of WavLM's relative positions; 0 for none.
      max_distance: frames from which on all positions share WavLM's last bucket; 0 for none.
      wave_eps: waves are normalised to mean 0 and variance 1, this added to the variance; 0 if they are used as they
        are.
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
    conv_layer_norm: bool = False
    conv_bias: bool = False
    pre_norm: bool = False
    position_norm: bool = False
    buckets: int = 0
    max_distance: int = 0
    wave_eps: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            parts = value if isinstance(value, tuple) else (value,)
            if type(value) is not type(field.default) or not parts:
                raise ValueError(f"HuBERT: {field.name} is {value!r}, which has the wrong type")
            if field.default and any(type(part) is not int or part < 1 for part in parts):
                raise ValueError(f"HuBERT: {field.name} is {value!r}, must be positive integers")
        if not 0 <= self.wave_eps < 1:
            raise ValueError(f"HuBERT: wave_eps is {self.wave_eps}, must be 0 or more, and less than 1")
        if (self.buckets or self.max_distance) and not 4 <= self.buckets < 4 * self.max_distance:
            raise ValueError(
                f"HuBERT: buckets {self.buckets} must be 4 or more, and less than 4 times max_distance "
                f"{self.max_distance}"
            )
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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by path; kernels are [in, out], of convolutions [width, in, out]."""
        c, d, f, part = self.conv_dim, self.dim, self.ffn_dim, self.dim // self.position_groups
        shapes: dict[str, tuple[int, ...]] = {}
        dense, norms = {"project": (c, d)}, {"project_norm": c}
        norms |= {} if self.pre_norm else {"norm": d}
        norms |= {} if self.conv_layer_norm else {"conv_norm": c}
        for number, width in enumerate(self.conv_kernels):
            shapes[f"conv/{number}/kernel"] = (width, c if number else 1, c)
            shapes |= {f"conv/{number}/bias": (c,)} if self.conv_bias else {}
            norms |= {f"conv_norm/{number}": c} if self.conv_layer_norm else {}
        shapes["position/kernel"] = (self.position_width, part, d)
        shapes["position/bias"] = (d,)
        norms |= {"position_norm": d} if self.position_norm else {}
        for number in range(self.layers):
            dense |= {f"layers/{number}/{name}": (d, d) for name in ("query", "key", "value", "out")}
            dense |= {f"layers/{number}/ffn_in": (d, f), f"layers/{number}/ffn_out": (f, d)}
            norms |= {f"layers/{number}/{name}": d for name in ("attn_norm", "ffn_norm")}
            if self.buckets:
                dense[f"layers/{number}/gate"] = (self.head_dim, 2)
                shapes[f"layers/{number}/gate/scale"] = (self.heads,)
        shapes |= {"relative/table": (self.buckets, self.heads)} if self.buckets else {}
        for name, (rows, columns) in dense.items():
            shapes |= {f"{name}/kernel": (rows, columns), f"{name}/bias": (columns,)}
        for name, width in norms.items():
            shapes |= {f"{name}/scale": (width,), f"{name}/bias": (width,)}
        return shapes

    @property
    def num_params(self) -> int:
        """Number of parameters, with weight norm and batch norm folded in and without pretraining heads."""
        return sum(map(math.prod, self.shapes.values()))
