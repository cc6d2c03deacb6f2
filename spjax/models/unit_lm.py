"""The unit language model: a Transformer decoder over speech units. `UnitLMConfig` describes its block.

`extend` runs new columns after a prefix of keys and values: a deep prompt, the KV cache of earlier columns, or both.
Tasks, prompts and labels are handled by other modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
ABSENT = -1e9  # logit of tokens that the LM was not trained with
Prefix = KV | tuple[KV, ...]  # earlier columns, in one or several blocks
Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, [B or 1, T, Dh / 2]


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


def frequencies(config: UnitLMConfig) -> Float[np.ndarray, " half"]:
    """Rotary frequencies in radians per position, float32 [Dh / 2]."""
    half = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    plain = (1.0 / config.rope_theta**half).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return (plain / scaling.factor).astype(np.float32)
    # llama3: 1 where the wavelength is short, 0 where it is long
    turns = scaling.original_positions * plain / (2 * np.pi)
    kept = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return (plain * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def rotation(config: UnitLMConfig, position: Int[jax.Array, "#B T"] | None) -> Rotation | None:
    """Cosines and sines with which queries and keys at these positions are rotated; None without rotary positions.

    Raises:
      ValueError: rotary positions, but no `position`.
    """
    if config.positions != "rotary":
        return None
    if position is None:
        raise ValueError("an LM with rotary positions needs the positions of the columns")
    angle = position[..., None].astype(jnp.float32) * frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: jax.Array, by: Rotation | None) -> jax.Array:
    """Rotate the pairs (i, i + Dh / 2) of [B, H, T, Dh]."""
    if by is None:
        return x
    cos, sin = (part[:, None] for part in by)
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


class Block(nn.Module):
    """One decoder layer. `parts` are column ranges, projected separately so that frozen ones need no gradient."""

    config: UnitLMConfig
    compute: Compute

    def setup(self) -> None:
        """Declare the weights (names: docs/design.md)."""
        self.attn_norm = self._norm("attn_norm")
        self.query, self.key, self.value, self.out = map(self._dense, ("query", "key", "value", "out"))
        self.ffn_norm = self._norm("ffn_norm")
        self.ffn_in, self.ffn_out = map(self._dense, ("ffn_in", "ffn_out"))
        if self.config.activation == "swiglu":
            self.ffn_gate = self._dense("ffn_gate")

    def _norm(self, name: str) -> Params:
        return self.param(name, lambda _: init_norm(self.config))

    def _dense(self, name: str) -> Params:
        rows, columns = self.config.kernels[name]
        normal = nn.initializers.normal(INIT_STD)
        draw = nn.initializers.xavier_uniform() if self.config.scale_embedding else normal

        def init(rng: jax.Array) -> Params:
            bias = {"bias": jnp.zeros(columns)} if self.config.has_bias(name) else {}
            return {"kernel": draw(rng, (rows, columns)), **bias}

        return self.param(name, init)

    def _project(self, name: str, x: jax.Array, lora: Lora, low: jax.Array | None) -> jax.Array:
        y = dense(getattr(self, name), x, self.compute)
        return y + lora.up(name, low, self.compute.operand)

    def _heads(self, x: jax.Array) -> jax.Array:
        # Heads first, as the attention matmuls need it, so that the cache is not transposed in every step.
        width = self.config.head_dim
        return jnp.swapaxes(x.reshape(*x.shape[:2], x.shape[2] // width, width), 1, 2)

    def __call__(
        self,
        parts: tuple[Float[jax.Array, "B _ D"], ...],
        prefix: Prefix,
        mask: Bool[jax.Array, "#B Q _"],
        queries: int,
        lora: Lora = low_rank.NONE,
        rotation: Rotation | None = None,
    ) -> tuple[Float[jax.Array, "B Q D"], KV]:
        """Run the layer.

        Args:
          parts: float32 [B, T_i, D] each, T columns in total.
          prefix: keys and values of C earlier columns; a block [n, G, C_i, Dh] is shared by B / n consecutive rows.
          mask: bool [B or 1, Q, C + T], columns that each query attends to.
          queries: Q, number of last columns to compute.
          lora: LoRA adapters of the layer.
          rotation: of the T columns; None without rotary positions.

        Returns:
          float32 [B, Q, D], and the keys and values of the T columns.
        """
        c, operand = self.config, self.compute.operand
        before, after = (norm, _unchanged) if c.pre_norm else (_unchanged, norm)
        normed = [before(x, self.attn_norm, c) for x in parts]
        starts = np.cumsum([0, *(x.shape[1] for x in parts)]).tolist()
        low = [lora.down("attention", x, start, operand) for x, start in zip(normed, starts, strict=False)]
        key, value = (
            self._heads(
                jnp.concatenate([self._project(w, x, lora, z) for x, z in zip(normed, low, strict=True)], axis=1)
            )
            for w in ("key", "value")
        )
        new = KV(_rotate(key, rotation), value)
        x, asked = _last(parts, queries), _trim(normed, queries)
        known: list[Any] = _trim([z for z in low if z is not None], queries) or [None] * len(asked)
        query = [self._project("query", part, lora, z) for part, z in zip(asked, known, strict=True)]
        q = _rotate(self._heads(jnp.concatenate(query, axis=1)), jax.tree.map(lambda a: a[:, -queries:], rotation))

        def project(x: jax.Array, names: Sequence[str]) -> list[jax.Array]:
            low = lora.down(names[0], x, -queries, operand)
            return [self._project(name, x, lora, low) for name in names]

        (mixed,) = project(jax.checkpoint(self._attend)(q * c.head_dim**-0.5, new, prefix, mask), ["out"])
        x = after(x + mixed, self.attn_norm, c)
        inner = [name for name in low_rank.INPUTS["ffn_in"] if name in c.kernels]
        h = _ACTIVATIONS[c.activation](*project(before(x, self.ffn_norm, c), inner))
        return after(x + project(h, ["ffn_out"])[0], self.ffn_norm, c), new

    def _attend(self, q: jax.Array, new: KV, prefix: Prefix, mask: jax.Array) -> jax.Array:
        # Blocks are not concatenated, and rows that share a block are grouped, so that neither the cache is copied in
        # every step nor a prompt for every row. Query heads that share a key head are columns of that head.
        product = functools.partial(einsum, dtype=self.compute.operand)
        blocks = [block for block in (*blocks_of(prefix), new) if block.key.shape[2]]
        grouped = lambda x: x.reshape(len(x), self.config.key_heads, -1, x.shape[3])  # noqa: E731
        by_head = lambda x: x.reshape(len(x), *q.shape[1:3], x.shape[3])  # noqa: E731
        shared = lambda x, block: x.reshape(len(block.key), -1, *x.shape[1:])  # noqa: E731
        apart = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        scores = [apart(product("nbhqd,nhkd->nbhqk", shared(grouped(q), block), block.key)) for block in blocks]
        scores = [by_head(score) for score in scores]
        seen = jnp.where(mask[:, None], jnp.concatenate(scores, axis=3), jnp.finfo(jnp.float32).min)
        ends = np.cumsum([block.key.shape[-2] for block in blocks])[:-1]
        shares = jnp.split(jax.nn.softmax(seen), ends, axis=3)
        mixed = [
            apart(product("nbhqk,nhkd->nbhqd", shared(grouped(share), block), block.value))
            for share, block in zip(shares, blocks, strict=True)
        ]
        return jnp.swapaxes(by_head(sum(mixed[1:], mixed[0])), 1, 2).reshape(len(q), q.shape[2], -1)


INIT_STD = 0.02  # of kernels and embeddings, as transformers initialises LMs that do not scale their embeddings
_ACTIVATIONS: dict[str, Callable[..., jax.Array]] = {
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "swiglu": lambda x, gate: nn.silu(gate) * x,
}


def dense(weights: Params, x: Float[jax.Array, "B T in"], compute: Compute) -> Float[jax.Array, "B T out"]:
    """Multiply with a kernel and add its bias, if it has one."""
    y = einsum("btd,de->bte", x, weights["kernel"], compute.operand)
    return y + weights["bias"] if "bias" in weights else y


def blocks_of(prefix: Prefix) -> tuple[KV, ...]:
    """Blocks of a prefix as a tuple."""
    return (prefix,) if isinstance(prefix, KV) else prefix


def layer_norm(x: Float[jax.Array, "*rows D"], weights: Params, eps: float = EPS) -> Float[jax.Array, "*rows D"]:
    """LayerNorm over the last axis, in float32."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return rms_norm(x, weights, eps) + weights["bias"]


def rms_norm(x: Float[jax.Array, "*rows D"], weights: Params, eps: float) -> Float[jax.Array, "*rows D"]:
    """RMSNorm over the last axis, in float32."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * weights["scale"]


def norm(x: Float[jax.Array, "*rows D"], weights: Params, config: UnitLMConfig) -> Float[jax.Array, "*rows D"]:
    """The norm of an LM's block."""
    return (layer_norm if config.norm == "layer" else rms_norm)(x, weights, config.norm_eps)


def _unchanged(x: jax.Array, weights: Params, config: UnitLMConfig) -> jax.Array:
    del weights, config
    return x


def attention_input(x: Float[jax.Array, "*rows D"], layer: Params, config: UnitLMConfig) -> Float[jax.Array, "*rows D"]:
    """What a layer projects to queries, keys and values, from the layer's input."""
    return norm(x, layer["attn_norm"], config) if config.pre_norm else x


def init_norm(config: UnitLMConfig) -> Params:
    """Weights of a norm that only normalises."""
    scale = {"scale": jnp.ones(config.dim)}
    return {**scale, "bias": jnp.zeros(config.dim)} if config.norm == "layer" else scale


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
    """Initialise weights.

    An LM that scales its embeddings is initialised like fairseq's decoder: Xavier-uniform kernels, embeddings N(0, 1/D)
    with a zero PAD row. Others are as in transformers: everything N(0, 0.02²).
    """
    block = Block(config, FLOAT32)
    embed_rng, layer_rng = jax.random.split(rng)
    stream_rng = jax.random.fold_in(rng, 0)  # separate key, so that streams do not change the other weights
    empty = empty_prefix(config)
    layer_prefix = KV(empty.key[0], empty.value[0])
    x, mask = jnp.zeros((1, 1, config.dim)), jnp.ones((1, 1, 1), bool)
    turn = rotation(config, jnp.zeros((1, 1), jnp.int32))

    def one(key: jax.Array) -> Params:
        return block.init(key, (x,), layer_prefix, mask, 1, rotation=turn)["params"]

    std = config.dim**-0.5 if config.scale_embedding else INIT_STD
    embed = jax.random.normal(embed_rng, config.shapes["embed"]) * std
    params = {
        "embed": embed.at[vocab.PAD].set(0) if config.scale_embedding else embed,
        "layers": jax.vmap(one)(jax.random.split(layer_rng, config.layers)),
        **({"final_norm": init_norm(config)} if config.pre_norm else {}),
        **streams_of.init(stream_rng, config),
    }
    # Weights that GSLM's decoder lacks.
    for number, path in enumerate(("positions", "embed_in/kernel", "embed_out/kernel", "heads/unit")):
        name, _, leaf = path.partition("/")
        if path in config.shapes and leaf not in params.get(name, {}):
            drawn = jax.random.normal(jax.random.fold_in(rng, number + 1), config.shapes[path]) * std
            params[name] = {leaf: drawn} if leaf else drawn
    return params


def empty_prefix(config: UnitLMConfig) -> KV:
    """Prefix without columns, [L, 1, G, 0, Dh]."""
    empty = jnp.zeros((config.layers, 1, config.key_heads, 0, config.head_dim))
    return KV(empty, empty)


def embed_tokens(
    params: Params, tokens: Int[jax.Array, "*columns"], *, scaled: bool = True
) -> Float[jax.Array, "*columns D"]:
    """Token embeddings without positions, float32 [..., D]; times sqrt(D) if `scaled`."""
    x = params["embed"][tokens].astype(jnp.float32)
    if "embed_in" in params:
        x = x @ params["embed_in"]["kernel"].astype(jnp.float32)
    return x * x.shape[-1] ** 0.5 if scaled else x


def embed_positions(
    params: Params, config: UnitLMConfig, position: Int[jax.Array, "*columns"], rows: int
) -> Float[jax.Array, ...]:
    """What is added to embedded columns for their positions, float32 [..., D]; a scalar zero for rotary positions.

    Args:
      params: LM weights.
      config: LM architecture.
      position: int [...], positions from 0 (the opening token).
      rows: a bound that all positions are below; for sinusoidal positions.
    """
    if config.positions == "rotary":
        return jnp.zeros(())
    if config.positions == "learned":
        return params["positions"][position].astype(jnp.float32)
    return jnp.asarray(sinusoids(config.first_position + rows, config.dim)[config.first_position :])[position]


def unembed(params: Params, hidden: Float[jax.Array, "B Q D"], compute: Compute = FLOAT32) -> Float[jax.Array, "B Q V"]:
    """Logits over the vocabulary, float32 [B, Q, V]; `mask_absent` is not applied."""
    if "embed_out" in params:
        hidden = dense(params["embed_out"], hidden, compute)
    return einsum(
        "bqd,vd->bqv", hidden, params["heads"]["unit"] if "heads" in params else params["embed"], compute.operand
    )


def mask_absent(logits: Float[jax.Array, "*rows V"], config: UnitLMConfig) -> Float[jax.Array, "*rows V"]:
    """Logits with a very low value for tokens that the LM was not trained with."""
    return logits.at[..., np.asarray(config.absent)].set(ABSENT) if config.absent else logits


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
    position: Int[jax.Array, "#B T"] | None = None,
) -> tuple[Float[jax.Array, "B Q D"], KV]:
    """Run T new columns after a prefix of C columns.

    The first layer projects each part separately, so that parts without trained parameters (the units) get no gradient
    there; the last layer computes queries, output and feed-forward of the last Q columns only.

    Args:
      params: LM weights.
      config: LM architecture.
      parts: float32 [B, T_i, D] each, embedded columns with `embed_positions` added; T columns in total.
      prefix: [L, n, G, C_i, Dh] each, C columns in total; a block is shared by B / n consecutive rows.
      mask: bool [B or 1, T, C + T], columns that each new column attends to, itself included.
      queries: Q, number of last columns to return; None: all.
      offsets: float32 [L, B or 1, R, D], added to the last R columns at the input of each layer.
      lora: LoRA adapters of the kernels.
      compute: operand dtype and rematerialisation.
      position: int [B or 1, T], positions of the new columns; required for rotary positions, otherwise unused.

    Returns:
      float32 [B, Q, D] after the final norm, and the keys and values of the new columns, [L, B, G, T, Dh].
    """
    total = sum(part.shape[1] for part in parts)
    asked = mask if queries is None else mask[:, total - queries :]
    block, turn = Block(config, compute), rotation(config, position)

    def run(layer: Any, parts: tuple[jax.Array, ...], seen: jax.Array) -> tuple[jax.Array, KV]:
        weights, layer_prefix, offset, adapters = layer
        if offset is not None:
            parts = (*parts[:-1], _add_to_last(parts[-1], offset))
        done: Any = block.apply({"params": gathered(weights)}, parts, layer_prefix, seen, seen.shape[1], adapters, turn)
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
    return norm(x, params["final_norm"], config) if config.pre_norm else x, new


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
    position = jnp.arange(length)[None] if position is None else position
    x = embed_tokens(params, tokens, scaled=config.scale_embedding) + streams_of.embed(params, config, streams)
    x = x + embed_positions(params, config, position, length)
    seen = jnp.tril(jnp.ones((1, length, length), bool)) if mask is None else mask
    return extend(params, config, (x,), empty_prefix(config), seen, compute=compute, position=position)[0]


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
    hidden = hidden_states(params, config, tokens, compute, streams=streams)
    return mask_absent(unembed(params, hidden, compute), config)
