"""Configuration of a unit LM. The defaults are fairseq's GSLM model `hubert100_lm`: 151,263,232 parameters."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from spjax import vocab

_LARGEST = sys.float_info.max  # JSON has larger integers, which float() refuses


@dataclasses.dataclass(frozen=True)
class ProsodyConfig:
    """Duration and f0 streams of a multi-stream LM (pGSLM).

    Attributes:
      discrete: streams are quantised, embedded and predicted as classes; False: projected and regressed as numbers.
      duration_input: the LM is conditioned on durations. False: its duration input is 0, but it still predicts them.
      f0_input: the same for f0.
      max_duration: frames; a discrete LM clips longer durations to it.
      f0_edges: ascending bin edges of a discrete LM, in log f0 minus the speaker's mean; () for a continuous LM.
      interpolate_f0: f0 of unvoiced segments between voiced ones is interpolated linearly in Hz, as in the published
        pGSLMs. False: 0, as for unvoiced segments at the start and end.
    """

    discrete: bool = True
    duration_input: bool = True
    f0_input: bool = True
    max_duration: int = 20
    f0_edges: tuple[float, ...] = ()
    interpolate_f0: bool = False

    def __post_init__(self) -> None:
        for name in ("discrete", "duration_input", "f0_input", "interpolate_f0"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"prosody: {name} is {getattr(self, name)!r}, must be true or false")
        if type(self.max_duration) is not int or self.max_duration < 1:
            raise ValueError(f"prosody: max_duration is {self.max_duration!r}, must be a positive integer")
        edges = tuple(self.f0_edges)
        if not all(isinstance(edge, int | float) and -_LARGEST <= edge <= _LARGEST for edge in edges):
            raise ValueError(f"prosody: f0_edges {edges!r:.80} must be finite numbers")
        object.__setattr__(self, "f0_edges", edges := tuple(map(float, edges)))  # JSON has lists, and 0 for 0.0
        if any(a > b for a, b in itertools.pairwise(edges)):
            raise ValueError(f"prosody: f0_edges {edges} must be ascending")
        if edges and not self.discrete:
            raise ValueError("prosody: a continuous LM must have no f0_edges")

    @property
    def symbols(self) -> tuple[int, int]:
        """Output sizes of the duration and f0 streams: values, then the four specials; 1 each if continuous."""
        if not self.discrete:
            return 1, 1
        return self.max_duration + 1 + vocab.UNIT_OFFSET, len(self.f0_edges) + 1 + vocab.UNIT_OFFSET


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Change of the rotary frequencies for longer contexts, with the meaning of Hugging Face's `rope_parameters`.

    Attributes:
      kind: "linear": frequencies are divided by `factor`; "llama3": only the low ones are, with a smooth transition.
      factor: what frequencies are divided by.
      low_freq_factor, high_freq_factor, original_positions: of "llama3"; wavelengths over `original_positions /
        low_freq_factor` are low frequencies, those under `original_positions / high_freq_factor` are kept.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: float = 8192.0

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope_scaling: kind is {self.kind!r}, must be linear or llama3")
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if type(value) not in (int, float) or not 0 < value <= _LARGEST:
                raise ValueError(f"rope_scaling: {field.name} is {value!r:.80}, must be a positive number")
            object.__setattr__(self, field.name, float(value))
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling: low_freq_factor {self.low_freq_factor} must be less than high_freq_factor "
                f"{self.high_freq_factor}"
            )


_SCALING = {field.name for field in dataclasses.fields(RopeScaling)}


@dataclasses.dataclass(frozen=True)
class UnitLMConfig:
    """Architecture of a unit LM. The defaults describe GSLM's decoder; docs/models.md has the values of other families.

    Attributes:
      vocab_size: V, specials included.
      dim: D.
      layers: L.
      heads: H, attention heads of the queries.
      ffn_dim: F.
      prosody: of a multi-stream LM only.
      kv_heads: G, heads of keys and values, each shared by H / G query heads; 0: H.
      head_width: Dh, width of a head; 0: D / H.
      embed_dim: E, width of the token embeddings if it is not D; they are then projected to D, and the hidden states
        to E. 0: D.
      norm: "layer" or "rms".
      norm_eps: added to the variance.
      pre_norm: normalise the inputs of attention, feed-forward and output; False: the sums after the first two.
      positions: "sinusoidal"; "learned": a table of `max_positions` rows; "rotary": queries and keys are rotated.
      max_positions: rows of the learned table.
      rope_theta, rope_scaling: base of the rotary frequencies, and their change for longer contexts.
      qkv_bias, out_bias, ffn_bias: whether these kernels have biases.
      activation: "relu", "gelu" (exact), or "swiglu", which has a third feed-forward kernel, `ffn_gate`.
      tied: the output weights are the token embeddings. Multi-stream LMs always have separate ones.
      scale_embedding: multiply token embeddings by sqrt(D).
      absent: tokens that the LM was not trained with (specials that an imported LM lacks); they get no probability.
    """

    vocab_size: int = 104
    dim: int = 1024
    layers: int = 12
    heads: int = 16
    ffn_dim: int = 4096
    prosody: ProsodyConfig | None = None
    kv_heads: int = 0
    head_width: int = 0
    embed_dim: int = 0
    norm: str = "layer"
    norm_eps: float = 1e-5
    pre_norm: bool = True
    positions: str = "sinusoidal"
    max_positions: int = 0
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    ffn_bias: bool = True
    activation: str = "relu"
    tied: bool = True
    scale_embedding: bool = True
    absent: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.prosody, Mapping):  # from a config file or JSON
            object.__setattr__(self, "prosody", ProsodyConfig(**self.prosody))
        if isinstance(self.rope_scaling, Mapping):
            if not {"kind", "factor"} <= self.rope_scaling.keys() <= _SCALING:
                raise ValueError(
                    f"rope_scaling is {dict(self.rope_scaling)!r:.200}, must have kind and factor, and may have "
                    f"{', '.join(sorted(_SCALING - {'kind', 'factor'}))}"
                )
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        object.__setattr__(self, "absent", tuple(self.absent))
        for name in SIZES:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"unit LM: {name} is {value!r:.80}, must be a positive integer")
        self._check_block()
        # One form for one architecture, since configs are compared and hashed.
        object.__setattr__(self, "absent", tuple(sorted(set(self.absent))))
        if self.head_width * self.heads == self.dim:
            object.__setattr__(self, "head_width", 0)
        for name, usual in (("kv_heads", self.heads), ("embed_dim", self.dim)):
            if getattr(self, name) == usual:
                object.__setattr__(self, name, 0)
        for name in ("norm_eps", "rope_theta"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not self.head_width and self.dim % self.heads:
            raise ValueError(f"unit LM: dim {self.dim} is not a multiple of heads {self.heads}")
        if self.heads % self.key_heads:
            raise ValueError(f"unit LM: heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.positions == "sinusoidal" and (self.dim % 2 or self.dim < 4):
            raise ValueError(f"unit LM: dim {self.dim} must be even and at least 4, for sinusoidal positions")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"unit LM: heads of width {self.head_dim} must be of even width, for rotary positions")
        if (self.positions == "learned") != (self.max_positions > 0):
            raise ValueError(
                f"unit LM: max_positions is {self.max_positions}, must be positive for learned positions and 0 for "
                f"others (positions is {self.positions!r})"
            )
        if self.positions != "rotary" and (self.rope_scaling, self.rope_theta) != (None, _DEFAULTS["rope_theta"]):
            raise ValueError(
                f"unit LM: rope_theta or rope_scaling is set, but positions is {self.positions!r}; they must be left "
                "out for positions that are not rotary"
            )
        if self.prosody is not None and self.embed_dim:
            raise ValueError(f"unit LM: embed_dim is {self.embed_dim}, must be 0 for a multi-stream LM")
        if self.vocab_size <= vocab.UNIT_OFFSET:
            raise ValueError(
                f"unit LM: vocab_size {self.vocab_size} leaves no units besides {vocab.UNIT_OFFSET} specials"
            )

    def _check_block(self) -> None:
        """Raise ValueError for a field of the block of a wrong type or value."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"unit LM: {name} is {getattr(self, name)!r}, must be one of {', '.join(choices)}")
        for name in BLOCK:
            value, default = getattr(self, name), _DEFAULTS[name]
            if isinstance(default, bool):
                if not isinstance(value, bool):
                    raise ValueError(f"unit LM: {name} is {value!r}, must be true or false")
            elif isinstance(default, int) and (type(value) is not int or value < 0):
                raise ValueError(f"unit LM: {name} is {value!r}, must be an integer of at least 0")
            elif isinstance(default, float) and (type(value) not in (int, float) or not 0 < value <= _LARGEST):
                raise ValueError(f"unit LM: {name} is {value!r:.80}, must be a positive number")
        if not all(type(token) is int and 0 <= token < vocab.UNIT_OFFSET for token in self.absent):
            raise ValueError(f"unit LM: absent is {self.absent}, must be tokens of 0..{vocab.UNIT_OFFSET - 1}")

    @property
    def head_dim(self) -> int:
        """Dh, width of an attention head."""
        return self.head_width or self.dim // self.heads

    @property
    def key_heads(self) -> int:
        """G, heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def kernels(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of every kernel of a layer."""
        d, f, queries, keys = self.dim, self.ffn_dim, self.heads * self.head_dim, self.key_heads * self.head_dim
        found = {"query": (d, queries), "key": (d, keys), "value": (d, keys), "out": (queries, d), "ffn_in": (d, f)}
        return {**found, "ffn_out": (f, d), **({"ffn_gate": (d, f)} if self.activation == "swiglu" else {})}

    def has_bias(self, kernel: str) -> bool:
        """Whether a kernel of a layer has a bias."""
        return self.ffn_bias if kernel.startswith("ffn") else self.out_bias if kernel == "out" else self.qkv_bias

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by path, as docs/design.md lists them."""
        stack, d, width = self.layers, self.dim, self.embed_dim or self.dim
        norm = ("scale", "bias") if self.norm == "layer" else ("scale",)
        shapes: dict[str, tuple[int, ...]] = {"embed": (self.vocab_size, width)}
        for name, (rows, columns) in self.kernels.items():
            shapes[f"layers/{name}/kernel"] = (stack, rows, columns)
            if self.has_bias(name):
                shapes[f"layers/{name}/bias"] = (stack, columns)
        for part in norm:
            shapes[f"layers/attn_norm/{part}"] = shapes[f"layers/ffn_norm/{part}"] = (stack, d)
            if self.pre_norm:
                shapes[f"final_norm/{part}"] = (d,)
        if self.max_positions:
            shapes["positions"] = (self.max_positions, d)
        if self.embed_dim:
            shapes |= {"embed_in/kernel": (width, d), "embed_out/kernel": (d, width)}
        if not self.tied or self.prosody is not None:
            shapes["heads/unit"] = (self.vocab_size, width)
        if self.prosody is None:
            return shapes
        for name, symbols in zip(("duration", "f0"), self.prosody.symbols, strict=True):
            shapes[f"heads/{name}"] = (symbols, d)
            if self.prosody.discrete:
                shapes[f"streams/{name}/embed"] = (symbols, d)
            else:
                shapes[f"streams/{name}/kernel"], shapes[f"streams/{name}/bias"] = (1, d), (d,)
        return shapes

    @property
    def block(self) -> dict[str, Any]:
        """Fields after `prosody` that differ from GSLM's, as JSON has them."""
        found = {name: value for name, value in dataclasses.asdict(self).items() if name in BLOCK}
        changed = {name: value for name, value in found.items() if value != _DEFAULTS[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}

    @property
    def num_units(self) -> int:
        """Number of units, without specials."""
        return self.vocab_size - vocab.UNIT_OFFSET

    @property
    def most_units(self) -> int | None:
        """Longest utterance that the learned positions have room for, with separators and labels; None: any."""
        return max(self.max_positions - TAIL, 1) if self.max_positions else None

    @property
    def embed_scale(self) -> float:
        """Factor of token embeddings and separators."""
        return float(self.dim**0.5) if self.scale_embedding else 1.0

    @property
    def opener(self) -> int:
        """First token of a sequence."""
        return vocab.BOS if self.prosody else vocab.EOS

    @property
    def first_position(self) -> int:
        """Row of the sinusoidal table for the first token: the one after PAD, which in pGSLM follows the units."""
        return vocab.FIRST_POSITION + (self.num_units if self.prosody else 0)

    @property
    def num_params(self) -> int:
        """Number of parameters, a tied output embedding counted once."""
        return sum(map(math.prod, self.shapes.values()))


TAIL = 64  # positions kept for separators and label steps; jobs check that they fit
SIZES = ("vocab_size", "dim", "layers", "heads", "ffn_dim")
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(UnitLMConfig)}
BLOCK = tuple(name for name in _DEFAULTS if name not in (*SIZES, "prosody"))
_CHOICES = {
    "norm": ("layer", "rms"),
    "positions": ("sinusoidal", "learned", "rotary"),
    "activation": ("relu", "gelu", "swiglu"),
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """Numerical settings of the computation, independent of the weights.

    Attributes:
      dtype: dtype of matmul operands, "float32" or "bfloat16"; accumulation, LayerNorm, softmax, residuals and loss are
        always float32.
      remat: rematerialise the activations of a layer in the backward pass.
    """

    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute dtype is {self.dtype!r}, must be float32 or bfloat16")

    @property
    def operand(self) -> jnp.dtype:
        """`dtype` as a jnp.dtype."""
        return jnp.dtype(self.dtype)
