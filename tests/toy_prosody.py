"""A toy world with prosody, and a config that compares LMs in it: units say nothing of a tune or a pace.

python -m spjax.main --config=tests/toy_prosody.py --config.data=RECORDS --config.pretraining.data=RECORDS
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from configs import defaults
from spjax.data.write_records import Utterance, write_unit_records
from spjax.tasks import Slot, Task

TASKS = {
    name: Task(name, (Slot(name, labels),)) for name, labels in (("tune", ("up", "down")), ("pace", ("slow", "fast")))
}
SIZES = {
    "lm.dim": 32,
    "lm.layers": 2,
    "lm.heads": 2,
    "lm.ffn_dim": 64,
    "pretrain.epochs": 6,
    "pretrain.row_length": 16,
    "pretrain.rows": 8,
}
QUICK = {
    "compute.dtype": "float32", "train.seeds": (0, 1), "train.epochs": 3, "train.passes": 5, "train.buckets": 1,
    "train.max_rows": 8, "prompt.length": 4, "prompt.rank": 0, "prompt.separators": 2, "prompt.steer": True,
    "optim.lr": 3e-2, "baselines": False,
}  # fmt: skip


def utterances(task: str, count: int, seed: int) -> list[Utterance]:
    """Random units; a tune goes up or down in f0, a pace is heard from durations."""
    random = np.random.default_rng((seed, len(task), ord(task[0])))
    made = []
    for i in range(count):
        size, label = int(random.integers(6, 12)), i % 2
        f0 = random.normal(0, 0.1, size) + (np.linspace(-0.5, 0.5, size) * (1, -1)[label] if task == "tune" else 0)
        long = random.integers(6, 9, size) if task == "pace" and not label else random.integers(1, 4, size)
        made.append(
            Utterance(f"{task}{i}", random.integers(0, 100, size), (label,), long, f0 * (random.random(size) < 0.9))
        )
    return made


def write_records(folder: Path, train: int = 96, held_out: int = 24) -> Path:
    """Records of both tasks in FOLDER/TASK."""
    for name, task in TASKS.items():
        splits = {"train": train, "valid": held_out, "test": held_out}
        made = {split: utterances(name, count, seed) for seed, (split, count) in enumerate(splits.items())}
        write_unit_records(folder / name, task, made)
    return folder


def small(options: str = "") -> ConfigDict:
    """A prompt job of seconds on both tasks."""
    config = defaults.prompt_tuning("tune,pace")
    config.pretraining.tasks = ("tune", "pace")
    config.update_from_flattened_dict(QUICK | {f"pretraining.{name}": value for name, value in SIZES.items()})
    config.pretraining.compute.dtype = "float32"
    return defaults.with_backbone(config, options)


def get_config(options: str = "") -> ConfigDict:
    """The comparison of a unit LM with a multi-stream LM of its size."""
    config = small()
    config.job = "compare"
    config.baseline = "plain"
    streams = {"pretraining": {"lm": {"prosody": defaults.prosody()}, "pretrain": {"f0_bins": 4}}}
    config.variants = ConfigDict({"plain": {}, "told": streams})
    return config
