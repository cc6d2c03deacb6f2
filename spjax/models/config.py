"""Sizes of a unit language model. The defaults are GSLM's `hubert100_lm` (FACTS.md): 151,263,232 parameters."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import jax.numpy as jnp

from spjax import vocab


@dataclasses.dataclass(frozen=True)
class ProsodyConfig:
    """The streams beside the units of a multi-stream LM (pGSLM): how long a unit lasts, and its f0.

    Attributes:
      discrete: tables of symbols and their likelihoods, as against linear maps of the raw number and a number foretold.
      duration_input: the LM is told durations; without, it is told 0 in their place (but still foretells them).
      f0_input: likewise of f0.
      max_duration: frames; of a discrete LM, that a longer unit counts as.
      f0_edges: log f0 less the speaker's mean, in rising order, between the bins of a discrete LM; a continuous one has
        none.
      interpolate_f0: unvoiced segments between voiced ones are told the f0 (Hz) that lies between theirs, as the
        published pGSLMs were; without, 0, as those before and behind.
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
            raise ValueError(f"prosody: f0_edges {edges} must be in rising order")
        if edges and not self.discrete:
            raise ValueError("prosody: a continuous LM has no f0_edges")

    @property
    def symbols(self) -> tuple[int, int]:
        """Outputs of the duration stream and of the f0 stream: values, then the four specials; 1 where continuous."""
        if not self.discrete:
            return 1, 1
        return self.max_duration + 1 + vocab.UNIT_OFFSET, len(self.f0_edges) + 1 + vocab.UNIT_OFFSET


@dataclasses.dataclass(frozen=True)
class UnitLMConfig:
    """Architecture of a unit LM: everything that its weights depend on."""

    vocab_size: int = 104  # V, specials included
    dim: int = 1024  # D
    layers: int = 12  # L
    heads: int = 16  # H
    ffn_dim: int = 4096  # F
    prosody: ProsodyConfig | None = None  # of a multi-stream LM

    def __post_init__(self) -> None:
        if isinstance(self.prosody, Mapping):  # as a config file or JSON has it
            object.__setattr__(self, "prosody", ProsodyConfig(**self.prosody))
        for name in SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"unit LM: {name} is {value!r}, must be a positive integer")
        if self.dim % self.heads:
            raise ValueError(f"unit LM: dim {self.dim} is no multiple of heads {self.heads}")
        if self.dim % 2 or self.dim < 4:
            raise ValueError(f"unit LM: dim {self.dim} must be even and at least 4, half of it sines and half cosines")
        if self.vocab_size <= vocab.UNIT_OFFSET:
            raise ValueError(
                f"unit LM: vocab_size {self.vocab_size} leaves no units beside {vocab.UNIT_OFFSET} specials"
            )

    @property
    def head_dim(self) -> int:
        """Dh."""
        return self.dim // self.heads

    @property
    def num_units(self) -> int:
        """Units in the vocabulary, specials apart."""
        return self.vocab_size - vocab.UNIT_OFFSET

    @property
    def opener(self) -> int:
        """Token that a sequence starts with."""
        return vocab.BOS if self.prosody else vocab.EOS

    @property
    def first_position(self) -> int:
        """Row of the position table that the first token takes: behind PAD's, which pGSLM numbers after the units."""
        return vocab.FIRST_POSITION + (self.num_units if self.prosody else 0)

    @property
    def num_params(self) -> int:
        """Weights of the model, a tied output counted once."""
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
    """How a unit LM is computed; changes no weights.

    Attributes:
      dtype: type of the operands of matrix products, "float32" or "bfloat16"; sums, LayerNorm, softmax, residuals and
        loss are float32 either way.
      remat: recompute a layer's activations in the backward pass instead of keeping them.
    """

    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute dtype is {self.dtype!r}, must be float32 or bfloat16")

    @property
    def operand(self) -> jnp.dtype:
        """The operand type as JAX knows it."""
        return jnp.dtype(self.dtype)
