"""Hidden states of the frozen LM at an utterance's columns, for the linear probe and data-dependent prompt inits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spjax.data import loader
from spjax.data.plan import Step
from spjax.data.unit_set import UnitSet
from spjax.models import streams, unit_lm
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.split_kernel import gathered
from spjax.training import sharding
from spjax.types import KV, Batch, Params, Streams


def pooled_states(
    lm: Params, config: UnitLMConfig, units: UnitSet, plan: Sequence[Step], mesh: Mesh, compute: Compute
) -> np.ndarray:
    """Mean over units of the output of each layer, float32 [L, n, D]; NaN for utterances that are not in the plan.

    Args:
      lm: LM weights on devices, from `sharding.layerwise`.
      config: LM architecture.
      units: the split, n utterances.
      plan: unshuffled plan over the split for one member.
      mesh: device mesh.
      compute: operand dtype.
    """
    return _by_utterance(_means(config, compute), lm, config.layers, config, units, plan, mesh)


@functools.lru_cache(maxsize=8)
def _means(config: UnitLMConfig, compute: Compute) -> Callable[[Params, Batch], jax.Array]:
    """Cached, so that all splits and tasks share compiled programs."""

    def run(lm: Params, batch: Batch) -> jax.Array:
        return _layers(lm, config, batch, compute, lambda before, after, weights: _mean(after, batch))

    return run


def layer_inputs(
    lm: Params,
    config: UnitLMConfig,
    units: UnitSet,
    plan: Sequence[Step],
    mesh: Mesh,
    compute: Compute,
    columns: np.ndarray,
    deep: bool = True,
) -> np.ndarray:
    """Inputs of the key and value projections at one column of each utterance: float32 [L, n, D].

    Args:
      lm, config, units, plan, mesh, compute: see `pooled_states`.
      columns: int [n]; 0: the opening token, i: the i-th unit, -1: the mean over all units.
      deep: False returns the embedded columns with positions instead, [1, n, D].
    """
    table = jnp.asarray(columns)

    def run(lm: Params, batch: Batch) -> jax.Array:
        column = table[jnp.maximum(batch.index, 0)][:, None, None]  # padding rows have index -1

        def read(x: jax.Array) -> jax.Array:
            one = jnp.take_along_axis(x, jnp.maximum(column, 0), axis=1)[:, 0]
            return jnp.where(column[:, 0] < 0, _mean(x, batch), one)

        if not deep:
            return read(_embedded(lm, config, batch))[:, None]
        return _layers(
            lm, config, batch, compute, lambda x, _, weights: read(unit_lm.attention_input(x, weights, config))
        )

    return _by_utterance(run, lm, config.layers if deep else 1, config, units, plan, mesh)


def _by_utterance(
    run: Callable[[Params, Batch], jax.Array],
    lm: Params,
    layers: int,
    config: UnitLMConfig,
    units: UnitSet,
    plan: Sequence[Step],
    mesh: Mesh,
) -> np.ndarray:
    """Collect `run`'s [B, layers, D] over all batches as [layers, n, D]; NaN for utterances not in the plan."""
    run = jax.jit(run)
    found = np.full((layers, len(units), config.dim), np.nan, np.float32)
    for batch in loader.prefetch(loader.batches(units, plan, *sharding.local_shards(mesh))):
        rows = sharding.shard_rows(mesh, batch)
        states, index = sharding.fetch((run(lm, rows), rows.index))
        found[:, index[index >= 0]] = states.swapaxes(0, 1)[:, index >= 0]
    return found


def _mean(x: jax.Array, batch: Batch) -> jax.Array:
    """Mean of [B, T + 1, D] over the columns of the batch's units, [B, D]."""
    columns = jnp.arange(x.shape[1])
    pooled = (columns >= 1) & (columns <= batch.source_length[:, None])
    return jnp.sum(jnp.where(pooled[..., None], x, 0), axis=1) / jnp.sum(pooled, axis=1, keepdims=True)


def _embedded(lm: Params, config: UnitLMConfig, batch: Batch) -> jax.Array:
    """Input of the first layer for the opening token and all units, float32 [B, T + 1, D]."""
    columns = jnp.arange(batch.source.shape[1] + 1)
    length = batch.source_length[:, None]

    def appended(source: jax.Array, last: jax.Array) -> jax.Array:
        """Insert the last unit's column after the others."""
        return jnp.where(columns == length, last[:, None], jnp.pad(source, ((0, 0), (0, 1))))

    lagged = None
    if batch.streams is not None:
        lagged = Streams(*(appended(known[:, :-2], known[:, -2]) for known in batch.streams))
    x = unit_lm.embed_tokens(lm, appended(batch.source, batch.last), scaled=config.scale_embedding)
    return x + streams.embed(lm, config, lagged) + unit_lm.embed_positions(lm, config, columns, len(columns))


def _layers(
    lm: Params,
    config: UnitLMConfig,
    batch: Batch,
    compute: Compute,
    read: Callable[[jax.Array, jax.Array, Params], jax.Array],
) -> jax.Array:
    """Apply `read` (input, output, weights -> [B, D]) to every layer: [B, L, D]."""
    embedded = _embedded(lm, config, batch)
    length = embedded.shape[1]
    seen = jnp.tril(jnp.ones((1, length, length), bool))
    empty = unit_lm.empty_prefix(config)
    block, turn = unit_lm.Block(config, compute), unit_lm.rotation(config, jnp.arange(length)[None])

    def layer(x: jax.Array, weights: Params) -> tuple[jax.Array, jax.Array]:
        full = gathered(weights)
        prefix = KV(empty.key[0], empty.value[0])
        after, _ = block.apply({"params": full}, (x,), prefix, seen, length, rotation=turn)
        return after, read(x, after, full)

    return jnp.swapaxes(jax.lax.scan(layer, embedded, lm["layers"])[1], 0, 1)
