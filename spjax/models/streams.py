"""What a multi-stream LM (pGSLM) has in front of the unit LM's blocks and behind them; docs/design.md, Prosody.

Streams come and go raw: frames, and log f0. A discrete LM looks them up in tables, a continuous one maps the numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spjax import vocab
from spjax.models.config import Compute, ProsodyConfig, UnitLMConfig
from spjax.models.contract import contract
from spjax.types import Params, Streams

NO_SPEECH = Streams(np.int32(0), np.float32(vocab.F0_BOS))  # goes with separators and labels, as with the opener
_CONTINUOUS_PAD, _CONTINUOUS_BOS = -5.0, 0.0  # f0 that a continuous LM is told where there is no segment


def init(rng: jax.Array, config: UnitLMConfig) -> Params:
    """Fresh "streams" and "heads"; nothing for a unit LM. Tables start as that of units, which alone is then scaled."""
    if config.prosody is None:
        return {}
    d, sizes = config.dim, config.prosody.symbols
    keys = iter(jax.random.split(rng, 5))

    def table(rows: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, d)) * d**-0.5

    def front(size: int) -> Params:
        if config.prosody is not None and config.prosody.discrete:
            return {"embed": table(size)}
        return {"kernel": table(1), "bias": jnp.zeros(d)}

    streams = {"duration": front(sizes[0]), "f0": front(sizes[1])}
    heads = {"unit": table(config.vocab_size), "duration": table(sizes[0]), "f0": table(sizes[1])}
    return {"streams": streams, "heads": heads}


def embed(params: Params, config: UnitLMConfig, streams: Streams | None) -> jax.Array:
    """What the streams add to their columns' units, float32 [..., D]; of a unit LM a zero.

    An input that the LM is not told (the "no prosody" kinds) is 0 everywhere: bin 0's row, or the bias.

    Args:
      params: the LM's weights.
      config: its architecture.
      streams: [...] each; not looked at where the LM has none.

    Raises:
      ValueError: a multi-stream LM is given none.
    """
    prosody = config.prosody
    if prosody is None:
        return jnp.zeros(())
    if streams is None:
        raise ValueError(
            "a multi-stream LM wants durations and f0 beside the units: make batches of sets that have both"
        )
    told = symbols(prosody, streams)
    told = Streams(
        told.duration if prosody.duration_input else jnp.zeros_like(told.duration),
        told.f0 if prosody.f0_input else jnp.zeros_like(told.f0),
    )
    return _look_up(params["streams"]["duration"], told.duration) + _look_up(params["streams"]["f0"], told.f0)


def symbols(prosody: ProsodyConfig, streams: Streams) -> Streams:
    """Raw streams as the LM takes them, [...] each: int32 rows of its tables, or float32 where it is continuous.

    Values come first in a table, then `<s> <pad> </s> <unk>`; an f0 falls into the bin behind all edges below it.
    """
    duration, f0 = jnp.asarray(streams.duration), jnp.asarray(streams.f0)
    if not prosody.discrete:
        f0 = jnp.where(f0 == vocab.F0_PAD, _CONTINUOUS_PAD, jnp.where(f0 == vocab.F0_BOS, _CONTINUOUS_BOS, f0))
        return Streams(duration.astype(jnp.float32), f0)
    edges = jnp.asarray(prosody.f0_edges, jnp.float32)
    value = jnp.sum(f0[..., None] > edges, axis=-1)
    bins = len(prosody.f0_edges) + 1
    special = jnp.where(f0 == vocab.F0_PAD, bins + vocab.PAD, bins + vocab.BOS)
    return Streams(jnp.clip(duration, 0, prosody.max_duration), jnp.where(jnp.isinf(f0), special, value))


def _look_up(part: Params, told: jax.Array) -> jax.Array:
    if "embed" in part:
        return part["embed"][told].astype(jnp.float32)
    return told[..., None] * part["kernel"][0] + part["bias"]


def heads(params: Params, hidden: jax.Array, compute: Compute) -> Streams:
    """What a multi-stream LM foretells of its streams: float32 [B, Q, symbols], or [B, Q, 1] where continuous.

    Args:
      params: the LM's weights.
      hidden: float32 [B, Q, D], after the final norm.
      compute: operand type.
    """
    return Streams(
        *(contract("bqd,vd->bqv", hidden, params["heads"][name], compute.operand) for name in Streams._fields)
    )


def losses(prosody: ProsodyConfig, foretold: Streams, targets: Streams) -> Streams:
    """Loss of each column's streams, float32 [B, Q] each: negative log likelihood, or |difference| where continuous.

    Args:
      prosody: the LM's.
      foretold: as `heads` gives them.
      targets: raw, [B, Q] each; a column whose f0 is no number has no target, and its loss is 0.
    """
    real = jnp.isfinite(targets.f0)
    wanted = symbols(prosody, Streams(targets.duration, jnp.where(real, targets.f0, 0)))

    def one(said: jax.Array, want: jax.Array) -> jax.Array:
        if prosody.discrete:
            each = optax.softmax_cross_entropy_with_integer_labels(said, want)
        else:
            each = jnp.abs(said[..., 0] - want)
        return jnp.where(real, each, 0)

    return Streams(one(foretold.duration, wanted.duration), one(foretold.f0, wanted.f0))
