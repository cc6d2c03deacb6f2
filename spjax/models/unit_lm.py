"""The unit language model: a pre-norm Transformer decoder over speech units (GSLM's `hubert100_lm` in fairseq).

`extend` runs new columns after a prefix of keys and values: a deep prompt, the KV cache of earlier columns, or both.
Tasks, prompts and labels are handled by other modules.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key

from spjax import vocab
from spjax.models import low_rank
from spjax.models import streams as streams_of
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.einsum import einsum
from spjax.models.low_rank import Lora
from spjax.models.split_kernel import gathered, recomputed
from spjax.types import KV, Params, Streams

EPS = 1e-5
FLOAT32 = Compute()
Prefix = KV | tuple[KV, ...]  # earlier columns, in one or several blocks


def sinusoids(rows: int, dim: int) -> Float[np.ndarray, "rows dim"]:
    """Sinusoidal position table, float32 [rows, D]: `[sin | cos]`, with a zero row for PAD.

    Exponents, frequencies and angles are each rounded to float32, as when the published weights were trained; otherwise
    angles differ by 1e-4 at position 1,300.
    """
    half = dim // 2
    exponent = np.arange(half, dtype=np.float32) * np.float32(-np.log(10000) / (half - 1))
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angle = np.arange(rows, dtype=np.float32)[:, None] * frequency[None]
    table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
    table[vocab.PAD] = 0
    return table


class Block(nn.Module):
    """One decoder layer. `parts` are column ranges, projected separately so that frozen ones need no gradient."""

    config: UnitLMConfig
    compute: Compute

    def setup(self) -> None:
        """Declare the weights (names: docs/design.md)."""
        c = self.config
        self.attn_norm = self._norm("attn_norm")
        self.query, self.key, self.value, self.out = (
            self._dense(name, c.dim, c.dim) for name in ("query", "key", "value", "out")
        )
        self.ffn_norm = self._norm("ffn_norm")
        self.ffn_in = self._dense("ffn_in", c.dim, c.ffn_dim)
        self.ffn_out = self._dense("ffn_out", c.ffn_dim, c.dim)

    def _norm(self, name: str) -> Params:
        d = self.config.dim
        return self.param(name, lambda _: {"scale": jnp.ones(d), "bias": jnp.zeros(d)})

    def _dense(self, name: str, rows: int, columns: int) -> Params:
        def init(rng: jax.Array) -> Params:
            return {"kernel": nn.initializers.xavier_uniform()(rng, (rows, columns)), "bias": jnp.zeros(columns)}

        return self.param(name, init)

    def _project(self, name: str, x: jax.Array, lora: Lora, low: jax.Array | None) -> jax.Array:
        weights = getattr(self, name)
        y = einsum("btd,de->bte", x, weights["kernel"], self.compute.operand) + weights["bias"]
        return y + lora.up(name, low, self.compute.operand)

    def _heads(self, x: jax.Array) -> jax.Array:
        # Heads first, as the attention matmuls need it, so that the cache is not transposed in every step.
        return jnp.swapaxes(x.reshape(*x.shape[:2], self.config.heads, self.config.head_dim), 1, 2)

    def __call__(
        self,
        parts: tuple[Float[jax.Array, "B _ D"], ...],
        prefix: Prefix,
        mask: Bool[jax.Array, "#B Q _"],
        queries: int,
        lora: Lora = low_rank.NONE,
    ) -> tuple[Float[jax.Array, "B Q D"], KV]:
        """Run the layer.

        Args:
          parts: float32 [B, T_i, D] each, T columns in total.
          prefix: keys and values of C earlier columns; a block [n, H, C_i, Dh] is shared by B / n consecutive rows.
          mask: bool [B or 1, Q, C + T], columns that each query attends to.
          queries: Q, number of last columns to compute.
          lora: LoRA adapters of the layer.

        Returns:
          float32 [B, Q, D], and the keys and values of the T columns.
        """
        operand = self.compute.operand
        normed = [layer_norm(x, self.attn_norm) for x in parts]
        starts = np.cumsum([0, *(x.shape[1] for x in parts)]).tolist()
        low = [lora.down("attention", x, start, operand) for x, start in zip(normed, starts, strict=False)]
        key, value = (
            self._heads(
                jnp.concatenate([self._project(w, x, lora, z) for x, z in zip(normed, low, strict=True)], axis=1)
            )
            for w in ("key", "value")
        )
        new = KV(key, value)
        x, asked = _last(parts, queries), _trim(normed, queries)
        known: list[Any] = _trim([z for z in low if z is not None], queries) or [None] * len(asked)
        q = [self._project("query", part, lora, z) for part, z in zip(asked, known, strict=True)]
        q = self._heads(jnp.concatenate(q, axis=1)) * self.config.head_dim**-0.5

        def project(name: str, x: jax.Array) -> jax.Array:
            return self._project(name, x, lora, lora.down(name, x, -queries, operand))

        x = x + project("out", jax.checkpoint(self._attend)(q, new, prefix, mask))
        h = nn.relu(project("ffn_in", layer_norm(x, self.ffn_norm)))
        return x + project("ffn_out", h), new

    def _attend(self, q: jax.Array, new: KV, prefix: Prefix, mask: jax.Array) -> jax.Array:
        # Blocks are not concatenated, and rows that share a block are grouped, so that neither the cache is copied in
        # every step nor a prompt for every row.
        product = functools.partial(einsum, dtype=self.compute.operand)
        blocks = [block for block in (*blocks_of(prefix), new) if block.key.shape[2]]
        shared = lambda x, block: x.reshape(len(block.key), -1, *x.shape[1:])  # noqa: E731
        apart = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        scores = [apart(product("nbhqd,nhkd->nbhqk", shared(q, block), block.key)) for block in blocks]
        seen = jnp.where(mask[:, None], jnp.concatenate(scores, axis=3), jnp.finfo(jnp.float32).min)
        ends = np.cumsum([block.key.shape[-2] for block in blocks])[:-1]
        shares = jnp.split(jax.nn.softmax(seen), ends, axis=3)
        mixed = [
            apart(product("nbhqk,nhkd->nbhqd", shared(share, block), block.value))
            for share, block in zip(shares, blocks, strict=True)
        ]
        return jnp.swapaxes(sum(mixed[1:], mixed[0]), 1, 2).reshape(len(q), -1, self.config.dim)


def blocks_of(prefix: Prefix) -> tuple[KV, ...]:
    """Blocks of a prefix as a tuple."""
    return (prefix,) if isinstance(prefix, KV) else prefix


def layer_norm(x: Float[jax.Array, "*rows D"], weights: Params) -> Float[jax.Array, "*rows D"]:
    """LayerNorm over the last axis, in float32."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(variance + EPS) * weights["scale"] + weights["bias"]


def _trim(parts: list[jax.Array], columns: int) -> list[jax.Array]:
    """Cut the parts to their last `columns` columns in total."""
    kept: list[jax.Array] = []
    for part in reversed(parts):
        if columns <= 0:
            break
        kept.insert(0, part[:, max(part.shape[1] - columns, 0) :])
        columns -= part.shape[1]
    return kept


def _last(parts: tuple[jax.Array, ...], columns: int) -> jax.Array:
    return jnp.concatenate(_trim(list(parts), columns), axis=1)


def init(rng: Key[jax.Array, ""], config: UnitLMConfig) -> Params:
    """Initialise weights like fairseq's decoder: Xavier-uniform kernels, embedding N(0, 1/D) with a zero PAD row."""
    block = Block(config, FLOAT32)
    embed_rng, layer_rng = jax.random.split(rng)
    stream_rng = jax.random.fold_in(rng, 0)  # separate key, so that streams do not change the other weights
    empty = empty_prefix(config)
    layer_prefix = KV(empty.key[0], empty.value[0])
    x, mask = jnp.zeros((1, 1, config.dim)), jnp.ones((1, 1, 1), bool)

    def one(key: jax.Array) -> Params:
        return block.init(key, (x,), layer_prefix, mask, 1)["params"]

    embed = jax.random.normal(embed_rng, (config.vocab_size, config.dim)) * config.dim**-0.5
    return {
        "embed": embed.at[vocab.PAD].set(0),
        "layers": jax.vmap(one)(jax.random.split(layer_rng, config.layers)),
        "final_norm": {"scale": jnp.ones(config.dim), "bias": jnp.zeros(config.dim)},
        **streams_of.init(stream_rng, config),
    }


def empty_prefix(config: UnitLMConfig) -> KV:
    """Prefix without columns, [L, 1, H, 0, Dh]."""
    empty = jnp.zeros((config.layers, 1, config.heads, 0, config.head_dim))
    return KV(empty, empty)


def embed_tokens(params: Params, tokens: Int[jax.Array, "*columns"]) -> Float[jax.Array, "*columns D"]:
    """Token embeddings times sqrt(D), without positions: float32 [..., D]."""
    return params["embed"][tokens].astype(jnp.float32) * params["embed"].shape[1] ** 0.5


def unembed(params: Params, hidden: Float[jax.Array, "B Q D"], compute: Compute = FLOAT32) -> Float[jax.Array, "B Q V"]:
    """Logits over the vocabulary, float32 [B, Q, V]; weights are tied to the embedding except in a multi-stream LM."""
    return einsum(
        "bqd,vd->bqv", hidden, params["heads"]["unit"] if "heads" in params else params["embed"], compute.operand
    )


def extend(
    params: Params,
    config: UnitLMConfig,
    parts: tuple[Float[jax.Array, "B _ D"], ...],
    prefix: Prefix,
    mask: Bool[jax.Array, "#B T _"],
    *,
    queries: int | None = None,
    offsets: Float[jax.Array, "L _ _ D"] | None = None,
    lora: Lora = low_rank.NONE,
    compute: Compute = FLOAT32,
) -> tuple[Float[jax.Array, "B Q D"], KV]:
    """Run T new columns after a prefix of C columns.

    The first layer projects each part separately, so that parts without trained parameters (the units) get no gradient
    there; the last layer computes queries, output and feed-forward of the last Q columns only.

    Args:
      params: LM weights.
      config: LM architecture.
      parts: float32 [B, T_i, D] each, embedded columns with positions; T columns in total.
      prefix: [L, n, H, C_i, Dh] each, C columns in total; a block is shared by B / n consecutive rows.
      mask: bool [B or 1, T, C + T], columns that each new column attends to, itself included.
      queries: Q, number of last columns to return; None: all.
      offsets: float32 [L, B or 1, R, D], added to the last R columns at the input of each layer.
      lora: LoRA adapters of the kernels.
      compute: operand dtype and rematerialisation.

    Returns:
      float32 [B, Q, D] after the final norm, and the keys and values of the new columns, [L, B, H, T, Dh].
    """
    total = sum(part.shape[1] for part in parts)
    asked = mask if queries is None else mask[:, total - queries :]
    block = Block(config, compute)

    def run(layer: Any, parts: tuple[jax.Array, ...], seen: jax.Array) -> tuple[jax.Array, KV]:
        weights, layer_prefix, offset, adapters = layer
        if offset is not None:
            parts = (*parts[:-1], _add_to_last(parts[-1], offset))
        done: Any = block.apply({"params": gathered(weights)}, parts, layer_prefix, seen, seen.shape[1], adapters)
        return done

    run = recomputed(run, params["layers"], everything=compute.remat)
    layers = (params["layers"], prefix, offsets, lora)
    at = lambda i: jax.tree.map(lambda a: a[i], layers)  # noqa: E731
    if len(parts) == 1 and asked.shape[1] == total:  # all layers are equal: compile one block, not three
        x, new = jax.lax.scan(lambda x, layer: run(layer, (x,), mask), parts[0], layers)
    elif config.layers == 1:
        x, kv = run(at(0), parts, asked)
        new = jax.tree.map(lambda a: a[None], kv)
    else:
        x, first = run(at(0), parts, mask)
        middle = jax.tree.map(lambda a: a[1:-1], layers)
        x, rest = jax.lax.scan(lambda x, layer: run(layer, (x,), mask), x, middle)
        x, last = run(at(-1), (x,), asked)
        new = jax.tree.map(lambda a, b, c: jnp.concatenate([a[None], b, c[None]]), first, rest, last)
    return layer_norm(x, params["final_norm"]), new


def _add_to_last(x: jax.Array, offset: jax.Array) -> jax.Array:
    rest = x.shape[1] - offset.shape[1]
    return jnp.concatenate([x[:, :rest], x[:, rest:] + offset], axis=1) if rest else x + offset


def hidden_states(
    params: Params,
    config: UnitLMConfig,
    tokens: Int[jax.Array, "B T"],
    compute: Compute = FLOAT32,
    *,
    streams: Streams | None = None,
    position: Int[jax.Array, "B T"] | None = None,
    mask: Bool[jax.Array, "#B T T"] | None = None,
) -> Float[jax.Array, "B T D"]:
    """Run the LM on token rows without a prompt: final hidden states, float32 [B, T, D].

    Args:
      params: LM weights.
      config: LM architecture.
      tokens: int [B, T], right-padded, or packed with `position` and `mask`.
      compute: operand dtype and rematerialisation.
      streams: [B, T] each, lagging one column (docs/design.md); multi-stream LMs only.
      position: int32 [B, T], index of a column in its sequence; by default in its row.
      mask: bool [B or 1, T, T], attention mask; by default causal.
    """
    length = tokens.shape[1]
    table = jnp.asarray(sinusoids(config.first_position + length, config.dim)[config.first_position :])
    x = embed_tokens(params, tokens) + streams_of.embed(params, config, streams)
    x = x + (table if position is None else table[position])
    seen = jnp.tril(jnp.ones((1, length, length), bool)) if mask is None else mask
    return extend(params, config, (x,), empty_prefix(config), seen, compute=compute)[0]


def logits(
    params: Params,
    config: UnitLMConfig,
    tokens: Int[jax.Array, "B T"],
    compute: Compute = FLOAT32,
    *,
    streams: Streams | None = None,
) -> Float[jax.Array, "B T V"]:
    """Logits at every position of right-padded token rows: int [B, T] to float32 [B, T, V].

    Multi-stream LMs also need `streams`, [B, T] each, lagging one column.
    """
    return unembed(params, hidden_states(params, config, tokens, compute, streams=streams), compute)
