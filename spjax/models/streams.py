"""Input embeddings and output heads of a multi-stream LM's duration and f0 streams (pGSLM; docs/design.md, Prosody).

Streams are passed as frames and log f0. A discrete LM quantises and embeds them, a continuous one projects the numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Key

from spjax import vocab
from spjax.models.config import Compute, ProsodyConfig, UnitLMConfig
from spjax.models.einsum import einsum
from spjax.types import Params, Streams

NO_SPEECH = Streams(np.int32(0), np.float32(vocab.F0_BOS))  # input streams of separators, labels and the opening token
_CONTINUOUS_PAD, _CONTINUOUS_BOS = -5.0, 0.0  # f0 inputs of a continuous LM without a segment


def init(rng: Key[jax.Array, ""], config: UnitLMConfig) -> Params:
    """Initialise "streams" and "heads"; {} for a unit LM. Tables are N(0, 1/D) like the unit embedding."""
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


def embed(params: Params, config: UnitLMConfig, streams: Streams | None) -> Float[jax.Array, ...]:
    """Sum of the stream embeddings of each column, float32 [..., D]; a scalar zero for a unit LM.

    A stream that is disabled as input (`duration_input`, `f0_input`) is 0 everywhere: row 0 of its table, or the bias.

    Args:
      params: LM weights.
      config: LM architecture.
      streams: [...] each; ignored by a unit LM.

    Raises:
      ValueError: a multi-stream LM without `streams`.
    """
    prosody = config.prosody
    if prosody is None:
        return jnp.zeros(())
    if streams is None:
        raise ValueError("a multi-stream LM needs durations and f0 besides units: use unit sets that have both")
    inputs = symbols(prosody, streams)
    inputs = Streams(
        inputs.duration if prosody.duration_input else jnp.zeros_like(inputs.duration),
        inputs.f0 if prosody.f0_input else jnp.zeros_like(inputs.f0),
    )
    return _embed(params["streams"]["duration"], inputs.duration) + _embed(params["streams"]["f0"], inputs.f0)


def symbols(prosody: ProsodyConfig, streams: Streams) -> Streams:
    """Convert raw streams to LM inputs, [...] each: int32 table rows (discrete) or float32 (continuous).

    A table has a row for each value, then `<s> <pad> </s> <unk>`. The bin of an f0 is the number of edges below it.
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


def _embed(part: Params, symbol: jax.Array) -> jax.Array:
    if "embed" in part:
        return part["embed"][symbol].astype(jnp.float32)
    return symbol[..., None] * part["kernel"][0] + part["bias"]


def heads(params: Params, hidden: Float[jax.Array, "B Q D"], compute: Compute) -> Streams:
    """Predict the streams: logits, float32 [B, Q, symbols], or values [B, Q, 1] of a continuous LM.

    Args:
      params: LM weights.
      hidden: float32 [B, Q, D], after the final norm.
      compute: operand dtype.
    """
    return Streams(*(einsum("bqd,vd->bqv", hidden, params["heads"][name], compute.operand) for name in Streams._fields))


def losses(prosody: ProsodyConfig, predicted: Streams, targets: Streams) -> Streams:
    """Loss of each column's streams, float32 [B, Q] each: negative log likelihood, or absolute error if continuous.

    Args:
      prosody: stream settings of the LM.
      predicted: output of `heads`.
      targets: raw streams, [B, Q] each. Columns without a target have a non-finite f0; their loss is 0.
    """
    real = jnp.isfinite(targets.f0)
    wanted = symbols(prosody, Streams(targets.duration, jnp.where(real, targets.f0, 0)))

    def loss(output: jax.Array, target: jax.Array) -> jax.Array:
        if prosody.discrete:
            each = optax.softmax_cross_entropy_with_integer_labels(output, target)
        else:
            each = jnp.abs(output[..., 0] - target)
        return jnp.where(real, each, 0)

    return Streams(loss(predicted.duration, wanted.duration), loss(predicted.f0, wanted.f0))
