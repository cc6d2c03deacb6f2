"""Prompt trees: trained prompts, LoRA adapters (`low_rank`), or both, for one member or a bank of N members.

In a bank every leaf has a leading axis N. Each utterance of a batch has the index of its member, so that different
tasks and seeds share one forward pass.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key, Shaped

from spjax import vocab
from spjax.models import low_rank, unit_lm
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.split_kernel import gathered, recomputed
from spjax.models.verbalizers import Verbalizer
from spjax.types import KV, Params

STARTS = ("normal", "units", "zeros", "utterances", "class_means")
REAL_STARTS = ("utterances", "class_means")  # computed by the LM from utterances (`training.starts`)


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Shape and initialisation of a prompt tree.

    Attributes:
      length: P, prompt positions; 0: no prompt.
      deep: key/value prompts in every layer (prefix tuning); False: an input prompt.
      separators: S, trained vectors between units and labels; 1 in the published code.
      steer: add trained per-layer offsets to the separators' hidden states; not in the published code.
      dropout: rate on key and value prompts; one mask per step for all rows of a member.
      verbalizer_dropout: rate on the verbalizer's outputs.
      init: "normal"; "units": embeddings of random units; "zeros": values 0, keys as in "normal" (equal keys would get
        equal gradients); "utterances": the frozen LM's keys and values at a random column of a train utterance for each
        position; "class_means": their mean over utterances of one class for each position.
      init_scale: standard deviation of the "normal" init.
      sep_scale: standard deviation of the separators' init. The published 1.0 is sqrt(D) times that of embeddings.
      rank: r of the LoRA adapters; 0: no adapters.
      alpha: LoRA scaling; adapter outputs are multiplied by alpha / rank.
      targets: adapted kernels.
      lora_dropout: rate on the adapters' input.
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
    rank: int = 0
    alpha: float = 8.0
    targets: tuple[str, ...] = low_rank.TARGETS
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.length < 0 or self.separators < 1:
            raise ValueError(f"prompt: length {self.length} must be >= 0 and separators {self.separators} >= 1")
        for name in ("dropout", "verbalizer_dropout", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"prompt: {name} is {getattr(self, name)}, must be in [0, 1)")
        for name in ("init_scale", "sep_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"prompt: {name} is {getattr(self, name)}, must be finite and at least 0")
        if self.init not in STARTS:
            raise ValueError(f"prompt: init is {self.init!r}, must be one of {', '.join(STARTS)}")
        if self.init == "zeros" and not self.deep:
            raise ValueError(
                "prompt: init is 'zeros', which needs deep prompts: give another init, or prompt.deep=True"
            )
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        # Sorted, so that the order in the config does not matter; unknown names are rejected by low_rank.check.
        number = lambda name: low_rank.KNOWN.index(name) if name in low_rank.KNOWN else len(low_rank.KNOWN)  # noqa: E731
        object.__setattr__(self, "targets", tuple(sorted(targets, key=number)))
        try:
            if self.rank != 0:
                low_rank.check(self.rank, self.alpha, self.targets)
        except ValueError as error:
            raise ValueError(f"prompt: {error}") from error

    @property
    def scale(self) -> float:
        """LoRA scale, alpha / rank; 1 without adapters."""
        return self.alpha / self.rank if self.rank else 1.0

    @property
    def lora(self) -> dict[str, Any] | None:
        """LoRA settings for a pack's card; None without adapters."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)} if self.rank else None

    @property
    def sizes(self) -> dict[str, int]:
        """Prompt length and LoRA rank by display name."""
        length = {"prompt length": self.length} if self.length or not self.rank else {}
        return length | ({"LoRA rank": self.rank} if self.rank else {})


def init_member(
    rng: Key[jax.Array, ""],
    config: PromptConfig,
    lm: UnitLMConfig,
    verbalizer: Verbalizer,
    embed: Float[jax.Array, "V D"],
    real: Params | None = None,
) -> Params:
    """Initialise the prompt tree of one member (no bank axis).

    Args:
      rng: random key.
      config: shape and initialisation.
      lm: LM architecture.
      verbalizer: determines whether there is a verbalizer matrix, and its size.
      embed: [V, D], the LM's embedding, for `init="units"`.
      real: {"key", "value"} [L, P, D] or {"input"} [P, D], for the inits in `REAL_STARTS`.

    Raises:
      ValueError: an init in `REAL_STARTS` without `real`.
    """
    if config.init in REAL_STARTS and config.length and real is None:
        raise ValueError(f"prompt: init {config.init!r} needs train utterances: use spjax.training.starts")
    keys = iter(jax.random.split(rng, 5))

    def vectors(shape: tuple[int, ...]) -> jax.Array:
        key = next(keys)
        if config.init == "units":
            if lm.embed_dim:
                raise ValueError("prompt: init 'units' needs embeddings of the LM's width: give another prompt.init")
            rows = jax.random.randint(key, shape, vocab.UNIT_OFFSET, lm.vocab_size)
            return embed[rows].astype(jnp.float32) * lm.embed_scale
        return jax.random.normal(key, (*shape, lm.dim)) * config.init_scale

    # Other random values do not depend on `init`, so that members of one seed differ in it only.
    tree: Params = {}
    if config.rank and not config.length:
        pass
    elif config.deep:
        tree = {name: vectors((lm.layers, config.length)) for name in ("key", "value")}
    else:
        tree = {"input": vectors((config.length,))}
    if config.init == "zeros" and "value" in tree:
        tree["value"] = jnp.zeros_like(tree["value"])
    tree |= real or {}
    tree["sep"] = jax.random.normal(next(keys), (config.separators, lm.dim)) * config.sep_scale
    if config.steer:
        tree["sep_deep"] = jnp.zeros((lm.layers, config.separators, lm.dim))
    if verbalizer.learnable:
        # torch's init of a Linear(V, C + 4), as in the published code.
        bound = lm.vocab_size**-0.5
        shape = (verbalizer.outputs, lm.vocab_size)
        tree["verbalizer"] = jax.random.uniform(next(keys), shape, minval=-bound, maxval=bound)
    if config.rank:
        tree |= low_rank.init_member(jax.random.fold_in(rng, 0), config.rank, config.targets, lm)
    return tree


def shape_of(tree: Params) -> dict[str, Any]:
    """Fields of PromptConfig that describe the shape of a member's tree."""
    length = tree["key"].shape[1] if "key" in tree else len(tree.get("input", ()))
    targets = low_rank.targets_of(tree)
    return {
        "length": length,
        "deep": "input" not in tree,
        "separators": len(tree["sep"]),
        "steer": "sep_deep" in tree,
        "rank": tree[f"{targets[0]}_a"].shape[1] if targets else 0,
        "targets": targets,
    }


def stack(members: list[Params]) -> Params:
    """Stack members to a bank: every leaf gets a leading axis N."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


_FILLED = ("key", "value", *low_rank.LEAVES)  # leaves that some members of a bank may not have
_PADDED = ("verbalizer", *_FILLED)


def join(banks: list[Params]) -> Params:
    """Concatenate banks, with smaller leaves zero-padded.

    Padded are verbalizers with fewer outputs, and deep prompts and LoRA adapters of smaller length or rank, or absent.
    Padding has no effect if the members' real prompt lengths are passed to `prompted_lm.run`.
    """
    names = dict.fromkeys(itertools.chain(*banks))

    def padded(bank: Params, name: str) -> jax.Array:
        if name not in _PADDED:
            return bank[name]
        shapes = [other[name].shape[1:] for other in banks if name in other]
        leaf = (
            bank[name] if name in bank or name not in _FILLED else jnp.zeros((len(bank["sep"]), *[0] * len(shapes[0])))
        )
        return jnp.pad(leaf, [(0, 0), *((0, max(to) - n) for n, *to in zip(leaf.shape[1:], *shapes, strict=True))])

    return {name: jnp.concatenate([padded(bank, name) for bank in banks]) for name in names}


def part(bank: Params, start: int, stop: int, verbalizer: Verbalizer, config: PromptConfig) -> Params:
    """Slice members start .. stop - 1, of one task and one shape, from a joined bank and remove padding.

    Args:
      bank: prompt trees [N, ...], from `join`.
      start, stop: range of members.
      verbalizer: verbalizer of their task.
      config: shape of the members.
    """
    sliced = {name: leaf[start:stop] for name, leaf in bank.items()}
    if verbalizer.learnable:
        sliced["verbalizer"] = sliced["verbalizer"][:, : verbalizer.outputs]
    length, rank = config.length, config.rank
    size = dict.fromkeys(("key", "value") if length or not rank else (), length)
    size |= {f"{target}_{part}": rank for target in config.targets if rank for part in "ab"}
    kept = {name: leaf[:, :, : size[name]] if name in size else leaf for name, leaf in sliced.items()}
    return {name: leaf for name, leaf in kept.items() if name in size or name not in _FILLED}


def member(bank: Params, n: int) -> Params:
    """Member n of a bank as numpy arrays, without the bank axis."""
    return jax.tree.map(lambda leaf: np.asarray(leaf[n]), bank)


def rows_of(
    leaf: Shaped[jax.Array, " _ ..."], prompt_id: Int[jax.Array, " B"] | None, rows: int
) -> Shaped[jax.Array, " _ ..."]:
    """Gather a bank leaf [N, ...] for the rows of a batch: [B, ...], or [1, ...] for a bank of one.

    Args:
      leaf: leaf of a bank.
      prompt_id: int [B], member of each row; None: member-major.
      rows: B.
    """
    if leaf.shape[0] == 1:
        return leaf
    # repeat needs no gather, and no scatter-add in the backward pass.
    return jnp.repeat(leaf, rows // len(leaf), axis=0) if prompt_id is None else leaf[prompt_id]


def dropout(bank: Params, rate: float | Float[jax.Array, "#N"], keys: Key[jax.Array, " N"]) -> Params:
    """Apply dropout to key and value prompts, with one mask for each member that does not depend on padding.

    Args:
      bank: prompt trees [N, ...].
      rate: dropout rate, for all members or [N].
      keys: [N] random keys, one for each member.
    """
    if low_rank.is_zero(rate) or "key" not in bank:
        return bank
    rates = jnp.broadcast_to(jnp.asarray(rate, jnp.float32), keys.shape)

    def drop(leaf: jax.Array, salt: int) -> jax.Array:
        def one(key: jax.Array, x: jax.Array, rate: jax.Array) -> jax.Array:
            columns = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, salt), jnp.arange(x.shape[1]))
            draw = lambda column: jax.random.bernoulli(column, 1 - rate, (x.shape[0], x.shape[2]))  # noqa: E731
            return jnp.where(jax.vmap(draw, out_axes=1)(columns), x / (1 - rate), 0)

        return jax.vmap(one)(keys, leaf, rates)

    return {**bank, "key": drop(bank["key"], 0), "value": drop(bank["value"], 1)}


def projected(bank: Params, lm: Params, config: UnitLMConfig, compute: Compute) -> Params:
    """Project deep prompts with the LM's key and value kernels (key = W_k p + b_k), once for all batches.

    LoRA adapters of W_k and W_v are applied to prompts as to other columns. Keys of prompts have no position: with
    rotary positions they are not rotated.

    Args:
      bank: prompt trees [N, ...], from `low_rank.scaled`; input prompts give an empty prefix.
      lm: LM weights.
      config: LM architecture.
      compute: operand dtype.

    Returns:
      The bank with `prefix`, KV [L, N, G, P, Dh], instead of `key` and `value`; for the forward pass only.
    """

    adapters = low_rank.from_bank(bank, None)

    def project(name: str) -> jax.Array:
        leaf = bank[name] if name in bank else jnp.zeros((len(bank["sep"]), config.layers, 0, config.dim))
        weights = lm["layers"][name]

        def layer(p: jax.Array, weights: Params, lora: low_rank.Lora) -> jax.Array:
            x = unit_lm.dense(gathered(weights), p, compute)
            return x + lora.up(name, lora.down("attention", p, 0, compute.operand), compute.operand)

        layer = recomputed(layer, weights)
        # A scan over layers, so that only one layer of a sharded kernel is gathered at a time.
        layers = (jnp.swapaxes(leaf, 0, 1), weights, adapters)
        x = jax.lax.scan(lambda _, each: (None, layer(*each)), None, layers)[1]
        return jnp.swapaxes(x.reshape(*x.shape[:-1], config.key_heads, config.head_dim), 2, 3)

    rest = {name: leaf for name, leaf in bank.items() if name not in ("key", "value")}
    return {**rest, "prefix": KV(project("key"), project("value"))}


def prefix(
    bank: Params, prompt_id: Int[jax.Array, " B"] | None, lm: Params, config: UnitLMConfig, compute: Compute
) -> KV:
    """Make the LM's key/value prefix from deep prompts, equal to the prompt positions of the published code.

    Args:
      bank: prompt trees, before or after `projected`.
      prompt_id: int [B], member of each row; None: member-major.
      lm: LM weights.
      config: LM architecture.
      compute: operand dtype.

    Returns:
      KV of P columns, [L, B, G, P, Dh]; for member-major batches or a bank of one [L, N, G, P, Dh], shared by rows.
    """
    known: KV = bank["prefix"] if "prefix" in bank else projected(bank, lm, config, compute)["prefix"]
    return jax.tree.map(lambda x: x if x.shape[1] == 1 or prompt_id is None else x[:, prompt_id], known)
