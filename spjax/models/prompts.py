"""What is trained: prompts, low-rank adapters (`low_rank`), or both. How a member is made, and what the LM takes of it.

A member's tree is called a prompt tree, with or without adapters in it. It carries a bank axis N in front of every leaf
(a single prompt is a bank of one); each utterance names its row of the bank, so that a batch of mixed tasks and seeds
is one forward pass.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spjax import vocab
from spjax.models import low_rank
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.contract import contract
from spjax.models.split_kernel import gathered, recomputed
from spjax.models.verbalizers import Verbalizer
from spjax.types import KV, Params

STARTS = ("normal", "units", "zeros", "utterances", "class_means")
REAL_STARTS = ("utterances", "class_means")  # made of what the LM makes of utterances (`training.starts`)


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Shape and start of a member: its prompt, its low-rank adapters of the LM's kernels, or both.

    Attributes:
      length: P, virtual positions of every layer; 0 for none.
      deep: key/value prompts in every layer; False is the shallow input prompt.
      separators: S, trained vectors between units and labels; the reference has one.
      steer: separators also get a trained vector added in every layer (ours; the reference has none).
      dropout: rate on key and value prompts, one mask a step for a member's whole batch.
      verbalizer_dropout: rate on the verbalizer's outputs.
      init: start of the prompt. "normal"; "units": embeddings of sampled units; "zeros": keys as in "normal", values 0
        (keys alike would stay alike); "utterances": each position a column of a train utterance, with the keys and
        values that the frozen LM has there; "class_means": each position the mean over utterances of a class.
      init_scale: standard deviation of a normal start.
      sep_scale: standard deviation of the separators' start; the reference's 1.0 is sqrt(D) times a unit vector's.
      rank: r of the low-rank adapters; 0 for none.
      alpha: what they add is multiplied by alpha / rank.
      targets: the kernels that have one.
      lora_dropout: rate on their input.
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
                raise ValueError(f"prompt: {name} is {getattr(self, name)}, must lie in [0, 1)")
        for name in ("init_scale", "sep_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"prompt: {name} is {getattr(self, name)}, must not be negative, nor infinite")
        if self.init not in STARTS:
            raise ValueError(f"prompt: init is {self.init!r}, must be one of {', '.join(STARTS)}")
        if self.init == "zeros" and not self.deep:
            raise ValueError("prompt: init is 'zeros', which is a start of deep prompts: input prompts need another")
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        # In one order, whatever the order in which a config names them; what is unknown stays, and is refused.
        number = lambda name: low_rank.TARGETS.index(name) if name in low_rank.TARGETS else len(low_rank.TARGETS)  # noqa: E731
        object.__setattr__(self, "targets", tuple(sorted(targets, key=number)))
        try:
            if self.rank != 0:
                low_rank.check(self.rank, self.alpha, self.targets)
        except ValueError as error:
            raise ValueError(f"prompt: {error}") from error

    @property
    def scale(self) -> float:
        """What the low-rank adapters add is multiplied by this: alpha / rank."""
        return self.alpha / self.rank if self.rank else 1.0

    @property
    def lora(self) -> dict[str, Any] | None:
        """What a pack's card says of the low-rank adapters; None where there are none."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)} if self.rank else None

    @property
    def sizes(self) -> dict[str, int]:
        """What says how large it is, in words."""
        return {"prompt length": self.length} | ({"LoRA rank": self.rank} if self.rank else {})


def init_member(
    rng: jax.Array,
    config: PromptConfig,
    lm: UnitLMConfig,
    verbalizer: Verbalizer,
    embed: jax.Array,
    real: Params | None = None,
) -> Params:
    """One member's fresh prompt tree (no bank axis).

    Args:
      rng: the member's key.
      config: shape and start.
      lm: architecture of the unit LM.
      verbalizer: tells whether there is a matrix, and its size.
      embed: [V, D], the LM's embedding, for `init="units"`.
      real: "key" and "value" [L, P, D], or "input" [P, D], for the starts that are made of utterances.

    Raises:
      ValueError: such a start without `real`.
    """
    if config.init in REAL_STARTS and config.length and real is None:
        raise ValueError(f"prompt: init {config.init!r} needs train utterances: see spjax.training.starts")
    keys = iter(jax.random.split(rng, 5))

    def vectors(shape: tuple[int, ...]) -> jax.Array:
        key = next(keys)
        if config.init == "units":
            rows = jax.random.randint(key, shape, vocab.UNIT_OFFSET, lm.vocab_size)
            return embed[rows].astype(jnp.float32) * lm.dim**0.5
        return jax.random.normal(key, (*shape, lm.dim)) * config.init_scale

    # What else is random does not depend on the prompt's start: members of one seed differ in it alone.
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
        # torch's start of a Linear(V, C + 4), as the reference has it.
        bound = lm.vocab_size**-0.5
        shape = (verbalizer.outputs, lm.vocab_size)
        tree["verbalizer"] = jax.random.uniform(next(keys), shape, minval=-bound, maxval=bound)
    if config.rank:
        tree |= low_rank.init_member(jax.random.fold_in(rng, 0), config.rank, config.targets, lm)
    return tree


def shape_of(tree: Params) -> dict[str, Any]:
    """The fields of PromptConfig that say what shape a member's tree has."""
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
    """A bank of the members, in order: every leaf gets a leading axis N."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


_FILLED = ("key", "value", *low_rank.LEAVES)  # leaves that a member may lack where another has them
_PADDED = ("verbalizer", *_FILLED)


def join(banks: list[Params]) -> Params:
    """One bank of several, in order. What is filled up nothing reads, as long as members' lengths are given where run.

    Verbalizers of fewer outputs, deep prompts of fewer columns and low-rank adapters of a lower rank than another's are
    filled up with zeros; so are members that have none of the latter two.
    """
    names = dict.fromkeys(itertools.chain(*banks))

    def filled(bank: Params, name: str) -> jax.Array:
        if name not in _PADDED:
            return bank[name]
        shapes = [other[name].shape[1:] for other in banks if name in other]
        leaf = (
            bank[name] if name in bank or name not in _FILLED else jnp.zeros((len(bank["sep"]), *[0] * len(shapes[0])))
        )
        return jnp.pad(leaf, [(0, 0), *((0, max(to) - n) for n, *to in zip(leaf.shape[1:], *shapes, strict=True))])

    return {name: jnp.concatenate([filled(bank, name) for bank in banks]) for name in names}


def part(bank: Params, start: int, stop: int, verbalizer: Verbalizer, config: PromptConfig) -> Params:
    """Members start .. stop - 1 of a joined bank, all of one task and one shape: what was filled up is gone.

    Args:
      bank: prompt trees [N, ...].
      start, stop: rows.
      verbalizer: of their task.
      config: their shape.
    """
    own = {name: leaf[start:stop] for name, leaf in bank.items()}
    if verbalizer.learnable:
        own["verbalizer"] = own["verbalizer"][:, : verbalizer.outputs]
    length, rank = config.length, config.rank
    size = dict.fromkeys(("key", "value") if length or not rank else (), length)
    size |= {f"{target}_{part}": rank for target in config.targets if rank for part in "ab"}
    kept = {name: leaf[:, :, : size[name]] if name in size else leaf for name, leaf in own.items()}
    return {name: leaf for name, leaf in kept.items() if name in size or name not in _FILLED}


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


def dropout(bank: Params, rate: float | jax.Array, keys: jax.Array) -> Params:
    """Key and value prompts with dropout; one mask a member, the same however long others' prompts are.

    Args:
      bank: prompt trees [N, ...].
      rate: of all members, or [N] of each.
      keys: [N] one random key a member, so that a member drops the same alone and in a bank.
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
    """The bank with its deep prompts as what the LM makes of them, once for all batches: key = W_k p + b_k.

    A member's own low-rank adapters of W_k and W_v are part of them: prompts are columns like others.

    Args:
      bank: prompt trees [N, ...], `low_rank.scaled`; shallow ones give an empty prefix.
      lm: the LM's weights.
      config: its architecture.
      compute: operand type.

    Returns:
      The bank with `prefix`, KV [L, N, H, P, Dh], in place of `key` and `value`: to be run, not trained or stored.
    """

    adapters = low_rank.of_bank(bank, None)

    def project(name: str) -> jax.Array:
        leaf = bank[name] if name in bank else jnp.zeros((len(bank["sep"]), config.layers, 0, config.dim))
        weights = lm["layers"][name]

        def layer(p: jax.Array, weights: Params, lora: low_rank.Lora) -> jax.Array:
            whole = gathered(weights)
            x = contract("npd,de->npe", p, whole["kernel"], compute.operand) + whole["bias"]
            return x + lora.up(name, lora.down("attention", p, 0, compute.operand), compute.operand)

        layer = recomputed(layer, weights)
        # Layer by layer: of a kernel in pieces no more than a layer is ever put together.
        layers = (jnp.swapaxes(leaf, 0, 1), weights, adapters)
        x = jax.lax.scan(lambda _, each: (None, layer(*each)), None, layers)[1]
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
