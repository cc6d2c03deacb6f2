"""Decoding: the scores of every label combination, and greedy labels. One prefill, then cached steps, batched."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spjax import vocab
from spjax.models import prompted_lm, prompts, streams, unit_lm
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.unit_lm import FLOAT32
from spjax.models.verbalizers import Verbalizer
from spjax.types import KV, Batch, Params

MOST_COMBINATIONS = 8192


@dataclasses.dataclass(frozen=True, eq=False)
class LabelTree:
    """What an utterance's label steps may say, as a tree: equal beginnings are computed once.

    Attributes:
      combinations: int32 [M, slots], class ids of each allowed answer.
      feeds: for each depth 1 .. K - 1, int32 [J], tokens that its nodes feed back.
      parents: for each depth, int32 [J], the node's parent among the nodes of the depth above.
      path: int32 [M, K], node of each answer at depth 0 .. K - 1.
      codes: int32 [M, K], output that it says there.
      allowed: bool [K, outputs], what any label of a step's slot says there.
    """

    combinations: np.ndarray
    feeds: list[np.ndarray]
    parents: list[np.ndarray]
    path: np.ndarray
    codes: np.ndarray
    allowed: np.ndarray


def label_tree(verbalizer: Verbalizer, combinations: Sequence[Sequence[int]] | np.ndarray | None) -> LabelTree:
    """The tree of the given combinations of class ids (those seen in training, say), or of all of them.

    Raises:
      ValueError: no combinations are given and there are too many to score each, or they do not fit the slots.
    """
    if combinations is None:
        ranges = [range(a, b) for a, b in itertools.pairwise(verbalizer.slot_offsets)]
        count = int(np.prod([len(r) for r in ranges], dtype=float))
        if count > MOST_COMBINATIONS:
            raise ValueError(f"{count} label combinations are too many to score each: name those that can occur")
        combinations = list(itertools.product(*ranges))
    combos = np.unique(np.asarray(combinations, np.int32), axis=0)
    starts, stops = np.asarray(verbalizer.slot_offsets[:-1]), np.asarray(verbalizer.slot_offsets[1:])
    if combos.ndim != 2 or combos.shape[1] != len(starts) or not ((combos >= starts) & (combos < stops)).all():
        raise ValueError(f"the label combinations do not fit {len(starts)} slots of classes {starts}..{stops - 1}")
    codes = verbalizer.codes[combos].reshape(len(combos), -1)
    tokens = verbalizer.feeds[combos].reshape(len(combos), -1)
    path = np.zeros_like(codes)
    feeds, parents = [], []
    for depth in range(1, verbalizer.steps):
        # A node is a beginning of codes: feeds may be shared by classes, codes never are.
        _, first, node = np.unique(codes[:, :depth], axis=0, return_index=True, return_inverse=True)
        path[:, depth] = node.reshape(-1)
        feeds.append(tokens[first, depth - 1])
        parents.append(path[first, depth - 1])
    return LabelTree(combos, feeds, parents, path, codes, verbalizer.allowed)


class Tables(NamedTuple):
    """Trees side by side, filled up to the largest: a leading axis of trees, and lists by depth."""

    feeds: list[np.ndarray]  # int32 [trees, J]
    sees: list[np.ndarray]  # bool [trees, J, J of this depth and all above], columns that a node sees
    path: np.ndarray  # int32 [trees, M, K]
    codes: np.ndarray  # int32 [trees, M, K]
    allowed: np.ndarray  # bool [trees, K, outputs]
    steps: np.ndarray  # int32 [trees]
    real: np.ndarray  # bool [trees, M]


def tables(trees: Sequence[LabelTree], multiple: int = 1) -> Tables:
    """What `score` takes of trees. Sizes but for label steps are multiples of `multiple`: few, so few programs."""

    def filled(arrays: Sequence[np.ndarray], axis: int = 0) -> np.ndarray:
        shape = np.max([array.shape for array in arrays], axis=0)
        shape[axis] = -(-shape[axis] // multiple) * multiple
        return np.stack([np.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)]) for x in arrays])

    nothing = np.zeros(0, np.int32)
    feeds, sees = [], []
    above = np.zeros((len(trees), 1, 0), bool)
    for depth in range(max(len(tree.feeds) for tree in trees)):
        here = [
            (tree.feeds[depth], tree.parents[depth]) if depth < len(tree.feeds) else (nothing,) * 2 for tree in trees
        ]
        fed, parents = (filled(arrays) for arrays in zip(*here, strict=True))
        own = np.broadcast_to(np.eye(fed.shape[1], dtype=bool), (len(trees), *[fed.shape[1]] * 2))
        above = np.concatenate([np.take_along_axis(above, parents[:, :, None], axis=1), own], axis=2)
        feeds.append(fed)
        sees.append(above)
    path, codes = (filled([getattr(tree, name) for tree in trees]) for name in ("path", "codes"))
    allowed = filled([tree.allowed for tree in trees], axis=1)
    steps = np.asarray([tree.codes.shape[1] for tree in trees])
    return Tables(feeds, sees, path, codes, allowed, steps, filled([np.ones(len(tree.codes), bool) for tree in trees]))


def score(
    lm: Params,
    bank: Params,
    batch: Batch,
    trees: Sequence[LabelTree] | Tables,
    *,
    config: UnitLMConfig,
    compute: Compute = FLOAT32,
    lengths: Sequence[int] | None = None,
) -> jax.Array:
    """Log probability of every combination of a row's tree, float32 [B, M]; they sum to one over the tree.

    Each label step is normalised over the labels of its slot, as in training.

    Args:
      lm: the LM's weights.
      bank: prompt trees [N, ...], `low_rank.scaled`.
      batch: B utterances; their classes are not looked at.
      trees: what may be said, a tree for each member of the bank, whose tasks may differ, or one for all. Where a tree
        has fewer combinations than another, the rest of its rows is -inf. Their tables may have more outputs than the
        verbalizers, none of them allowed.
      config: the LM's architecture.
      compute: operand type.
      lengths: columns that each member's prompt really has, where they differ.
    """
    grove = trees if isinstance(trees, Tables) else tables(trees)
    nothing = jnp.zeros((len(batch.last), 0), jnp.int32)
    state = prompted_lm.run(lm, bank, batch, nothing, config=config, queries=1, compute=compute, lengths=lengths)
    base, rows = state.position, jnp.arange(len(batch.last))[:, None]
    # One tree for all rows needs no gather by row.
    own = prompts.rows_of(jnp.arange(len(grove.path)), batch.prompt_id, len(batch.last))
    path, codes, steps = (jnp.asarray(table)[own] for table in (grove.path, grove.codes, grove.steps))

    def said(hidden: jax.Array, depth: int) -> jax.Array:
        scores = prompted_lm.outputs(lm, bank, hidden, batch.prompt_id, compute)
        allowed = jnp.asarray(grove.allowed[:, depth])[own][:, None]
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, allowed.shape[2] - scores.shape[2])))
        log_probs = jax.nn.log_softmax(jnp.where(allowed, scores, jnp.finfo(jnp.float32).min))
        return jnp.where(depth < steps[:, None], log_probs[rows, path[:, :, depth], codes[:, :, depth]], 0)

    total = said(state.hidden, 0)
    for depth, (feeds, sees) in enumerate(zip(grove.feeds, grove.sees, strict=True), 1):
        positions = jnp.broadcast_to(base[:, None] + depth - 1, (len(base), feeds.shape[1]))
        tokens, seen = jnp.asarray(feeds)[own], jnp.asarray(sees)[own]
        state = prompted_lm.step(lm, state, tokens, seen, positions, config=config, compute=compute)
        total = total + said(state.hidden, depth)
    return jax.nn.log_softmax(jnp.where(jnp.asarray(grove.real)[own], total, -jnp.inf))


def slot_probabilities(log_probs: np.ndarray, tree: LabelTree, slot_offsets: Sequence[int]) -> list[np.ndarray]:
    """Probability of every label of every slot: [B, M] log probabilities to a float32 [B, C_k] a slot."""
    probabilities = np.exp(log_probs.astype(np.float64))
    found = []
    for slot, (start, stop) in enumerate(itertools.pairwise(slot_offsets)):
        says = tree.combinations[:, slot][:, None] == np.arange(start, stop)
        found.append((probabilities @ says).astype(np.float32))
    return found


def greedy(
    lm: Params,
    bank: Params,
    batch: Batch,
    *,
    max_steps: int,
    verbalizer: Verbalizer,
    config: UnitLMConfig,
    compute: Compute = FLOAT32,
    constrained: bool = False,
) -> jax.Array:
    """The likeliest output at each step, fed back, until EOS.

    Args:
      lm: the LM's weights.
      bank: prompt trees [N, ...], `low_rank.scaled`.
      batch: B utterances.
      max_steps: J, most steps.
      verbalizer: classes to outputs.
      config: the LM's architecture.
      compute: operand type.
      constrained: only say what some label of the slot says at this step (`max_steps` must be K); the reference says
        anything. Where a label takes several steps, what is said may spell none: `score` knows only real labels.

    Returns:
      int32 [B, J] outputs; EOS from the end on.
    """
    if constrained and max_steps != verbalizer.steps:
        raise ValueError(f"constrained greedy decoding takes {verbalizer.steps} steps, not {max_steps}")
    rows = len(batch.last)
    nothing = jnp.zeros((rows, 0), jnp.int32)
    first = prompted_lm.run(lm, bank, batch, nothing, config=config, queries=1, compute=compute)
    columns = first.visible.shape[1]
    room = [(0, 0), (0, 0), (0, 0), (0, max_steps), (0, 0)]
    cache = jax.tree.map(lambda x: jnp.pad(x, room), prompted_lm.joined(first.cache))
    visible = jnp.pad(first.visible, ((0, 0), (0, max_steps)))
    table = jnp.asarray(unit_lm.sinusoids(config.first_position + columns + max_steps + 1, config.dim))
    nothing_said = streams.embed(lm, config, streams.NO_SPEECH)
    separator = prompts.rows_of(bank["sep"][:, -1:], batch.prompt_id, rows) * config.dim**0.5
    token_of = np.arange(max(verbalizer.outputs, config.vocab_size), dtype=np.int32)
    token_of[verbalizer.codes] = verbalizer.feeds

    def say(hidden: jax.Array, step: jax.Array) -> jax.Array:
        scores = prompted_lm.outputs(lm, bank, hidden, batch.prompt_id, compute)[:, 0]
        if constrained:
            scores = jnp.where(jnp.asarray(verbalizer.allowed)[step], scores, -jnp.inf)
        return jnp.argmax(scores, axis=1).astype(jnp.int32)

    def body(carry: tuple[jax.Array, jax.Array, KV, jax.Array]) -> tuple[jax.Array, jax.Array, KV, jax.Array]:
        step, said, cache, visible = carry
        token = jnp.asarray(token_of)[said[:, step - 1]][:, None]
        # A separator that is said again is the trained vector again, as in the reference.
        x = jnp.where((token == vocab.BOS)[..., None], separator, unit_lm.embed_tokens(lm, token))
        x = x + nothing_said + table[first.position + step - 1][:, None]
        mask = jnp.concatenate([visible, jnp.ones((rows, 1), bool)], axis=1)[:, None]
        hidden, new = unit_lm.extend(lm, config, (x,), cache, mask, lora=first.lora, compute=compute)
        at = columns + step - 1
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=3)  # noqa: E731
        cache = jax.tree.map(write, cache, new)
        visible = jax.lax.dynamic_update_slice_in_dim(visible, jnp.ones((rows, 1), bool), at, axis=1)
        over = (said == vocab.EOS).any(axis=1)
        said = said.at[:, step].set(jnp.where(over, vocab.EOS, say(hidden, step)))
        return step + 1, said, cache, visible

    said = jnp.full((rows, max_steps), -1, jnp.int32).at[:, 0].set(say(first.hidden, jnp.zeros((), jnp.int32)))
    more = lambda carry: (carry[0] < max_steps) & ~(carry[1] == vocab.EOS).any(axis=1).all()  # noqa: E731
    _, said, _, _ = jax.lax.while_loop(more, body, (jnp.ones((), jnp.int32), said, cache, visible))
    return jnp.where(said < 0, vocab.EOS, said)
