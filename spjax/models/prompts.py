"""Prompts: what is trained. How one is made, and how it is turned into what the LM takes.

A prompt tree carries a bank axis N in front of every leaf (a single prompt is a bank of one); each utterance names its
row of the bank, so that a batch of mixed tasks and seeds is one forward pass.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from spjax import vocab
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.contract import contract
from spjax.models.split_kernel import gathered, recomputed
from spjax.models.verbalizers import Verbalizer
from spjax.types import KV, Params


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Shape and start of a prompt.

    Attributes:
      length: P, virtual positions of every layer.
      deep: key/value prompts in every layer; False is the shallow input prompt.
      separators: S, trained vectors between units and labels; the reference has one.
      steer: separators also get a trained vector added in every layer (ours; the reference has none).
      dropout: rate on key and value prompts, one mask a step for a member's whole batch.
      verbalizer_dropout: rate on the verbalizer's outputs.
      init: "normal" or "units" (prompts start as embeddings of sampled units).
      init_scale: standard deviation of a normal start.
      sep_scale: standard deviation of the separators' start; the reference's 1.0 is sqrt(D) times a unit vector's.
    """

    length: int = 5
    deep: bool = True
    separators: int = 1
    steer: bool = False
    dropout: float = 0.1
    verbalizer_dropout: float = 0.1
    init: str = "normal"
    init_scale: float = 1.0
    sep_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.length < 0 or self.separators < 1:
            raise ValueError(f"prompt: length {self.length} must be >= 0 and separators {self.separators} >= 1")
        for name in ("dropout", "verbalizer_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"prompt: {name} is {getattr(self, name)}, must lie in [0, 1)")
        for name in ("init_scale", "sep_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"prompt: {name} is {getattr(self, name)}, must not be negative, nor infinite")
        if self.init not in ("normal", "units"):
            raise ValueError(f"prompt: init is {self.init!r}, must be normal or units")


def init_member(
    rng: jax.Array, config: PromptConfig, lm: UnitLMConfig, verbalizer: Verbalizer, embed: jax.Array
) -> Params:
    """One member's fresh prompt tree (no bank axis).

    Args:
      rng: the member's key.
      config: shape and start.
      lm: architecture of the unit LM.
      verbalizer: tells whether there is a matrix, and its size.
      embed: [V, D], the LM's embedding, for `init="units"`.
    """
    keys = iter(jax.random.split(rng, 5))

    def vectors(shape: tuple[int, ...]) -> jax.Array:
        key = next(keys)
        if config.init == "units":
            rows = jax.random.randint(key, shape, vocab.UNIT_OFFSET, lm.vocab_size)
            return embed[rows].astype(jnp.float32) * lm.dim**0.5
        return jax.random.normal(key, (*shape, lm.dim)) * config.init_scale

    if config.deep:
        tree = {name: vectors((lm.layers, config.length)) for name in ("key", "value")}
    else:
        tree = {"input": vectors((config.length,))}
    tree["sep"] = jax.random.normal(next(keys), (config.separators, lm.dim)) * config.sep_scale
    if config.steer:
        tree["sep_deep"] = jnp.zeros((lm.layers, config.separators, lm.dim))
    if verbalizer.learnable:
        # torch's start of a Linear(V, C + 4), as the reference has it.
        bound = lm.vocab_size**-0.5
        shape = (verbalizer.outputs, lm.vocab_size)
        tree["verbalizer"] = jax.random.uniform(next(keys), shape, minval=-bound, maxval=bound)
    return tree


def shape_of(tree: Params) -> dict[str, int | bool]:
    """The fields of PromptConfig that say what shape a member's tree has."""
    deep = "key" in tree
    length = tree["key"].shape[1] if deep else len(tree["input"])
    return {"length": length, "deep": deep, "separators": len(tree["sep"]), "steer": "sep_deep" in tree}


def stack(members: list[Params]) -> Params:
    """A bank of the members, in order: every leaf gets a leading axis N."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def join(banks: list[Params]) -> Params:
    """One bank of several, in order. What is filled up nothing reads, as long as the members' lengths are told.

    Verbalizers of fewer outputs and deep prompts of fewer columns than another's are filled up with zeros.
    """

    def widest(name: str, axis: int) -> list[Params]:
        size = max(bank[name].shape[axis] for bank in banks)
        fill = lambda leaf: [(0, size - n if i == axis else 0) for i, n in enumerate(leaf.shape)]  # noqa: E731
        return [{**bank, name: jnp.pad(bank[name], fill(bank[name]))} for bank in banks]

    for name, axis in {"verbalizer": 1, "key": 2, "value": 2}.items():
        if name in banks[0]:
            banks = widest(name, axis)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *banks)


def part(bank: Params, start: int, stop: int, verbalizer: Verbalizer, length: int | None = None) -> Params:
    """Members start .. stop - 1 of a joined bank, all of one task and one prompt length: what was filled up is gone."""
    own = {name: leaf[start:stop] for name, leaf in bank.items()}
    if verbalizer.learnable:
        own["verbalizer"] = own["verbalizer"][:, : verbalizer.outputs]
    return own | {name: own[name][:, :, :length] for name in ("key", "value") if name in own}


def member(bank: Params, n: int) -> Params:
    """Row n of a bank, as numpy arrays without the bank axis."""
    return jax.tree.map(lambda leaf: np.asarray(leaf[n]), bank)


def rows_of(leaf: jax.Array, prompt_id: jax.Array | None, rows: int) -> jax.Array:
    """Each utterance's row of a bank leaf [N, ...] as [B, ...]; of a bank of one as [1, ...], to be broadcast.

    Args:
      leaf: of a bank.
      prompt_id: int [B], as a batch has it.
      rows: B.
    """
    if leaf.shape[0] == 1:
        return leaf
    # Copies side by side need no look-up, and on the way back no scattered sum.
    return jnp.repeat(leaf, rows // len(leaf), axis=0) if prompt_id is None else leaf[prompt_id]


def dropout(bank: Params, config: PromptConfig, keys: jax.Array) -> Params:
    """Key and value prompts with dropout; one mask a member, the same however long others' prompts are.

    Args:
      bank: prompt trees [N, ...].
      config: its `dropout` rate.
      keys: [N] one random key a member, so that a member drops the same alone and in a bank.
    """
    if not config.dropout or not config.deep:
        return bank

    def drop(leaf: jax.Array, salt: int) -> jax.Array:
        def one(key: jax.Array, x: jax.Array) -> jax.Array:
            columns = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, salt), jnp.arange(x.shape[1]))
            draw = lambda column: jax.random.bernoulli(column, 1 - config.dropout, (x.shape[0], x.shape[2]))  # noqa: E731
            return jnp.where(jax.vmap(draw, out_axes=1)(columns), x / (1 - config.dropout), 0)

        return jax.vmap(one)(keys, leaf)

    return {**bank, "key": drop(bank["key"], 0), "value": drop(bank["value"], 1)}


def projected(bank: Params, lm: Params, config: UnitLMConfig, compute: Compute) -> Params:
    """The bank with its deep prompts as what the LM makes of them, once for all batches: key = W_k p + b_k.

    Args:
      bank: prompt trees [N, ...]; shallow ones give an empty prefix.
      lm: the LM's weights.
      config: its architecture.
      compute: operand type.

    Returns:
      The bank with `prefix`, KV [L, N, H, P, Dh], in place of `key` and `value`: to be run, not trained or stored.
    """

    def project(name: str) -> jax.Array:
        leaf = bank[name] if name in bank else jnp.zeros((len(bank["sep"]), config.layers, 0, config.dim))
        weights = lm["layers"][name]

        def layer(p: jax.Array, weights: Params) -> jax.Array:
            whole = gathered(weights)
            return contract("npd,de->npe", p, whole["kernel"], compute.operand) + whole["bias"]

        layer = recomputed(layer, weights)
        # Layer by layer: of a kernel in pieces no more than a layer is ever put together.
        x = jax.lax.scan(lambda _, each: (None, layer(*each)), None, (jnp.swapaxes(leaf, 0, 1), weights))[1]
        return jnp.swapaxes(x.reshape(*x.shape[:-1], config.heads, config.head_dim), 2, 3)

    rest = {name: leaf for name, leaf in bank.items() if name not in ("key", "value")}
    return {**rest, "prefix": KV(project("key"), project("value"))}


def prefix(bank: Params, prompt_id: jax.Array | None, lm: Params, config: UnitLMConfig, compute: Compute) -> KV:
    """Deep prompts as the LM's prefix: exactly what the reference's prompt positions give.

    Args:
      bank: prompt trees, `projected` or not.
      prompt_id: int [B], row of the bank per utterance; None: member-major.
      lm: the LM's weights.
      config: its architecture.
      compute: operand type.

    Returns:
      KV of P columns, [L, B, H, P, Dh]; member-major, or of a bank of one, [L, N, H, P, Dh], which rows share.
    """
    known: KV = bank["prefix"] if "prefix" in bank else projected(bank, lm, config, compute)["prefix"]
    return jax.tree.map(lambda x: x if x.shape[1] == 1 or prompt_id is None else x[:, prompt_id], known)
