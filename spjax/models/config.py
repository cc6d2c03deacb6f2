"""Sizes of a unit language model. The defaults are GSLM's `hubert100_lm` (FACTS.md): 151,263,232 parameters."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from spjax import vocab


@dataclasses.dataclass(frozen=True)
class UnitLMConfig:
    """Architecture of a unit LM: everything that its weights depend on."""

    vocab_size: int = 104  # V, specials included
    dim: int = 1024  # D
    layers: int = 12  # L
    heads: int = 16  # H
    ffn_dim: int = 4096  # F

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"unit LM: {field.name} is {value!r}, must be a positive integer")
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
    def num_params(self) -> int:
        """Weights of the model, the tied output counted once."""
        d, f = self.dim, self.ffn_dim
        block = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 4 * d
        return self.vocab_size * d + self.layers * block + 2 * d


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
