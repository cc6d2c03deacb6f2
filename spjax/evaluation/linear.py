"""Linear baseline: multinomial logistic regression (scikit-learn) with all choices made on valid.

There are two variants: one model for each slot, and one model over the label combinations in train (the same for a
single slot). Regularisation and variant are chosen on valid. Since valid may choose the variant that is worse on test,
both are reported; compare with the better one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spjax.evaluation import metrics
from spjax.tasks import LOWER_IS_BETTER, Task
from spjax.types import Json

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)  # scikit-learn's C, the inverse regularisation strength
HELD_OUT = ("valid", "test")


def fit_linear(
    task: Task,
    features: Json,
    classes: Mapping[str, np.ndarray],
    *,
    strengths: Sequence[float] = STRENGTHS,
    done: Callable[[], object] = lambda: None,
) -> Json:
    """Fit each variant with each strength on train, choose by valid, and score on test.

    Args:
      task: K slots.
      features: by split ("train", "valid", "test"), [n, F] each, dense or sparse.
      classes: by split, int [n, K], class ids over all slots.
      strengths: values of C, chosen on valid.
      done: called after every fit.

    Returns:
      {"train_utterances", "chosen": variant chosen on valid, "valid", "test": its headline scores, "variants":
      {"per_slot" and, with several slots, "joint": {"strength", "parameters": number of weights, "valid", "test":
      `metrics.score` of the split}}}. Ties on valid are resolved in favour of the smaller strength and of per_slot.

    Raises:
      ValueError: an empty split, or classes that do not fit the task.
    """
    for split, of_split in classes.items():
        if not len(of_split):
            raise ValueError(f"{task.name!r}: the {split} split has no utterances, so the baseline cannot be fitted")
    local = metrics.slot_classes(task, classes["train"], "train classes")
    sign = -1 if task.metric in LOWER_IS_BETTER else 1
    variants: dict[str, Json] = {}
    for name, strength in fits(task, strengths):
        answer = _per_slot if name == "per_slot" else _joint
        found, parameters = answer(task, features["train"], local, [features[split] for split in HELD_OUT], strength)
        scores = {
            split: metrics.score(task, classes[split], predicted, probabilities)
            for split, (predicted, probabilities) in zip(HELD_OUT, found, strict=True)
        }
        best = variants.get(name)
        if best is None or sign * scores["valid"]["headline"] > sign * best["valid"]["headline"]:
            variants[name] = {"strength": float(strength), "parameters": parameters, **scores}
        done()
    chosen = max(variants, key=lambda name: sign * variants[name]["valid"]["headline"])
    return {
        "train_utterances": len(local),
        "chosen": chosen,
        **{split: variants[chosen][split]["headline"] for split in HELD_OUT},
        "variants": variants,
    }


def fits(task: Task, strengths: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Yield every (variant, strength) that `fit_linear` fits."""
    for name in ("per_slot", "joint") if len(task.slots) > 1 else ("per_slot",):
        for strength in sorted(strengths):
            yield name, strength


# For each split: predicted classes [n, K] over all slots and K probability arrays [n, C_k]; and the number of weights.
_Answers = tuple[list[tuple[np.ndarray, list[np.ndarray]]], int]


def _per_slot(task: Task, features: Any, local: np.ndarray, others: list[Any], strength: float) -> _Answers:
    fitted = [
        _probabilities(features, local[:, k], others, len(slot.labels), strength) for k, slot in enumerate(task.slots)
    ]
    answers = [
        (np.stack([p.argmax(1) for p in slots], 1) + task.slot_offsets[:-1], list(slots))
        for slots in zip(*(found for found, _ in fitted), strict=True)
    ]
    return answers, sum(parameters for _, parameters in fitted)


def _joint(task: Task, features: Any, local: np.ndarray, others: list[Any], strength: float) -> _Answers:
    seen, combination = np.unique(local, axis=0, return_inverse=True)
    membership = [np.eye(len(slot.labels))[seen[:, k]] for k, slot in enumerate(task.slots)]  # [combinations, C_k]
    found, parameters = _probabilities(features, combination.reshape(-1), others, len(seen), strength)
    return [
        (seen[p.argmax(1)] + task.slot_offsets[:-1], [p @ member for member in membership]) for p in found
    ], parameters


def _probabilities(
    features: Any, target: np.ndarray, others: list[Any], size: int, strength: float
) -> tuple[list[np.ndarray], int]:
    """Fit `target` [n] in 0..size-1 and predict [n', size] for each of `others`; unseen classes get 0.

    Returns:
      The predictions, and the number of weights.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    known, parameters = np.unique(target), 0
    if len(known) == 1:  # scikit-learn rejects a single class
        fitted = [np.ones((other.shape[0], 1)) for other in others]
    else:
        with threadpool_limits(1):  # the vectors of lbfgs are too short for several threads
            model = LogisticRegression(C=strength, max_iter=1000, tol=1e-5).fit(features, target)
        fitted, parameters = [model.predict_proba(other) for other in others], model.coef_.size + model.intercept_.size
    answers = [np.zeros((other.shape[0], size)) for other in others]
    for answer, probabilities in zip(answers, fitted, strict=True):
        answer[:, known] = probabilities
    return answers, parameters
