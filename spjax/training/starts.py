"""Prompts that start as real keys and values: those that the frozen LM has at columns of train utterances."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from spjax.training import pooling, train
from spjax.types import Params

MEAN_OF = 8  # utterances of a class whose mean a position is; drawn anew for each, so that no two are alike


def from_utterances(lm: Params, lesson: train.Lesson, run: train.TrainConfig, mesh: Any) -> list[Params]:
    """Prompts for the members of a lesson to start with, one a seed, as its `init` says: one of `REAL_STARTS`.

    They depend on the lesson's train utterances, its prompt length and the seed alone.

    Args:
      lm: the LM's weights on the devices, as `sharding.layerwise` gives them.
      lesson: what is learnt.
      run: seeds and size of batches.
      mesh: of the devices.

    Returns:
      "key" and "value", float32 [L, P, D], or of an input prompt "input", [P, D].
    """
    setting, prompt = lesson.setting, lesson.setting.prompt
    draw = {"utterances": _positions, "class_means": _class_means}[prompt.init]
    train_set, rngs = lesson.train_set.take(lesson.train_ids), map(np.random.default_rng, run.seeds)
    drawn = [draw(rng, train_set.lengths, train_set.classes, prompt.length) for rng in rngs]
    asked = np.stack([np.stack(one) for one in drawn], axis=1)  # [2, seeds, P, columns of a position]
    (ids, columns), number = np.unique(asked.reshape(2, -1), axis=1, return_inverse=True)
    units = train_set.take(ids)
    plan = train.evaluation_plan(lesson, run, units, np.arange(len(ids)), mesh)
    states = pooling.layer_inputs(lm, setting.config, units, plan, mesh, setting.compute, columns, prompt.deep)
    found = states[:, number.reshape(asked.shape[1:])].mean(axis=3)  # [L, seeds, P, D]
    if prompt.deep:
        return [{name: jnp.asarray(found[:, n]) for name in ("key", "value")} for n in range(len(run.seeds))]
    return [{"input": jnp.asarray(found[0, n])} for n in range(len(run.seeds))]


def _positions(
    rng: np.random.Generator, lengths: np.ndarray, classes: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Utterances and their columns, [P, 1] each: units drawn from all that there are, none twice while they last."""
    del classes
    total = int(lengths.sum())
    unit = rng.choice(total, length, replace=total < length)
    stops = np.cumsum(lengths)
    ids = np.searchsorted(stops, unit, side="right")
    return ids[:, None], (unit - (stops - lengths)[ids] + 1)[:, None]


def _class_means(
    rng: np.random.Generator, lengths: np.ndarray, classes: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Utterances [P, MEAN_OF] of a class for each position, and -1 for the mean over their units.

    Classes, those of all slots, come in an order of the member's own, and again once all had their turn.
    """
    del lengths
    order = rng.permutation(np.unique(classes))
    of_class = {c: np.flatnonzero((classes == c).any(axis=1)) for c in order}
    ids = np.stack([rng.choice(of_class[order[p % len(order)]], MEAN_OF) for p in range(length)])
    return ids, np.full(ids.shape, -1)
