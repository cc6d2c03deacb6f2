"""Prompt and unit LM together: a batch laid out in columns (docs/design.md), its label steps scored.

Columns are `source | shallow prompt | tail`. Masks and positions are explicit, so the order in memory is free: the
source depends on no trained vector and stands apart from the live columns, for which alone the first layer computes
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spjax.models import low_rank, prompts, streams, unit_lm
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.contract import contract
from spjax.models.low_rank import Lora
from spjax.models.unit_lm import FLOAT32
from spjax.types import KV, Batch, Params, Streams

_LIVE = 1 << 24  # number of the first live column, beyond any source


class Prefilled(NamedTuple):
    """What decoding goes on from.

    Attributes:
      hidden: float32 [B, Q, D], final hidden states of the last Q tail columns.
      cache: KV of all C columns so far, prefix included, in blocks: nothing is copied to put more behind them.
      visible: bool [B, C], columns that a later column may see.
      position: int32 [B], row of the position table that the next column takes.
      lora: low-rank adapters of the rows, without dropout.
    """

    hidden: jax.Array
    cache: tuple[KV, ...]
    visible: jax.Array
    position: jax.Array
    lora: Lora = low_rank.NONE


def run(
    lm: Params,
    bank: Params,
    batch: Batch,
    feeds: jax.Array,
    *,
    config: UnitLMConfig,
    queries: int,
    compute: Compute = FLOAT32,
    lengths: Sequence[int] | None = None,
    drop: tuple[jax.Array, float | jax.Array] | None = None,
) -> Prefilled:
    """Run a batch behind its prompts.

    Args:
      lm: the LM's weights.
      bank: prompt trees [N, ...], `low_rank.scaled`.
      batch: B utterances of T source columns.
      feeds: int32 [B, J], labels fed back behind the separators, as tokens; J may be 0.
      config: the LM's architecture.
      queries: Q, how many of the last tail columns (1 + S + J of them) to compute.
      compute: operand type and remat.
      lengths: [N], columns that each member's deep prompt really has, where they differ; the rest of its P is not seen.
      drop: random keys [B] and the rate of dropout in low-rank adapters, of all rows or [B] of each.

    Returns:
      Prefilled.
    """
    rows, length = batch.source.shape
    separators = bank["sep"].shape[1]
    tail = 1 + separators + feeds.shape[1]
    table = jnp.asarray(unit_lm.sinusoids(config.first_position + length + tail, config.dim))
    of_source, of_tail = _streams(batch, tail)

    source = unit_lm.embed_tokens(lm, batch.source) + streams.embed(lm, config, of_source)
    source = source + table[config.first_position :][:length]
    start = config.first_position + batch.source_length
    positions = start[:, None] + jnp.arange(tail)
    sep = prompts.rows_of(bank["sep"], batch.prompt_id, rows) * config.dim**0.5
    live = jnp.concatenate(
        [
            unit_lm.embed_tokens(lm, batch.last[:, None]),
            jnp.broadcast_to(sep, (rows, separators, config.dim)),
            unit_lm.embed_tokens(lm, feeds),
        ],
        axis=1,
    )
    live = live + streams.embed(lm, config, of_tail) + table[positions]
    shallow = bank["input"].shape[1] if "input" in bank else 0
    if shallow:
        # Raw: neither scaled nor given a position, as in the reference.
        raw = prompts.rows_of(bank["input"], batch.prompt_id, rows)
        live = jnp.concatenate([jnp.broadcast_to(raw, (rows, shallow, config.dim)), live], axis=1)

    steer = None
    if "sep_deep" in bank:
        steer = jnp.moveaxis(prompts.rows_of(bank["sep_deep"], batch.prompt_id, rows), 0, 1)
        steer = jnp.pad(steer, ((0, 0), (0, 0), (0, feeds.shape[1]), (0, 0)))

    prefix = prompts.prefix(bank, batch.prompt_id, lm, config, compute)
    real = jnp.arange(length) < batch.source_length[:, None]
    columns = prefix.key.shape[3]
    prompt = jnp.ones((rows, columns), bool)
    if lengths is not None:
        prompt = jnp.arange(columns) < prompts.rows_of(jnp.asarray(lengths), batch.prompt_id, rows)[:, None]
        prompt = jnp.broadcast_to(prompt, (rows, columns))
    mask, visible = _masks(real, shallow, tail, prompt)
    lora = whole = low_rank.of_bank(bank, batch.prompt_id)
    if drop is not None:
        # A column's number does not depend on how many others fill up the source.
        numbers = np.concatenate([np.arange(length), _LIVE + np.arange(shallow + tail)])
        lora = low_rank.with_dropout(whole, drop[0], jnp.asarray(numbers), drop[1])
    hidden, new = unit_lm.extend(
        lm, config, (source, live), prefix, mask, queries=queries, steer=steer, lora=lora, compute=compute
    )
    return Prefilled(hidden, (prefix, new), visible, positions[:, -1] + 1, whole)


def _streams(batch: Batch, tail: int) -> tuple[Streams | None, Streams | None]:
    """What goes with the source's columns and with the tail's, whose first separator has the last segment's prosody."""
    if batch.streams is None:
        return None, None
    length = batch.source.shape[1]
    beyond = lambda known, nothing: jnp.pad(known, ((0, 0), (0, tail - 2)), constant_values=nothing)  # noqa: E731
    of_tail = (
        beyond(known[:, length:], nothing) for known, nothing in zip(batch.streams, streams.NO_SPEECH, strict=True)
    )
    return Streams(*(known[:, :length] for known in batch.streams)), Streams(*of_tail)


def _masks(real: jax.Array, shallow: int, tail: int, prompt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Who sees whom: bool [B, T + shallow + tail, P + T + shallow + tail]; and which columns are real, [B, C]."""
    rows, length = real.shape
    columns = jnp.concatenate([real, jnp.ones((rows, shallow + tail), bool)], axis=1)
    # Rank in the sequence as the network knows it: shallow prompt, source, tail.
    rank = jnp.concatenate([shallow + jnp.arange(length), jnp.arange(shallow), shallow + length + jnp.arange(tail)])
    causal = rank[None, :] <= rank[:, None]
    mask = jnp.concatenate(
        [jnp.broadcast_to(prompt[:, None], (rows, len(rank), prompt.shape[1])), causal[None] & columns[:, None]], axis=2
    )
    return mask, jnp.concatenate([prompt, columns], axis=1)


def joined(blocks: Sequence[KV]) -> KV:
    """Blocks of a cache as one, for every row: [L, B, H, C, Dh]."""
    rows = max(block.key.shape[1] for block in blocks)
    whole = (jax.tree.map(lambda x: jnp.repeat(x, rows // x.shape[1], axis=1), block) for block in blocks)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=3), *whole)


def step(
    lm: Params,
    state: Prefilled,
    tokens: jax.Array,
    sees: jax.Array,
    positions: jax.Array,
    *,
    config: UnitLMConfig,
    compute: Compute = FLOAT32,
    embedded: jax.Array | None = None,
) -> Prefilled:
    """Run J more tokens behind a cache. They may be alternatives to each other (a tree): `sees` says who sees whom.

    Args:
      lm: the LM's weights.
      state: what was run so far, C columns.
      tokens: int32 [B or 1, J].
      sees: bool [J, J + previous] or [B or 1, J, J + previous], `[i, j]`: new column i sees column j of the last
        J + previous columns. Columns before those are seen wherever they are visible.
      positions: int32 [B, J], rows of the position table.
      config: the LM's architecture.
      compute: operand type.
      embedded: float32 [B, J, D], taken instead of the tokens' embeddings where given (a separator fed back).

    Returns:
      Prefilled with hidden [B, J, D] and C + J columns.
    """
    rows, steps = state.visible.shape[0], sees.shape[-2]
    x = unit_lm.embed_tokens(lm, tokens) if embedded is None else embedded
    # Sinusoids of traced positions: rows are bounded by the columns so far, whatever the prompt's length.
    table = jnp.asarray(unit_lm.sinusoids(config.first_position + state.visible.shape[1] + steps + 1, config.dim))
    x = x + streams.embed(lm, config, streams.NO_SPEECH)
    x = jnp.broadcast_to(x, (rows, steps, config.dim)) + table[positions]
    before = state.visible.shape[1] + steps - sees.shape[-1]
    old = jnp.broadcast_to(state.visible[:, None, :before], (rows, steps, before))
    mask = jnp.concatenate([old, jnp.broadcast_to(sees, (rows, *sees.shape[-2:]))], axis=2)
    hidden, new = unit_lm.extend(lm, config, (x,), state.cache, mask, lora=state.lora, compute=compute)
    visible = jnp.concatenate([state.visible, jnp.ones((rows, steps), bool)], axis=1)
    return state._replace(hidden=hidden, cache=(*state.cache, new), visible=visible, position=positions[:, -1] + 1)


def outputs(
    lm: Params, bank: Params, hidden: jax.Array, prompt_id: jax.Array | None, compute: Compute = FLOAT32
) -> jax.Array:
    """Verbalizer outputs of hidden states [B, Q, D]: float32 [B, Q, C + 4] if learnable, else the logits [B, Q, V]."""
    logits = unit_lm.unembed(lm, hidden, compute)
    if "verbalizer" not in bank:
        return logits
    matrix = prompts.rows_of(bank["verbalizer"], prompt_id, len(hidden))
    if matrix.shape[0] == 1:
        return contract("bqv,cv->bqc", logits, matrix[0], jnp.dtype(jnp.float32))
    return contract("bqv,bcv->bqc", logits, matrix, jnp.dtype(jnp.float32))
