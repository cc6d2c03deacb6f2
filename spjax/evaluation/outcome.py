"""Results of a job: one member for each seed, with learning curve and predictions; the file of the predictions."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
from collections.abc import Sequence

import numpy as np
from etils import epath
from tqdm import tqdm

from spjax.evaluation import metrics
from spjax.tasks import Task


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions of one member on one split.

    Attributes:
      ids: n utterance ids.
      true: int [n, slots], class ids over all slots.
      predicted: int [n, slots], class ids over all slots.
      probabilities: for each slot [n, C_k], rows summing to 1.
    """

    ids: Sequence[str]
    true: np.ndarray
    predicted: np.ndarray
    probabilities: Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """One epoch of a learning curve: number of epochs so far, mean training loss of the epoch, valid metric."""

    epoch: float
    train_loss: float
    valid: float


@dataclasses.dataclass(frozen=True)
class Member:
    """One trained member of a bank.

    Attributes:
      seed: random seed.
      best_epoch: epoch whose parameters were kept, chosen on valid.
      best_valid: the task's metric on valid at that epoch.
      curve: learning curve.
      predictions: predictions on the split of the report.
    """

    seed: int
    best_epoch: float
    best_valid: float
    curve: Sequence[CurvePoint]
    predictions: Predictions


def packed_predictions(task: Task, member: Member) -> bytes:
    """Content of `predictions/seed_<seed>.jsonl.gz`, for `read_predictions`."""
    answers = member.predictions
    true, predicted = metrics.slot_classes(task, answers.true), metrics.slot_classes(task, answers.predicted)
    packed = io.BytesIO()
    # No date and no name in the gzip header, so that the output is deterministic.
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6, mtime=0, filename="") as file:
        for i, name in enumerate(tqdm(answers.ids, f"predictions of seed {member.seed}", delay=2, leave=False)):
            row = {
                "id": str(name),
                "true": {slot.name: slot.labels[true[i, k]] for k, slot in enumerate(task.slots)},
                "predicted": {slot.name: slot.labels[predicted[i, k]] for k, slot in enumerate(task.slots)},
                "probabilities": {
                    slot.name: [float(f"{p:.6g}") for p in np.asarray(answers.probabilities[k][i]).tolist()]
                    for k, slot in enumerate(task.slots)
                },
            }
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    return packed.getvalue()


def read_predictions(path: epath.PathLike, task: Task) -> Predictions:
    """Read a `predictions/seed_<seed>.jsonl.gz`.

    Raises:
      ValueError: a line is not a prediction of this task (names file and line).
    """
    offsets = task.slot_offsets
    numbers = [{label: offsets[k] + i for i, label in enumerate(slot.labels)} for k, slot in enumerate(task.slots)]
    ids, true, predicted, probabilities = [], [], [], []
    with epath.Path(path).open("rb") as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        for n, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                ids.append(row["id"])
                true.append([numbers[k][row["true"][slot.name]] for k, slot in enumerate(task.slots)])
                predicted.append([numbers[k][row["predicted"][slot.name]] for k, slot in enumerate(task.slots)])
                probabilities.append([row["probabilities"][slot.name] for slot in task.slots])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {n}: not a prediction of task {task.name!r} ({error!r})") from error
    return Predictions(
        ids,
        np.asarray(true, np.int32).reshape(len(ids), len(task.slots)),
        np.asarray(predicted, np.int32).reshape(len(ids), len(task.slots)),
        [
            np.asarray([row[k] for row in probabilities], np.float64).reshape(len(ids), len(slot.labels))
            for k, slot in enumerate(task.slots)
        ],
    )
