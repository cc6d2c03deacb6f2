"""Compare the predictions of two predictors (float32 and int8 kernels, say), and score them on unit records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spjax.data.records import read_unit_records
from spjax.evaluation import metrics
from spjax.io.packs import check_units, unit_source
from spjax.serving import scoring
from spjax.serving.predictor import SpeechPrompt, Tasks
from spjax.types import Encoded


class Change(NamedTuple):
    """How a task's answers differ between two predictors.

    Attributes:
      utterances: how many were compared.
      agreement: share of them with the same labels in every slot.
      largest: largest change of any label's probability.
      metric: the task's metric, if the true classes are known; else None.
      reference: its value with the reference predictor, or None.
      value: its value with the other predictor, or None.
    """

    utterances: int
    agreement: float
    largest: float
    metric: str | None = None
    reference: float | None = None
    value: float | None = None


class Split(NamedTuple):
    """A split of unit records, as a predictor takes it.

    Attributes:
      tasks: names of the predictor's packs that were trained for the records' task.
      units: the utterances, each units or Encoded.
      classes: int32 [n, slots], class ids over all slots.
    """

    tasks: list[str]
    units: list[Any]
    classes: np.ndarray


def read_split(directory: str, split: str, predictor: SpeechPrompt, among: Sequence[str] | None = None) -> Split:
    """Read a split of unit records whose task the predictor has packs for; `among` restricts the packs by name.

    Raises:
      RecordError: the records are absent or damaged, or have no such split.
      ValueError: the predictor has no pack for their task, or they lack the f0 that its LM needs; StorageError (a
        subclass) if their units were made with another encoder, layer or k-means.
    """
    found, card = read_unit_records(directory, split)
    theirs = (card.task.name, card.task.slots)
    mine = {name: task for name, task in predictor.tasks.items() if among is None or name in among}
    names = [name for name, task in mine.items() if (task.name, task.slots) == theirs]
    if not names:
        raise ValueError(
            f"{directory} holds task {theirs[0]!r}, and no requested pack has its labels: the packs are "
            f"{', '.join(predictor.tasks)}"
        )
    made = {"encoder": card.encoder, "layer": card.layer, "kmeans": card.kmeans, "merged": card.merged}
    for name in names:
        known = unit_source(predictor.packs[name].card)
        check_units(
            f"prompt pack {name!r}", known, directory, made, "Give records of the units that the pack was trained on."
        )
    if predictor.config.prosody is None:
        return Split(names, [found.units_of(i) for i in range(len(found))], found.classes)
    if found.streams is None:
        raise ValueError(
            f"{directory} holds no f0, which a multi-stream LM needs: extract the recordings with --f0 of "
            "data_pipelines.extract"
        )
    parts = (np.split(flat, found.offsets[1:-1]) for flat in (found.units, *found.streams))
    return Split(names, [Encoded(*streams) for streams in zip(*parts, strict=True)], found.classes)


def headlines(predictor: SpeechPrompt, split: Split, progress: bool = False) -> dict[str, float]:
    """The task's metric (Task.metric) on a split, 0 to 1, for each of its packs."""
    scored = predictor.scores(split.units, split.tasks, progress)
    return {name: _headline(predictor, name, scored[name], split.classes) for name in split.tasks}


def _headline(predictor: SpeechPrompt, name: str, scored: scoring.Scored, classes: np.ndarray) -> float:
    pack = predictor.packs[name]
    predicted, by_slot = scoring.decode_scores(pack.task, scored)
    return float(metrics.score(pack.task, classes[scored.utterances], predicted, by_slot)["headline"])


def changes(
    predictor: SpeechPrompt,
    reference: SpeechPrompt,
    units: Sequence[Any],
    tasks: Tasks = None,
    classes: Mapping[str, np.ndarray] | None = None,
    progress: bool = False,
) -> dict[str, Change]:
    """Compare a predictor with a reference on the same utterances.

    Args:
      predictor: for example with bfloat16 or int8 kernels.
      reference: with the same packs, in float32.
      units, tasks: as for `SpeechPrompt.predict_units`.
      classes: true classes by task, where they are known, int [n, slots] over all slots.
      progress: show progress bars after two seconds.

    Returns:
      The change of each requested task.
    """
    found = {}
    before, after = (one.scores(units, tasks, progress) for one in (reference, predictor))
    for name in after:
        pack = predictor.packs[name]
        decoded = [scoring.decode_scores(pack.task, side[name]) for side in (after, before)]
        (labels, shares), (known, known_shares) = decoded
        largest = max(float(np.abs(a - b).max()) for a, b in zip(shares, known_shares, strict=True))
        change = Change(len(labels), float((labels == known).all(axis=1).mean()), largest)
        if classes and name in classes:
            values = [
                _headline(one, name, side[name], np.asarray(classes[name]))
                for one, side in ((reference, before), (predictor, after))
            ]
            change = change._replace(metric=pack.task.metric, reference=values[0], value=values[1])
        found[name] = change
    return found
