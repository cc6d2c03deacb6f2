"""Load a unit LM and prompt packs into memory."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spjax.io import packs, unit_lms
from spjax.io.packs import PromptPack
from spjax.models import unit_lm
from spjax.models.config import UnitLMConfig
from spjax.types import Params, Streams


@dataclasses.dataclass(frozen=True, eq=False)
class UnitLM:
    """A unit LM in memory.

    Attributes:
      config: architecture.
      params: weights (docs/design.md, Parameters), float32.
      hash: identifies the LM; a prompt pack stores the hash of its LM.
    """

    config: UnitLMConfig
    params: Params
    hash: str

    def logits(self, tokens: Any, streams: Streams | None = None) -> np.ndarray:
        """Logits over the vocabulary.

        Args:
          tokens: int [B, T], right-padded with 1.
          streams: [B, T] each, for a multi-stream LM; they lag a column behind the tokens (docs/design.md, Prosody).

        Returns:
          float32 [B, T, V]; -1e9 for specials that an imported LM was not trained with (`config.absent`).

        Raises:
          ValueError: not [B, T], a token outside the vocabulary, more columns than learned positions, or a multi-stream
            LM without streams.
        """
        try:
            tokens = np.asarray(tokens)
        except ValueError as error:
            raise ValueError("tokens must be int [B, T]: rows differ in length, pad them with 1") from error
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be int [B, T], not {tokens.dtype} {list(tokens.shape)}")
        if not tokens.size:
            return np.zeros((*tokens.shape, self.config.vocab_size), np.float32)
        if not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise ValueError(
                f"tokens are in {tokens.min()}..{tokens.max()}, must be in 0..{self.config.vocab_size - 1}"
            )
        if tokens.shape[1] > (self.config.max_positions or tokens.shape[1]):
            raise ValueError(
                f"tokens have {tokens.shape[1]} columns, the LM {self.config.max_positions} positions: cut them"
            )
        if streams is not None and any(np.shape(one) != tokens.shape for one in streams):
            raise ValueError(f"streams must be {list(tokens.shape)} each, like the tokens")
        return np.asarray(_logits(self.params, self.config, jnp.asarray(tokens), streams=streams))


_logits = jax.jit(unit_lm.logits, static_argnums=1)


def load_unit_lm(path: str | os.PathLike[str]) -> UnitLM:
    """Load a unit LM from a directory (written by `python -m spjax.convert unit_lm` or by pretraining), or "tiny".

    Raises:
      StorageError: the files are damaged, incomplete or of a newer format.
    """
    config, params, info = unit_lms.read_unit_lm(os.fspath(path))
    return UnitLM(config, jax.tree.map(jnp.asarray, params), info["hash"])  # on the device once, not at every call


def load_prompt(path: str | os.PathLike[str]) -> PromptPack:
    """Load a prompt pack from its directory.

    Raises:
      StorageError: the files are damaged, incomplete or of a newer format.
    """
    return packs.load_pack(os.fspath(path))
