"""A toy world for tests: unit text whose labels can be read off the units, and unit LMs that compile in a moment."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from spjax.data.unit_set import UnitSet
from spjax.models import unit_lm
from spjax.models.config import UnitLMConfig
from spjax.models.decode import LabelTree
from spjax.tasks import Slot, Task
from spjax.types import Params

LM = UnitLMConfig(vocab_size=104, dim=32, layers=2, heads=2, ffn_dim=64)
TASK = Task("toy", (Slot("action", ("turn on", "turn off")), Slot("room", ("none", "kitchen", "hall"))), "exact_match")
# Of each known task a few combinations of class ids, slots whose labels hold spaces ("change language") among them.
COMBINATIONS = {
    "toy": ((0, 2), (0, 3), (1, 3), (1, 4)),
    "fsc": ((0, 6, 20), (1, 7, 21), (1, 8, 22), (2, 8, 21), (3, 9, 20), (4, 10, 23)),
    "gsc": ((0,), (3,), (11,)),
}


def utterances(task: str, count: int, seed: int, longest: int = 14) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    """Units and classes of utterances: unit c stands in it for each of its classes c; units from 50 are noise."""
    random = np.random.default_rng((seed, len(task)))
    units, classes = [], []
    for i in range(count):
        combination = COMBINATIONS[task][i % len(COMBINATIONS[task])]
        noise = random.integers(50, 100, random.integers(2, longest - len(combination) + 1)).tolist()
        places = sorted(random.integers(0, len(noise) + 1, len(combination)), reverse=True)
        for place, label in zip(places, combination[::-1], strict=True):
            noise.insert(place, label)
        units.append([unit for j, unit in enumerate(noise) if not j or unit != noise[j - 1]])
        classes.append(combination)
    return units, classes


def unit_set(task: str, count: int, seed: int, longest: int = 14) -> UnitSet:
    """The same as a split in memory."""
    return UnitSet.of(*utterances(task, count, seed, longest))


def exact_match(log_probs: np.ndarray, tree: LabelTree, classes: np.ndarray) -> float:
    """Fraction of utterances with all slots right: log probabilities [n, M] of the tree, classes [n, slots]."""
    return float((tree.combinations[log_probs.argmax(axis=1)] == classes).all(axis=1).mean())


def write_text(root: Path, train: int = 96, held_out: int = 24) -> Path:
    """Unit text of fsc and gsc under `root`, as `--units` takes it."""
    for task in ("fsc", "gsc"):
        folder = root / task
        folder.mkdir(parents=True)
        for seed, (split, count) in enumerate({"train": train, "valid": held_out, "test": held_out}.items()):
            lines = [
                f"{' '.join(map(str, units))} <s> {' '.join(map(str, classes))}\n"
                for units, classes in zip(*utterances(task, count, seed), strict=True)
            ]
            (folder / f"{split}.txt").write_text("".join(lines))
    return root


def tiny_lm(seed: int = 0, config: UnitLMConfig = LM) -> Params:
    """Random weights of a tiny unit LM, numpy."""
    return jax.device_get(unit_lm.init(jax.random.key(seed), config))


# A prompt tuning run of seconds, on the tiny LM.
SMALL = tuple(
    "--config." + override
    for override in """
    lm=lm compute.dtype=float32 train.seeds=(0,1) train.epochs=6 train.buckets=1 train.max_rows=8
    train.checkpoint_every=5 prompt.length=4 prompt.rank=0 prompt.separators=2 prompt.steer=True
    optim.lr=3e-2""".split()  # noqa: SIM905 - as on a command line
)
