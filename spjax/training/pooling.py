"""Hidden states of the frozen LM pooled over an utterance: what the linear probe takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spjax.data import loader
from spjax.data.plan import Step
from spjax.data.unit_set import UnitSet
from spjax.models import streams, unit_lm
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.split_kernel import gathered
from spjax.training import sharding
from spjax.types import KV, Batch, Params, Streams


def pooled_states(
    lm: Params, config: UnitLMConfig, units: UnitSet, plan: Sequence[Step], mesh: Any, compute: Compute
) -> np.ndarray:
    """Mean hidden state of each utterance's units behind each layer, float32 [L, n, D]; NaN where the plan has none.

    Args:
      lm: the LM's weights on the devices, as `sharding.layerwise` gives them.
      config: its architecture.
      units: the split, n utterances.
      plan: an unshuffled plan over it for one member.
      mesh: of the devices.
      compute: operand type.
    """
    run = jax.jit(lambda lm, batch: _means(lm, config, batch, compute))
    found = np.full((config.layers, len(units), config.dim), np.nan, np.float32)
    for batch in loader.prefetch(loader.batches(units, plan, *sharding.own_rows(mesh))):
        rows = sharding.shard_rows(mesh, batch)
        means, index = sharding.fetch((run(lm, rows), rows.index))
        found[:, index[index >= 0]] = means.swapaxes(0, 1)[:, index >= 0]
    return found


def _means(lm: Params, config: UnitLMConfig, batch: Batch, compute: Compute) -> jax.Array:
    """float32 [B, L, D] of a batch, rows first so that devices keep theirs."""
    columns = jnp.arange(batch.source.shape[1] + 1)
    length = batch.source_length[:, None]

    def appended(source: jax.Array, last: jax.Array) -> jax.Array:
        """The last unit's column right behind the others."""
        return jnp.where(columns == length, last[:, None], jnp.pad(source, ((0, 0), (0, 1))))

    beside = None
    if batch.streams is not None:
        beside = Streams(*(appended(known[:, :-2], known[:, -2]) for known in batch.streams))
    table = jnp.asarray(unit_lm.sinusoids(config.first_position + len(columns), config.dim))[config.first_position :]
    x = unit_lm.embed_tokens(lm, appended(batch.source, batch.last)) + streams.embed(lm, config, beside) + table
    pooled = (columns >= 1) & (columns <= length)
    seen = jnp.tril(jnp.ones((1, len(columns), len(columns)), bool))
    empty = unit_lm.empty_prefix(config)
    block = unit_lm.Block(config, compute)

    def layer(x: jax.Array, weights: Params) -> tuple[jax.Array, jax.Array]:
        params = {"params": gathered(weights)}
        x, _ = block.apply(params, (x,), KV(empty.key[0], empty.value[0]), seen, len(columns))
        return x, jnp.sum(jnp.where(pooled[..., None], x, 0), axis=1) / jnp.sum(pooled, axis=1, keepdims=True)

    return jnp.swapaxes(jax.lax.scan(layer, x, lm["layers"])[1], 0, 1)
