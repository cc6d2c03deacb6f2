"""Linear probe of the frozen LM's hidden states (Alain and Bengio 2017).

An utterance's feature is the mean over units of one layer's output, standardised on train; the classifier is
`linear.fit_linear`. The layer is chosen on valid, with the first of the strengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spjax.evaluation import linear
from spjax.tasks import LOWER_IS_BETTER, Task
from spjax.types import Json

STRENGTHS = (0.01, 0.001, 0.1, 1.0)  # of scikit-learn's C


def probe_baseline(
    task: Task,
    states: Mapping[str, np.ndarray],
    classes: Mapping[str, np.ndarray],
    *,
    strengths: Sequence[float] = STRENGTHS,
) -> Json:
    """Fit and score the probe.

    Args:
      task: K slots.
      states: by split ("train", "valid", "test"), float32 [L, n, D] from `spjax.training.pooling.pooled_states`.
      classes: by split, int [n, K], class ids over all slots.
      strengths: values of scikit-learn's C, chosen on valid; the layer is chosen with the first one.

    Returns:
      The result of `linear.fit_linear`, and "layer": the chosen layer, 1..L.

    Raises:
      ValueError: as `linear.fit_linear`.
    """
    sign = -1 if task.metric in LOWER_IS_BETTER else 1

    def fit(layer: int, strengths: Sequence[float]) -> Json:
        train = states["train"][layer]
        mean, scale = train.mean(axis=0), train.std(axis=0) + 1e-6
        features = {split: (every[layer] - mean) / scale for split, every in states.items()}
        return linear.fit_linear(task, features, classes, strengths=strengths) | {"layer": layer + 1}

    tried = [fit(layer, strengths[:1]) for layer in range(len(states["train"]))]
    best = max(tried, key=lambda found: sign * found["valid"])
    return fit(best["layer"] - 1, strengths)
