"""Configuration of a unit LM. The defaults are fairseq's GSLM model `hubert100_lm`: 151,263,232 parameters."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import jax.numpy as jnp

from spjax import vocab


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
        if not all(isinstance(edge, int | float) and math.isfinite(edge) for edge in edges):
            raise ValueError(f"prosody: f0_edges {edges} must be finite numbers")
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
class UnitLMConfig:
    """Architecture of a unit LM."""

    vocab_size: int = 104  # V, specials included
    dim: int = 1024  # D
    layers: int = 12  # L
    heads: int = 16  # H
    ffn_dim: int = 4096  # F
    prosody: ProsodyConfig | None = None  # multi-stream LMs only

    def __post_init__(self) -> None:
        if isinstance(self.prosody, Mapping):  # from a config file or JSON
            object.__setattr__(self, "prosody", ProsodyConfig(**self.prosody))
        for name in SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"unit LM: {name} is {value!r}, must be a positive integer")
        if self.dim % self.heads:
            raise ValueError(f"unit LM: dim {self.dim} is not a multiple of heads {self.heads}")
        if self.dim % 2 or self.dim < 4:
            raise ValueError(f"unit LM: dim {self.dim} must be even and at least 4, for sinusoidal positions")
        if self.vocab_size <= vocab.UNIT_OFFSET:
            raise ValueError(
                f"unit LM: vocab_size {self.vocab_size} leaves no units besides {vocab.UNIT_OFFSET} specials"
            )

    @property
    def head_dim(self) -> int:
        """Dh, width of an attention head."""
        return self.dim // self.heads

    @property
    def num_units(self) -> int:
        """Number of units, without specials."""
        return self.vocab_size - vocab.UNIT_OFFSET

    @property
    def opener(self) -> int:
        """First token of a sequence."""
        return vocab.BOS if self.prosody else vocab.EOS

    @property
    def first_position(self) -> int:
        """Row of the position table for the first token: the one after PAD, which in pGSLM follows the units."""
        return vocab.FIRST_POSITION + (self.num_units if self.prosody else 0)

    @property
    def num_params(self) -> int:
        """Number of parameters, a tied output embedding counted once."""
        d, f = self.dim, self.ffn_dim
        block = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 4 * d
        plain = self.vocab_size * d + self.layers * block + 2 * d
        if self.prosody is None:
            return plain
        streams = sum(self.prosody.symbols) if self.prosody.discrete else 4  # tables, or kernels and biases
        return plain + (streams + self.vocab_size + sum(self.prosody.symbols)) * d


SIZES = tuple(field.name for field in dataclasses.fields(UnitLMConfig) if field.name != "prosody")


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
