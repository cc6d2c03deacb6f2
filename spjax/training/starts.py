"""Initialise prompts from the keys and values that the frozen LM computes for train utterances."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spjax.training import pooling, train
from spjax.types import Params

UTTERANCES_PER_MEAN = 8  # averaged for one position; drawn again for each position, so that no two are equal


def from_utterances(lm: Params, task_run: train.TaskRun, run: train.TrainConfig, mesh: Mesh) -> list[Params]:
    """Initial prompts of one task run, one for each seed, by its `prompt.init` (one of `prompts.REAL_STARTS`).

    A prompt depends only on the train utterances, the prompt length and the seed.

    Args:
      lm: LM weights on devices, from `sharding.layerwise`.
      task_run: task, train split and prompt settings.
      run: seeds and batch sizes.
      mesh: device mesh.

    Returns:
      For each seed {"key", "value"}, float32 [L, P, D]; for an input prompt {"input"}, float32 [P, D].
    """
    setting, prompt = task_run.setting, task_run.setting.prompt
    draw = {"utterances": _positions, "class_means": _class_means}[prompt.init]
    train_set, rngs = task_run.train_set.take(task_run.train_ids), map(np.random.default_rng, run.seeds)
    drawn = [draw(rng, train_set.lengths, train_set.classes, prompt.length) for rng in rngs]
    wanted = np.stack([np.stack(one) for one in drawn], axis=1)  # [2, seeds, P, columns of a position]
    (ids, columns), inverse = np.unique(wanted.reshape(2, -1), axis=1, return_inverse=True)
    units = train_set.take(ids)
    plan = train.evaluation_plan(task_run, run, units, np.arange(len(ids)), mesh)
    states = pooling.layer_inputs(lm, setting.config, units, plan, mesh, setting.compute, columns, prompt.deep)
    means = states[:, inverse.reshape(wanted.shape[1:])].mean(axis=3)  # [L, seeds, P, D]
    if prompt.deep:
        return [{name: jnp.asarray(means[:, n]) for name in ("key", "value")} for n in range(len(run.seeds))]
    return [{"input": jnp.asarray(means[0, n])} for n in range(len(run.seeds))]


def _positions(
    rng: np.random.Generator, lengths: np.ndarray, classes: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw P units, without replacement while there are enough: utterance and column of each, [P, 1]."""
    del classes
    total = int(lengths.sum())
    unit = rng.choice(total, length, replace=total < length)
    stops = np.cumsum(lengths)
    ids = np.searchsorted(stops, unit, side="right")
    return ids[:, None], (unit - (stops - lengths)[ids] + 1)[:, None]


def _class_means(
    rng: np.random.Generator, lengths: np.ndarray, classes: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw utterances [P, UTTERANCES_PER_MEAN] of one class for each position; columns are -1, the mean over units.

    Positions cycle through the classes of all slots in a random order.
    """
    del lengths
    order = rng.permutation(np.unique(classes))
    of_class = {c: np.flatnonzero((classes == c).any(axis=1)) for c in order}
    ids = np.stack([rng.choice(of_class[order[p % len(order)]], UTTERANCES_PER_MEAN) for p in range(length)])
    return ids, np.full(ids.shape, -1)
