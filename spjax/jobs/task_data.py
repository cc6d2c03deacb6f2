"""Inputs of a prompt job: the records of each task, and the frozen LM."""

from __future__ import annotations

import functools
import math
import os
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from spjax.config import PromptJob
from spjax.data import loader
from spjax.data import plan as planning
from spjax.data.records import Card
from spjax.data.unit_set import UnitSet
from spjax.evaluation import metrics
from spjax.io import packs, unit_lms
from spjax.jobs.inputs import ImportUnits, made_by, read_split
from spjax.jobs.workdirs import say
from spjax.models import decode, unit_lm, verbalizers
from spjax.models.config import TAIL, UnitLMConfig
from spjax.tasks import LOWER_IS_BETTER, Task
from spjax.training import masks, sharding, train
from spjax.training.setting import Setting
from spjax.types import Json, Params


class Place(NamedTuple):
    """Directories of a task of a job.

    Attributes:
      data: directory of the unit records.
      report: directory of results.json, summary.md and packs.
    """

    data: str
    report: str


def places(job: PromptJob, workdir: str) -> dict[str, Place]:
    """Directories of every task of a job; several tasks have subdirectories of `job.data` and of the workdir."""
    names = job.tasks
    if len(names) == 1:
        return {names[0]: Place(job.data, workdir)}
    return {name: Place(os.path.join(job.data, name), os.path.join(workdir, name)) for name in names}


def read_splits(
    job: PromptJob, name: str, directory: str, lm: UnitLMConfig, import_units: ImportUnits | None
) -> tuple[list[tuple[UnitSet, np.ndarray]], Card, list[str]]:
    """Read the train, valid and test splits of a task, and apply the length limit.

    The limit is `job.max_length` units (0: none) and what a training batch can hold; `job.overlength` determines
    the handling of longer utterances.

    Args:
      job: settings.
      name, directory, lm, import_units: see `inputs.read_split`.

    Returns:
      The splits with the utterances to use, the card of the records, and a note for every split with long utterances.

    Raises:
      ValueError: there are long utterances and `overlength` is "error"; the LM has too few positions; or as
        `loader.fit_length` and `inputs.read_split`.
    """
    if 0 < lm.max_positions <= TAIL:
        raise ValueError(
            f"{job.lm} has {lm.max_positions} positions, of which {TAIL} are kept for separators and labels: use an LM "
            "with more"
        )
    run = job.train
    held = planning.longest(run.max_tokens, run.max_rows, run.multiple)
    limit = min(job.max_length or held, held, lm.most_units or held)
    read = {split: read_split(directory, name, split, lm, import_units) for split in ("train", "valid", "test")}
    longest = math.ceil(max(units.lengths.max() for units, _ in read.values()) / run.multiple) * run.multiple
    splits, notes = [], []
    for split, (units, card) in read.items():
        try:
            fitted, ids, note = loader.fit_length(units, limit, job.overlength)
        except ValueError as error:
            flags = []
            if 0 < job.max_length < longest:
                flags.append(f"--config.max_length={longest}")
            if held < longest:
                flags.append(f"--config.train.max_tokens={longest * math.gcd(8, run.max_rows)}")
            advice = f"; if memory allows, use all of them with {' and '.join(flags)}" if flags else ""
            if lm.most_units and longest > lm.most_units:
                advice = f"; the LM has {lm.max_positions} positions: use --config.overlength=cut or drop"
            raise ValueError(f"{directory}, {split}: {error}{advice}") from error
        lost = np.setdiff1d(units.classes, units.classes[ids])
        if split == "train" and lost.size:
            slot, label = card.task.classes[lost[0]]
            raise ValueError(
                f"{directory}, train: {note}; no utterance is left for {len(lost)} labels, the first is {label!r} "
                f"({slot}): use --config.overlength=cut"
            )
        splits.append((fitted, ids))
        notes += [f"{split}: {note}"] if note else []
    return splits, card, notes


def check_lengths(job: PromptJob, lm: UnitLMConfig, import_units: ImportUnits | None) -> None:
    """Raise ValueError if the records of a prompt job are invalid, before its LM is pretrained."""
    for name, place in places(job, "").items():
        read_splits(job, name, place.data, lm, import_units)


def check_tail(lm: UnitLMConfig, separators: int, steps: int, name: str) -> None:
    """Raise ValueError if separators and label steps of a task do not fit in what learned positions keep for them."""
    if lm.max_positions and separators + steps > TAIL:
        raise ValueError(
            f"{name}: {separators} separators and {steps} label steps need more than the {TAIL} positions that the LM "
            "keeps for them: give fewer --config.prompt.separators, or shorter labels"
        )


class TaskData(NamedTuple):
    """Data and settings of a task of a job.

    Attributes:
      task_run: training data and settings.
      test_set: the test split.
      test_ids: int32 [n], utterances of it to score.
      card: card of the records.
      combinations: int [M, slots], label combinations among which decoding chooses; None: all.
      place: directories of records and report.
      notes: number of utterances cut or dropped, for each split that has some.
    """

    task_run: train.TaskRun
    test_set: UnitSet
    test_ids: np.ndarray
    card: Card
    combinations: np.ndarray | None
    place: Place
    notes: tuple[str, ...]


class LM(NamedTuple):
    """The frozen LM of a job."""

    config: UnitLMConfig
    params: Params
    hash: str
    units: Json | None  # identity of the units that it was trained on, if known


def read_lm(job: PromptJob) -> LM:
    """Read the LM of a job, or initialise a random one of its architecture."""
    lm_config, lm, info = unit_lms.read_unit_lm(job.lm)
    sharding.check_lm(sharding.make_mesh(job.model_parallel, job.weight_shards), lm_config)
    identity = info["hash"]
    if job.random_lm:
        lm = jax.device_get(unit_lm.init(jax.random.key(0), lm_config))
        identity = unit_lms.unit_lm_hash(lm, lm_config.prosody, lm_config.block)
    return LM(lm_config, lm, identity, info.get("provenance", {}).get("units"))


def _start(job: PromptJob, lm: LM, task: Task) -> tuple[Params | None, verbalizers.Verbalizer | None]:
    """Prompt and verbalizer of `job.start_from`: (None, None) if it is not set, no verbalizer for other labels."""
    if not job.start_from:
        return None, None
    pack = packs.load_pack(job.start_from)
    packs.check_pack(pack, lm.hash, lm.config)
    if pack.task.slots == task.slots:
        return pack.params, verbalizers.from_card(pack.card["verbalizer"], task)
    # the verbalizer of another task does not fit
    return {name: leaf for name, leaf in pack.params.items() if name != "verbalizer"}, None


def load_task(
    job: PromptJob, lm: LM, name: str, place: Place, import_units: ImportUnits | None
) -> tuple[TaskData, Params | None]:
    """Load a task of the job, and the prompt from which its members start (None: a new one)."""
    directory = place.data
    splits, card, notes = read_splits(job, name, directory, lm.config, import_units)
    for note in notes:
        say(f"{name}, {note}")
    (train_set, train_ids), (valid_set, valid_ids), (test_set, test_ids) = splits
    if job.few_shot:
        train_ids = train_ids[planning.few_shot(train_set.classes[train_ids], job.few_shot, job.few_shot_seed)]
    if lm.config.num_units != card.vocabulary:
        raise ValueError(
            f"{job.lm} has {lm.config.num_units} units, {directory} has {card.vocabulary}: use units of the LM"
        )
    fix = "Extract units with the LM's encoder and k-means, or pretrain an LM on these units at another --config.lm."
    packs.check_units(f"the LM {job.lm}", lm.units or {}, directory, made_by(card), fix)
    task = card.task
    start, verbalizer = _start(job, lm, task)
    if verbalizer is None:
        verbalizer = verbalizers.make(
            job.verbalizer, task, lm.config.vocab_size,
            units=np.concatenate([train_set.units_of(i) for i in train_ids]),
            classes=train_set.classes[train_ids], seed=job.verbalizer_seed,
        )  # fmt: skip
    check_tail(lm.config, job.prompt.separators if start is None else start["sep"].shape[0], verbalizer.steps, name)
    seen = np.unique(train_set.classes[train_ids], axis=0) if job.combinations == "seen" else None
    setting = Setting(lm.config, job.compute, job.prompt, job.loss, verbalizer, decode.label_tree(verbalizer, seen))
    task_run = train.TaskRun(
        setting, train_set, train_ids, valid_set, valid_ids,
        metric=functools.partial(headline, task), lower_is_better=task.metric in LOWER_IS_BETTER,
    )  # fmt: skip
    say(f"{name}: {len(train_ids):,} train, {len(valid_ids):,} valid, {len(test_ids):,} test utterances")
    return TaskData(task_run, test_set, test_ids, card, seen, place, tuple(notes)), start


def placed(job: PromptJob, lm: LM) -> tuple[Mesh, Params]:
    """Mesh, and LM weights placed on it."""
    mesh = sharding.make_mesh(job.model_parallel, job.weight_shards)
    flat = sharding.place_frozen(mesh, masks.flatten({"lm": lm.params}), job.compute.operand)
    return mesh, masks.unflatten(sharding.layerwise(mesh, flat))["lm"]


def headline(task: Task, log_probs: np.ndarray, tree: decode.LabelTree, classes: np.ndarray) -> float:
    """Metric of the task on a split."""
    predicted = tree.combinations[log_probs.argmax(axis=1)]
    return metrics.score(task, classes, predicted, decode.slot_probabilities(log_probs, tree, task.slot_offsets))[
        "headline"
    ]
