"""Forward pass of the unit LM with a bank of prompts (column layout: docs/design.md).

Columns are `source | input prompt | tail`. Masks and positions are explicit, so the order in memory is free. Source
columns do not depend on trained parameters and are a separate part, for which the first layer computes no gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key

from spjax.models import low_rank, prompts, streams, unit_lm
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.einsum import einsum
from spjax.models.low_rank import Lora
from spjax.models.unit_lm import FLOAT32
from spjax.types import KV, Batch, Params, Streams

_LIVE = 1 << 24  # dropout id of the first column after the source, larger than any source length


class Prefilled(NamedTuple):
    """Decoding state.

    Attributes:
      hidden: float32 [B, Q, D], final hidden states of the last Q tail columns.
      cache: KV of all C columns so far, prefix included, as blocks, so that appending columns copies nothing.
      visible: bool [B, C], columns that later columns attend to.
      position: int32 [B], position of the next column.
      lora: LoRA adapters of the rows, without dropout.
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
    fed_back: Int[jax.Array, "B J"],
    *,
    config: UnitLMConfig,
    queries: int,
    compute: Compute = FLOAT32,
    lengths: Sequence[int] | None = None,
    drop: tuple[Key[jax.Array, " B"], float | Float[jax.Array, "#B"]] | None = None,
) -> Prefilled:
    """Run the LM on a batch with its prompts.

    Args:
      lm: LM weights.
      bank: prompt trees [N, ...], from `low_rank.scaled`.
      batch: B utterances of T source columns.
      fed_back: int32 [B, J], label tokens after the separators; J may be 0.
      config: LM architecture.
      queries: Q, number of last columns of the tail (1 + S + J columns) to compute.
      compute: operand dtype and rematerialisation.
      lengths: [N], deep prompt length of each member, if they differ; further columns are masked.
      drop: LoRA dropout: random keys [B], and the rate for all rows or [B].

    Returns:
      The state after the tail.
    """
    rows, length = batch.source.shape
    separators = bank["sep"].shape[1]
    tail = 1 + separators + fed_back.shape[1]
    embed = functools.partial(unit_lm.embed_tokens, lm, scaled=config.scale_embedding)
    place = functools.partial(unit_lm.embed_positions, lm, config, rows=length + tail)
    of_source, of_tail = _streams(batch, tail)

    source = embed(batch.source) + streams.embed(lm, config, of_source) + place(position=jnp.arange(length))
    positions = batch.source_length[:, None] + jnp.arange(tail)
    sep = prompts.rows_of(bank["sep"], batch.prompt_id, rows) * config.embed_scale
    live = jnp.concatenate(
        [
            embed(batch.last[:, None]),
            jnp.broadcast_to(sep, (rows, separators, config.dim)),
            embed(fed_back),
        ],
        axis=1,
    )
    live = live + streams.embed(lm, config, of_tail) + place(position=positions)
    shallow = bank["input"].shape[1] if "input" in bank else 0
    if shallow:
        # Neither scaled nor given a position, as in the published code; with rotary positions they are not rotated.
        raw = prompts.rows_of(bank["input"], batch.prompt_id, rows)
        live = jnp.concatenate([jnp.broadcast_to(raw, (rows, shallow, config.dim)), live], axis=1)

    offsets = None
    if "sep_deep" in bank:
        offsets = jnp.moveaxis(prompts.rows_of(bank["sep_deep"], batch.prompt_id, rows), 0, 1)
        offsets = jnp.pad(offsets, ((0, 0), (0, 0), (0, fed_back.shape[1]), (0, 0)))

    prefix = prompts.prefix(bank, batch.prompt_id, lm, config, compute)
    real = jnp.arange(length) < batch.source_length[:, None]
    columns = prefix.key.shape[3]
    prompt = jnp.ones((rows, columns), bool)
    if lengths is not None:
        prompt = jnp.arange(columns) < prompts.rows_of(jnp.asarray(lengths), batch.prompt_id, rows)[:, None]
        prompt = jnp.broadcast_to(prompt, (rows, columns))
    mask, visible = _masks(real, shallow, tail, prompt)
    lora = adapters = low_rank.from_bank(bank, batch.prompt_id)
    if drop is not None:
        # Ids of live columns do not depend on the padded source length.
        numbers = np.concatenate([np.arange(length), _LIVE + np.arange(shallow + tail)])
        lora = low_rank.with_dropout(adapters, drop[0], jnp.asarray(numbers), drop[1])
    order = [jnp.broadcast_to(jnp.arange(length), (rows, length)), jnp.zeros((rows, shallow), int), positions]
    hidden, new = unit_lm.extend(
        lm, config, (source, live), prefix, mask, queries=queries, offsets=offsets, lora=lora, compute=compute,
        position=jnp.concatenate(order, axis=1),
    )  # fmt: skip
    return Prefilled(hidden, (prefix, new), visible, positions[:, -1] + 1, adapters)


def _streams(batch: Batch, tail: int) -> tuple[Streams | None, Streams | None]:
    """Streams of the source columns and of the tail, whose first separator has the prosody of the last segment."""
    if batch.streams is None:
        return None, None
    length = batch.source.shape[1]
    pad = lambda known, value: jnp.pad(known, ((0, 0), (0, tail - 2)), constant_values=value)  # noqa: E731
    of_tail = (pad(known[:, length:], value) for known, value in zip(batch.streams, streams.NO_SPEECH, strict=True))
    return Streams(*(known[:, :length] for known in batch.streams)), Streams(*of_tail)


def _masks(real: jax.Array, shallow: int, tail: int, prompt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention mask, bool [B, T + shallow + tail, P + T + shallow + tail]; and non-padding columns, bool [B, C]."""
    rows, length = real.shape
    columns = jnp.concatenate([real, jnp.ones((rows, shallow + tail), bool)], axis=1)
    # Logical order of the columns: input prompt, source, tail.
    rank = jnp.concatenate([shallow + jnp.arange(length), jnp.arange(shallow), shallow + length + jnp.arange(tail)])
    causal = rank[None, :] <= rank[:, None]
    mask = jnp.concatenate(
        [jnp.broadcast_to(prompt[:, None], (rows, len(rank), prompt.shape[1])), causal[None] & columns[:, None]], axis=2
    )
    return mask, jnp.concatenate([prompt, columns], axis=1)


def joined(blocks: Sequence[KV]) -> KV:
    """Concatenate the blocks of a cache, repeated for every row: [L, B, G, C, Dh]."""
    rows = max(block.key.shape[1] for block in blocks)
    full = (jax.tree.map(lambda x: jnp.repeat(x, rows // x.shape[1], axis=1), block) for block in blocks)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=3), *full)


def step(
    lm: Params,
    state: Prefilled,
    tokens: Int[jax.Array, "#B J"],
    mask: Bool[jax.Array, "... J _"],
    positions: Int[jax.Array, "B J"],
    *,
    config: UnitLMConfig,
    compute: Compute = FLOAT32,
    embedded: Float[jax.Array, "#B J D"] | None = None,
) -> Prefilled:
    """Run J more tokens after a cache. They may be nodes of a tree, by `mask`.

    Args:
      lm: LM weights.
      state: decoding state of C columns.
      tokens: int32 [B or 1, J].
      mask: bool [J, J + previous] or [B or 1, J, J + previous]: whether a new column attends to each of the last
        J + previous columns. All visible columns before those are attended to.
      positions: int32 [B, J], positions of the new columns; the opening token's is 0.
      config: LM architecture.
      compute: operand dtype.
      embedded: float32 [B or 1, J, D], input embeddings to use instead of `tokens` (a separator fed back).

    Returns:
      State with hidden [B, J, D] and C + J columns.
    """
    rows, steps = state.visible.shape[0], mask.shape[-2]
    x = unit_lm.embed_tokens(lm, tokens, scaled=config.scale_embedding) if embedded is None else embedded
    x = x + streams.embed(lm, config, streams.NO_SPEECH)
    # Positions are traced; they are below the number of columns so far.
    place = unit_lm.embed_positions(lm, config, positions, state.visible.shape[1] + steps + 1)
    x = jnp.broadcast_to(x, (rows, steps, config.dim)) + place
    before = state.visible.shape[1] + steps - mask.shape[-1]
    old = jnp.broadcast_to(state.visible[:, None, :before], (rows, steps, before))
    full_mask = jnp.concatenate([old, jnp.broadcast_to(mask, (rows, *mask.shape[-2:]))], axis=2)
    hidden, new = unit_lm.extend(
        lm, config, (x,), state.cache, full_mask, lora=state.lora, compute=compute, position=positions
    )
    visible = jnp.concatenate([state.visible, jnp.ones((rows, steps), bool)], axis=1)
    return state._replace(hidden=hidden, cache=(*state.cache, new), visible=visible, position=positions[:, -1] + 1)


def outputs(
    lm: Params,
    bank: Params,
    hidden: Float[jax.Array, "B Q D"],
    prompt_id: Int[jax.Array, " B"] | None,
    compute: Compute = FLOAT32,
) -> Float[jax.Array, "B Q O"]:
    """Verbalizer outputs of hidden states [B, Q, D]: float32 [B, Q, C + 4] if learnable, else logits [B, Q, V].

    `unit_lm.mask_absent` is not applied.
    """
    logits = unit_lm.unembed(lm, hidden, compute)
    if "verbalizer" not in bank:
        return logits
    matrix = prompts.rows_of(bank["verbalizer"], prompt_id, len(hidden))
    if matrix.shape[0] == 1:
        return einsum("bqv,cv->bqc", logits, matrix[0], jnp.dtype(jnp.float32))
    return einsum("bqv,bcv->bqc", logits, matrix, jnp.dtype(jnp.float32))
