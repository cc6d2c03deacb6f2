"""Classification metrics of scikit-learn and scipy, computed on the host.

Class ids in `classes_true` and `joint_pred` run over all slots (`Task.classes`). Shape letters: docs/design.md; C_k is
the number of labels of slot k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from spjax.tasks import Task

_SUM_TOLERANCE = 1e-2  # allows for a bfloat16 softmax


def slot_classes(task: Task, classes: np.ndarray, what: str = "classes") -> np.ndarray:
    """Convert class ids over all slots to ids within each slot.

    Args:
      task: K slots.
      classes: int [n, K].
      what: name of the array in error messages.

    Returns:
      int64 [n, K], column k in 0..C_k-1.

    Raises:
      ValueError: wrong shape or dtype, or a class of another slot than its column's.
    """
    classes = np.asarray(classes)
    if classes.ndim != 2 or classes.shape[1] != len(task.slots):
        raise ValueError(f"{what}: shape {classes.shape}, but task {task.name!r} needs [n, {len(task.slots)}]")
    if not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(f"{what}: dtype {classes.dtype}, but class ids must be integers")
    offsets = np.asarray(task.slot_offsets)
    local = classes.astype(np.int64) - offsets[:-1]
    wrong = np.argwhere((local < 0) | (local >= np.diff(offsets)))
    if len(wrong):
        row, k = wrong[0]
        raise ValueError(
            f"{what}: row {row} has class {classes[row, k]} in slot {task.slots[k].name!r}, "
            f"whose classes are {offsets[k]}..{offsets[k + 1] - 1} (ids run over all slots)"
        )
    return local


def equal_error_rate(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Equal error rate: the error rate at the threshold where miss rate and false-alarm rate are equal.

    Between thresholds the ROC curve is interpolated linearly, ties included, so that the rates cross in exactly one
    point. A constant score has a rate of 0.5; reversing the ranking turns a rate e into 1 - e.

    Args:
      scores: [n], higher for the positive class. May be infinite (only the order matters), not NaN.
      is_positive: bool [n].

    Raises:
      ValueError: shapes differ, a score is NaN, or all examples are of one class.
    """
    from sklearn.metrics import roc_curve

    scores, is_positive = np.asarray(scores, np.float64), np.asarray(is_positive)
    if scores.ndim != 1 or scores.shape != is_positive.shape:
        raise ValueError(f"scores {scores.shape} and is_positive {is_positive.shape} must both be [n]")
    if is_positive.dtype != bool:
        raise ValueError(f"is_positive: dtype {is_positive.dtype}; pass booleans, e.g. `true == positive_class`")
    if np.isnan(scores).any():
        raise ValueError(f"scores: NaN at example {int(np.flatnonzero(np.isnan(scores))[0])}")
    positives = int(is_positive.sum())
    negatives = len(scores) - positives
    if not positives or not negatives:
        raise ValueError(f"EER needs both classes, but got {positives} positive and {negatives} negative examples")
    # Ranks, since scikit-learn refuses infinite scores.
    false_alarm, hit, _ = roc_curve(is_positive, stats.rankdata(scores), drop_intermediate=False)
    miss = 1 - hit
    gap = false_alarm - miss  # from -1 to 1, strictly rising
    after = int(np.searchsorted(gap, 0.0))
    share = -gap[after - 1] / (gap[after] - gap[after - 1])
    return float(false_alarm[after - 1] + share * (false_alarm[after] - false_alarm[after - 1]))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None]:
    """Mean over seeds, and half width of its Student-t interval (None for a single seed).

    Raises:
      ValueError: no values, or one is not finite.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not numbers.size:
        raise ValueError(f"mean_interval needs at least one value, got shape {numbers.shape}")
    if not np.isfinite(numbers).all():
        raise ValueError(f"mean_interval: {numbers.tolist()} has a value that is not finite")
    if numbers.size == 1:
        return float(numbers[0]), None
    quantile = stats.t.ppf((1 + confidence) / 2, numbers.size - 1)
    return float(numbers.mean()), float(quantile * numbers.std(ddof=1) / math.sqrt(numbers.size))


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson interval (low, high) of an accuracy, `correct` of `total` utterances (Wilson 1927).

    Covers variation with the test set, not with the seed.
    """
    low, high = stats.binomtest(correct, total).proportion_ci(confidence, method="wilson")
    return float(low), float(high)


def score(
    task: Task,
    classes_true: np.ndarray,
    joint_pred: np.ndarray,
    slot_probabilities: Sequence[np.ndarray],
) -> dict[str, float]:
    """Compute all metrics of one run on one split.

    Args:
      task: K slots.
      classes_true: int [n, K], class ids over all slots.
      joint_pred: int [n, K], decoded classes (the best combination may differ from the best label of each slot).
      slot_probabilities: K arrays [n, C_k], rows summing to 1.

    Returns:
      `exact_match`; `accuracy`, `macro_f1` (over the labels that occur or are predicted), `weighted_f1`, all means over
      slots; with several slots also
      `accuracy/<slot>` and so on; for a single slot of two labels `eer` (label 0 is the positive class; the rate is the
      same for either), unless all examples have one label; and `headline`, the task's metric.

    Raises:
      ValueError: arrays do not fit the task, probabilities are NaN, there are no examples, or the task's metric is EER
        and all examples have one label.
    """
    from sklearn.metrics import f1_score

    true = slot_classes(task, classes_true, "classes_true")
    predicted = slot_classes(task, joint_pred, "joint_pred")
    if true.shape != predicted.shape:
        raise ValueError(f"classes_true {true.shape} and joint_pred {predicted.shape} differ in shape")
    if not len(true):
        raise ValueError(f"task {task.name!r}: no examples to score")
    check_probabilities(task, slot_probabilities, len(true))

    by_slot: dict[str, list[float]] = {"accuracy": (true == predicted).mean(0).tolist()}
    pairs = list(zip(true.T, predicted.T, strict=True))
    for average in ("macro", "weighted"):
        by_slot[f"{average}_f1"] = [float(f1_score(*pair, average=average, zero_division=0)) for pair in pairs]
    result = {"exact_match": float((true == predicted).all(1).mean())}
    result |= {name: float(np.mean(values)) for name, values in by_slot.items()}
    if len(task.slots) > 1:
        for name, values in by_slot.items():
            result |= {f"{name}/{slot.name}": value for slot, value in zip(task.slots, values, strict=True)}
    if task.slot_offsets == (0, 2) and (task.metric == "eer" or 0 < true.sum() < len(true)):
        # The log ratio gives the same ranking, without ties if the softmax saturates.
        with np.errstate(divide="ignore"):
            log_p = np.log(np.asarray(slot_probabilities[0], np.float64))
        result["eer"] = equal_error_rate(log_p[:, 0] - log_p[:, 1], true[:, 0] == 0)
    return {"headline": result[task.metric], **result}


def check_probabilities(task: Task, slot_probabilities: Sequence[np.ndarray], n: int) -> None:
    """Raise ValueError unless `slot_probabilities` are K arrays [n, C_k] of probabilities with rows summing to 1."""
    if len(slot_probabilities) != len(task.slots):
        raise ValueError(
            f"task {task.name!r} has {len(task.slots)} slots, but got {len(slot_probabilities)} arrays of probabilities"
        )
    for slot, probabilities in zip(task.slots, slot_probabilities, strict=True):
        p = np.asarray(probabilities, np.float64)
        where = f"probabilities of slot {slot.name!r}"
        if p.shape != (n, len(slot.labels)):
            raise ValueError(f"{where}: shape {p.shape} instead of {(n, len(slot.labels))}")
        bad = np.flatnonzero(~np.isfinite(p).all(1))
        if len(bad):
            raise ValueError(f"{where}: row {bad[0]} is not finite ({len(bad)} rows in all)")
        bad = np.flatnonzero((p < 0).any(1) | (np.abs(p.sum(1) - 1) > _SUM_TOLERANCE))
        if len(bad):
            row = p[bad[0]]
            raise ValueError(
                f"{where}: row {bad[0]} is not a distribution (sum {row.sum():.4g}, least {row.min():.4g}; "
                f"{len(bad)} rows in all); pass softmax outputs, not logits"
            )


def top_confusions(matrix: np.ndarray, most: int) -> list[tuple[int, int, int, float]]:
    """Most frequent off-diagonal cells: (true, predicted, count, share of the true class)."""
    errors = matrix - np.diag(matrix.diagonal())
    cells = np.argsort(-errors, axis=None, kind="stable")[:most]
    found = [(*divmod(int(cell), len(matrix)), int(errors.flat[cell])) for cell in cells if errors.flat[cell]]
    return [(t, p, count, count / int(matrix[t].sum())) for t, p, count in found]
