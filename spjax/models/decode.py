"""Batched decoding with a KV cache: scores of all label combinations, and greedy decoding."""

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
    """Trie of the allowed output sequences of an utterance; common prefixes are computed once.

    Attributes:
      combinations: int32 [M, slots], class ids of each allowed label combination.
      fed_back: for each depth 1 .. K - 1, int32 [J], token fed back at each node.
      parents: for each depth 1 .. K - 1, int32 [J], index of each node's parent at the depth before.
      path: int32 [M, K], node of each combination at depth 0 .. K - 1.
      codes: int32 [M, K], output id of each combination at depth 0 .. K - 1.
      allowed: bool [K, outputs], outputs that some label of the slot has at each step.
    """

    combinations: np.ndarray
    fed_back: list[np.ndarray]
    parents: list[np.ndarray]
    path: np.ndarray
    codes: np.ndarray
    allowed: np.ndarray


def label_tree(verbalizer: Verbalizer, combinations: Sequence[Sequence[int]] | np.ndarray | None) -> LabelTree:
    """Make the trie of the given label combinations, or of all of them.

    Args:
      verbalizer: encoding of the classes.
      combinations: int [M, slots], class ids, e.g. those in train; None: all.

    Raises:
      ValueError: more than `MOST_COMBINATIONS` combinations, or combinations that do not fit the slots.
    """
    if combinations is None:
        ranges = [range(a, b) for a, b in itertools.pairwise(verbalizer.slot_offsets)]
        count = int(np.prod([len(r) for r in ranges], dtype=float))
        if count > MOST_COMBINATIONS:
            raise ValueError(f"{count} label combinations are too many to score: give those that can occur")
        combinations = list(itertools.product(*ranges))
    combos = np.unique(np.asarray(combinations, np.int32), axis=0)
    starts, stops = np.asarray(verbalizer.slot_offsets[:-1]), np.asarray(verbalizer.slot_offsets[1:])
    if combos.ndim != 2 or combos.shape[1] != len(starts) or not ((combos >= starts) & (combos < stops)).all():
        raise ValueError(f"the label combinations do not fit {len(starts)} slots of classes {starts}..{stops - 1}")
    codes = verbalizer.codes[combos].reshape(len(combos), -1)
    tokens = verbalizer.fed_back[combos].reshape(len(combos), -1)
    path = np.zeros_like(codes)
    fed_back, parents = [], []
    for depth in range(1, verbalizer.steps):
        # A node is a prefix of codes, which are unique to a class; fed-back tokens may be shared.
        _, first, node = np.unique(codes[:, :depth], axis=0, return_index=True, return_inverse=True)
        path[:, depth] = node.reshape(-1)
        fed_back.append(tokens[first, depth - 1])
        parents.append(path[first, depth - 1])
    return LabelTree(combos, fed_back, parents, path, codes, verbalizer.allowed)


class BatchedTrees(NamedTuple):
    """Label trees padded to a common size, with a leading axis of trees; lists are by depth."""

    fed_back: list[np.ndarray]  # int32 [trees, J]
    masks: list[np.ndarray]  # bool [trees, J, J of this depth and all before], columns that a node attends to
    path: np.ndarray  # int32 [trees, M, K]
    codes: np.ndarray  # int32 [trees, M, K]
    allowed: np.ndarray  # bool [trees, K, outputs]
    steps: np.ndarray  # int32 [trees]
    real: np.ndarray  # bool [trees, M]


def batch_trees(trees: Sequence[LabelTree], multiple: int = 1) -> BatchedTrees:
    """Pad and stack trees for `score`, to sizes that are multiples of `multiple` so that few programs are compiled."""

    def filled(arrays: Sequence[np.ndarray], axis: int = 0) -> np.ndarray:
        shape = np.max([array.shape for array in arrays], axis=0)
        shape[axis] = -(-shape[axis] // multiple) * multiple
        return np.stack([np.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)]) for x in arrays])

    empty = np.zeros(0, np.int32)
    fed_back, masks = [], []
    above = np.zeros((len(trees), 1, 0), bool)
    for depth in range(max(len(tree.fed_back) for tree in trees)):
        here = [
            (tree.fed_back[depth], tree.parents[depth]) if depth < len(tree.fed_back) else (empty,) * 2
            for tree in trees
        ]
        fed, parents = (filled(arrays) for arrays in zip(*here, strict=True))
        own = np.broadcast_to(np.eye(fed.shape[1], dtype=bool), (len(trees), *[fed.shape[1]] * 2))
        above = np.concatenate([np.take_along_axis(above, parents[:, :, None], axis=1), own], axis=2)
        fed_back.append(fed)
        masks.append(above)
    path, codes = (filled([getattr(tree, name) for tree in trees]) for name in ("path", "codes"))
    allowed = filled([tree.allowed for tree in trees], axis=1)
    steps = np.asarray([tree.codes.shape[1] for tree in trees])
    return BatchedTrees(
        fed_back, masks, path, codes, allowed, steps, filled([np.ones(len(tree.codes), bool) for tree in trees])
    )


def score(
    lm: Params,
    bank: Params,
    batch: Batch,
    trees: Sequence[LabelTree] | BatchedTrees,
    *,
    config: UnitLMConfig,
    compute: Compute = FLOAT32,
    lengths: Sequence[int] | None = None,
) -> jax.Array:
    """Log probability of every label combination of a row's tree, float32 [B, M], normalised over the tree.

    Each label step is normalised over the labels of its slot, as in training.

    Args:
      lm: LM weights.
      bank: prompt trees [N, ...], from `low_rank.scaled`.
      batch: B utterances; their classes are ignored.
      trees: label trees, one for each member of the bank or one for all. Padded combinations have -inf. Padded trees
        may have more outputs than the verbalizers; these are not allowed.
      config: LM architecture.
      compute: operand dtype.
      lengths: [N], prompt length of each member, if they differ.
    """
    batched = trees if isinstance(trees, BatchedTrees) else batch_trees(trees)
    nothing = jnp.zeros((len(batch.last), 0), jnp.int32)
    state = prompted_lm.run(lm, bank, batch, nothing, config=config, queries=1, compute=compute, lengths=lengths)
    base, rows = state.position, jnp.arange(len(batch.last))[:, None]
    # A single tree is broadcast instead of gathered by row.
    row_tree = prompts.rows_of(jnp.arange(len(batched.path)), batch.prompt_id, len(batch.last))
    path, codes, steps = (jnp.asarray(table)[row_tree] for table in (batched.path, batched.codes, batched.steps))

    def step_log_probs(hidden: jax.Array, depth: int) -> jax.Array:
        scores = prompted_lm.outputs(lm, bank, hidden, batch.prompt_id, compute)
        allowed = jnp.asarray(batched.allowed[:, depth])[row_tree][:, None]
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, allowed.shape[2] - scores.shape[2])))
        log_probs = jax.nn.log_softmax(jnp.where(allowed, scores, jnp.finfo(jnp.float32).min))
        return jnp.where(depth < steps[:, None], log_probs[rows, path[:, :, depth], codes[:, :, depth]], 0)

    total = step_log_probs(state.hidden, 0)
    for depth, (fed_back, mask) in enumerate(zip(batched.fed_back, batched.masks, strict=True), 1):
        positions = jnp.broadcast_to(base[:, None] + depth - 1, (len(base), fed_back.shape[1]))
        tokens, seen = jnp.asarray(fed_back)[row_tree], jnp.asarray(mask)[row_tree]
        state = prompted_lm.step(lm, state, tokens, seen, positions, config=config, compute=compute)
        total = total + step_log_probs(state.hidden, depth)
    return jax.nn.log_softmax(jnp.where(jnp.asarray(batched.real)[row_tree], total, -jnp.inf))


def slot_probabilities(log_probs: np.ndarray, tree: LabelTree, slot_offsets: Sequence[int]) -> list[np.ndarray]:
    """Marginal label probabilities of each slot: log probabilities [B, M] to a float32 [B, C_k] for each slot."""
    probabilities = np.exp(log_probs.astype(np.float64))
    found = []
    for slot, (start, stop) in enumerate(itertools.pairwise(slot_offsets)):
        has_label = tree.combinations[:, slot][:, None] == np.arange(start, stop)
        found.append((probabilities @ has_label).astype(np.float32))
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
    """Greedy decoding until EOS.

    Args:
      lm: LM weights.
      bank: prompt trees [N, ...], from `low_rank.scaled`.
      batch: B utterances.
      max_steps: J, maximum number of steps.
      verbalizer: maps classes to outputs.
      config: LM architecture.
      compute: operand dtype.
      constrained: at each step allow only outputs of some label of the slot (`max_steps` must be K); the published code
        is unconstrained. Labels of several steps may still decode to no label; `score` does not have this problem.

    Returns:
      int32 [B, J] output ids; EOS from the end on.
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
    no_speech = streams.embed(lm, config, streams.NO_SPEECH)
    separator = prompts.rows_of(bank["sep"][:, -1:], batch.prompt_id, rows) * config.embed_scale
    token_of = np.arange(max(verbalizer.outputs, config.vocab_size), dtype=np.int32)
    token_of[verbalizer.codes] = verbalizer.fed_back

    def pick(hidden: jax.Array, step: jax.Array) -> jax.Array:
        scores = prompted_lm.outputs(lm, bank, hidden, batch.prompt_id, compute)[:, 0]
        scores = scores if verbalizer.learnable else unit_lm.mask_absent(scores, config)
        if constrained:
            scores = jnp.where(jnp.asarray(verbalizer.allowed)[step], scores, -jnp.inf)
        return jnp.argmax(scores, axis=1).astype(jnp.int32)

    def body(carry: tuple[jax.Array, jax.Array, KV, jax.Array]) -> tuple[jax.Array, jax.Array, KV, jax.Array]:
        step, chosen, cache, visible = carry
        token = jnp.asarray(token_of)[chosen[:, step - 1]][:, None]
        # A decoded separator is fed back as the trained vector, as in the published code.
        embedded = unit_lm.embed_tokens(lm, token, scaled=config.scale_embedding)
        x = jnp.where((token == vocab.BOS)[..., None], separator, embedded)
        position = (first.position + step - 1)[:, None]
        x = x + no_speech + unit_lm.embed_positions(lm, config, position, columns + max_steps + 1)
        mask = jnp.concatenate([visible, jnp.ones((rows, 1), bool)], axis=1)[:, None]
        hidden, new = unit_lm.extend(lm, config, (x,), cache, mask, lora=first.lora, compute=compute, position=position)
        at = columns + step - 1
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=3)  # noqa: E731
        cache = jax.tree.map(write, cache, new)
        visible = jax.lax.dynamic_update_slice_in_dim(visible, jnp.ones((rows, 1), bool), at, axis=1)
        ended = (chosen == vocab.EOS).any(axis=1)
        chosen = chosen.at[:, step].set(jnp.where(ended, vocab.EOS, pick(hidden, step)))
        return step + 1, chosen, cache, visible

    chosen = jnp.full((rows, max_steps), -1, jnp.int32).at[:, 0].set(pick(first.hidden, jnp.zeros((), jnp.int32)))
    more = lambda carry: (carry[0] < max_steps) & ~(carry[1] == vocab.EOS).any(axis=1).all()  # noqa: E731
    _, chosen, _, _ = jax.lax.while_loop(more, body, (jnp.ones((), jnp.int32), chosen, cache, visible))
    return jnp.where(chosen < 0, vocab.EOS, chosen)
