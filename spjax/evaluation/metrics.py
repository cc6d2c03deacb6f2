"""Scores of a classification task: from classes and probabilities on the host (numpy) to plain numbers.

Class ids in arrays called `classes_true` and `joint_pred` run over all slots (`Task.classes`); the functions
that know no task (`confusion`, `f1_scores`) take ids of one slot, 0..C_k-1. Shape letters: docs/design.md;
C_k is the number of labels of slot k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from spjax.tasks import Task

_SUM_TOLERANCE = 1e-2  # probabilities of a slot that left a bfloat16 softmax still pass


def slot_classes(task: Task, classes: np.ndarray, what: str = "classes") -> np.ndarray:
    """Class ids over all slots -> ids within each slot.

    Args:
      task: K slots.
      classes: integers [n, K].
      what: how errors name the array.

    Returns:
      int64 [n, K], column k in 0..C_k-1.

    Raises:
      ValueError: wrong shape or dtype, or a class that does not belong to its column's slot.
    """
    classes = np.asarray(classes)
    if classes.ndim != 2 or classes.shape[1] != len(task.slots):
        raise ValueError(f"{what}: shape {classes.shape}, but task {task.name!r} needs [n, {len(task.slots)}]")
    if not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(f"{what}: dtype {classes.dtype}, but class ids are integers")
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


def confusion(true: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts of (true, predicted) pairs: int64 [C, C], a row a true class. `true`, `predicted`: ints [n]."""
    true, predicted = np.asarray(true), np.asarray(predicted)
    if true.ndim != 1 or true.shape != predicted.shape:
        raise ValueError(f"true {true.shape} and predicted {predicted.shape} must both be [n]")
    for name, ids in (("true", true), ("predicted", predicted)):
        if ids.size and (ids.min() < 0 or ids.max() >= num_classes):
            raise ValueError(f"{name} has class {ids.min()}..{ids.max()}, outside 0..{num_classes - 1}")
    pairs = true.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes * num_classes).reshape(num_classes, num_classes)


def f1_scores(true: np.ndarray, predicted: np.ndarray, num_classes: int) -> tuple[float, float]:
    """(macro F1, weighted F1) of ints [n] in 0..C-1.

    Macro: mean over the classes that are true or predicted at least once, so that a class which a test set
    lacks costs nothing; weighted: mean by the number of true examples. Both as scikit-learn's defaults.

    Raises:
      ValueError: no examples, unequal shapes, or a class outside 0..C-1.
    """
    counts = confusion(true, predicted, num_classes)
    if not counts.sum():
        raise ValueError("F1 of no examples is undefined")
    support = counts.sum(1)
    either = support + counts.sum(0)  # 2 tp + fn + fp
    f1 = 2 * counts.diagonal() / np.maximum(either, 1)
    return float(f1[either > 0].mean()), float(f1 @ support / support.sum())


def equal_error_rate(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """The error rate at which as many positives are missed as negatives are accepted.

    An example is accepted when its score reaches a threshold. Examples of one score are accepted together,
    and the two error rates are taken as linear between neighbouring thresholds (the ROC curve drawn with
    straight lines, a tie being a diagonal): miss and false-alarm rates then cross in exactly one point.
    A scorer that knows nothing has .5, the reversed ranking of one with rate e has 1 - e.

    Args:
      scores: [n], higher for the positive class. Infinities are fine (only the order counts), NaN is not.
      is_positive: bool [n].

    Raises:
      ValueError: shapes differ, a NaN, or examples of one class only (the rate is undefined then).
    """
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
    order = np.argsort(-scores, kind="stable")
    ranked = is_positive[order]
    last_of_tie = np.append(scores[order][1:] != scores[order][:-1], True)
    accepted_positives = np.append(0, np.cumsum(ranked)[last_of_tie])
    accepted_negatives = np.append(0, np.cumsum(~ranked)[last_of_tie])
    false_alarm = accepted_negatives / negatives
    miss = 1 - accepted_positives / positives
    gap = false_alarm - miss  # from -1 to 1, strictly rising
    after = int(np.searchsorted(gap, 0.0))
    share = -gap[after - 1] / (gap[after] - gap[after - 1])
    return float(false_alarm[after - 1] + share * (false_alarm[after] - false_alarm[after - 1]))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None]:
    """Mean over seeds and the half width of its Student-t interval; None in its place for a single seed.

    Raises:
      ValueError: no values, or one that is not finite (a diverged run has no place in a mean).
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not numbers.size:
        raise ValueError(f"mean_interval needs at least one value, got shape {numbers.shape}")
    if not np.isfinite(numbers).all():
        raise ValueError(f"mean_interval: {numbers.tolist()} holds a value that is not finite")
    if numbers.size == 1:
        return float(numbers[0]), None
    quantile = stats.t.ppf((1 + confidence) / 2, numbers.size - 1)
    return float(numbers.mean()), float(quantile * numbers.std(ddof=1) / math.sqrt(numbers.size))


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of a single run's accuracy, `correct` of `total` utterances (Wilson 1927).

    It says how far the score would move on another test set of this size, not how far on another seed.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"{correct} correct of {total} is no accuracy")
    z = float(stats.norm.ppf((1 + confidence) / 2))
    rate, spread = correct / total, z * z / total
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def score(
    task: Task,
    classes_true: np.ndarray,
    joint_pred: np.ndarray,
    slot_probabilities: Sequence[np.ndarray],
) -> dict[str, float]:
    """Every score of one run on one split.

    Args:
      task: K slots.
      classes_true: integers [n, K], class ids over all slots.
      joint_pred: integers [n, K], what was decoded (greedy or constrained; a joint answer over the slots need
        not be the likeliest label of each slot).
      slot_probabilities: K arrays [n, C_k], rows summing to 1.

    Returns:
      `exact_match`; `accuracy`, `macro_f1`, `weighted_f1` (means over the slots); with several slots also each of
      the three as `accuracy/<slot>` and so on; for a single slot of two labels `eer`, from the probabilities
      (label 0 as the positive class: with probabilities of two labels the rate is the same for either), left
      out where the examples are of one label only; and `headline`, the task's own metric.

    Raises:
      ValueError: shapes, dtypes, classes or probabilities that do not fit the task, NaN, no examples, or the EER of
        examples of one label only.
    """
    true = slot_classes(task, classes_true, "classes_true")
    predicted = slot_classes(task, joint_pred, "joint_pred")
    if true.shape != predicted.shape:
        raise ValueError(f"classes_true {true.shape} and joint_pred {predicted.shape} differ in shape")
    if not len(true):
        raise ValueError(f"task {task.name!r}: no examples to score")
    check_probabilities(task, slot_probabilities, len(true))

    sizes = [len(slot.labels) for slot in task.slots]
    f1 = [f1_scores(true[:, k], predicted[:, k], size) for k, size in enumerate(sizes)]
    by_slot = {
        "accuracy": (true == predicted).mean(0).tolist(),
        "macro_f1": [macro for macro, _ in f1],
        "weighted_f1": [weighted for _, weighted in f1],
    }
    result = {"exact_match": float((true == predicted).all(1).mean())}
    result |= {name: float(np.mean(values)) for name, values in by_slot.items()}
    if len(task.slots) > 1:
        for name, values in by_slot.items():
            result |= {f"{name}/{slot.name}": value for slot, value in zip(task.slots, values, strict=True)}
    if sizes == [2] and (task.metric == "eer" or 0 < true.sum() < len(true)):
        # The log ratio ranks as the probability does, without its ties where a softmax is saturated.
        with np.errstate(divide="ignore"):
            log_p = np.log(np.asarray(slot_probabilities[0], np.float64))
        result["eer"] = equal_error_rate(log_p[:, 0] - log_p[:, 1], true[:, 0] == 0)
    return {"headline": result[task.metric], **result}


def check_probabilities(task: Task, slot_probabilities: Sequence[np.ndarray], n: int) -> None:
    """Raise ValueError unless there are K arrays [n, C_k] of finite probabilities whose rows sum to 1."""
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
                f"{where}: row {bad[0]} is no distribution (sum {row.sum():.4g}, least {row.min():.4g}; "
                f"{len(bad)} rows in all); pass softmax outputs, not logits"
            )


def top_confusions(matrix: np.ndarray, most: int) -> list[tuple[int, int, int, float]]:
    """(true, predicted, count, share of the true class), commonest first, without the diagonal."""
    errors = matrix - np.diag(matrix.diagonal())
    cells = np.argsort(-errors, axis=None, kind="stable")[:most]
    found = [(*divmod(int(cell), len(matrix)), int(errors.flat[cell])) for cell in cells if errors.flat[cell]]
    return [(t, p, count, count / int(matrix[t].sum())) for t, p, count in found]
