"""Content of results.json: scores of a task's members, their spread, baselines, and what they were trained with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spjax.evaluation import metrics, plots
from spjax.evaluation.outcome import Member, Predictions
from spjax.tasks import LOWER_IS_BETTER, Task
from spjax.types import Json


def make_results(
    task: Task,
    members: Sequence[Member],
    *,
    split: str = "test",
    baselines: Mapping[str, Json] | None = None,
    ensemble: Predictions | None = None,
    parameters: Mapping[str, int] | None = None,
    setting: Json | None = None,
    tried: int = 1,
    config: Json | None = None,
    provenance: Json | None = None,
    comparisons: Sequence[tuple[str, float]] = (),
    command: str | None = None,
) -> Json:
    """Score the members.

    Args:
      task: slots, labels, metric.
      members: one or more, with different seeds.
      split: split of the predictions.
      baselines: results of `linear.fit_linear` by their key in `tasks.BASELINES`.
      ensemble: predictions from the mean log probabilities of all members.
      parameters: counts of one member by name, e.g. {"trained": 126816, "frozen": 151263232}.
      setting: hyperparameters by name, e.g. {"prompt length": 48, "learning rate": 0.01}.
      tried: number of settings among which this one was chosen on valid.
      config: the job's config.
      provenance: information about data and LM (card fields, hashes).
      comparisons: (name, value of the task's metric) of other systems.
      command: command that reproduces the run.

    Returns:
      Values of strict JSON: non-finite numbers are None.

    Raises:
      ValueError: no members, duplicate seeds, or predictions that do not fit the task.
    """
    seeds = [member.seed for member in members]
    if not seeds:
        raise ValueError("a report needs at least one member")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"members share a seed: {seeds}")
    scores = [_score(task, member) for member in members]
    return plain(
        {
            "format": "spjax-results",
            "version": 1,
            "task": task.name,
            "metric": task.metric,
            "lower_is_better": task.metric in LOWER_IS_BETTER,
            "split": split,
            "slots": {slot.name: slot.labels for slot in task.slots},
            "setting": setting or {},
            "tried": tried,
            "headline": _over_seeds([s["headline"] for s in scores]),
            "valid": _over_seeds([member.best_valid for member in members]),
            "metrics": {name: _over_seeds([s[name] for s in scores]) for name in scores[0] if name != "headline"},
            "members": [_member(task, *both) for both in zip(members, scores, strict=True)],
            "confusions": {
                slot.name: [
                    {"true": slot.labels[t], "predicted": slot.labels[p], "count": c, "share_of_true": share}
                    for t, p, c, share in metrics.top_confusions(matrix, plots.TOP_CONFUSIONS)
                ]
                for slot, matrix in zip(task.slots, confusions(task, members), strict=True)
            },
            "baselines": baselines or {},
            "ensemble": None if ensemble is None else metrics.score(task, *_scored(ensemble)),
            "comparisons": [{"name": name, "value": value} for name, value in comparisons],
            "parameters": parameters or {},
            "provenance": provenance or {},
            "config": config or {},
            "command": command,
            "plots": {"learning_curve": "plots/learning_curve.png"}
            | {slot.name: f"plots/confusion_{k}_{_file_name(slot.name)}.png" for k, slot in enumerate(task.slots)},
        }
    )


def _member(task: Task, member: Member, scores: dict[str, float]) -> Json:
    return {
        "seed": member.seed,
        "best_epoch": member.best_epoch,
        "best_valid": member.best_valid,
        "utterances": len(member.predictions.ids),
        "metrics": scores,
        "interval_95": _single_run_interval(task, member),
        "predictions": f"predictions/seed_{member.seed}.jsonl.gz",
        "curve": [dataclasses.asdict(point) for point in member.curve],
    }


def _scored(answers: Predictions) -> tuple[np.ndarray, np.ndarray, Sequence[np.ndarray]]:
    return answers.true, answers.predicted, answers.probabilities


def _score(task: Task, member: Member) -> dict[str, float]:
    answers = member.predictions
    try:
        scores = metrics.score(task, *_scored(answers))
    except ValueError as error:
        raise ValueError(f"member of seed {member.seed}: {error}") from error
    if len(answers.ids) != len(answers.true):
        raise ValueError(f"member of seed {member.seed}: {len(answers.ids)} ids for {len(answers.true)} predictions")
    return scores


def _over_seeds(values: Sequence[float]) -> Json:
    mean, half_width = metrics.mean_interval(values)
    return {"mean": mean, "half_width_95": half_width, "values": values}


def _single_run_interval(task: Task, member: Member) -> tuple[float, float] | None:
    """Wilson interval of the headline metric; None if it is not a proportion of utterances."""
    if task.metric not in ("accuracy", "exact_match") or (task.metric == "accuracy" and len(task.slots) > 1):
        return None
    right = (np.asarray(member.predictions.true) == np.asarray(member.predictions.predicted)).all(1)
    return metrics.wilson_interval(int(right.sum()), len(right))


def confusions(task: Task, members: Sequence[Member]) -> list[np.ndarray]:
    """Confusion matrix of each slot, [C_k, C_k], summed over members."""
    from sklearn.metrics import confusion_matrix

    true = np.concatenate([metrics.slot_classes(task, member.predictions.true) for member in members])
    predicted = np.concatenate([metrics.slot_classes(task, member.predictions.predicted) for member in members])
    return [
        confusion_matrix(true[:, k], predicted[:, k], labels=np.arange(len(slot.labels)))
        for k, slot in enumerate(task.slots)
    ]


def plain(value: object) -> Any:
    """Convert to strict JSON types: numpy to Python, tuples to lists, non-finite to None, other types to str."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
