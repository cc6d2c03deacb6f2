"""Results of a job: one member for each seed, with learning curve and predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


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
      notes: further information for the report.
    """

    seed: int
    best_epoch: float
    best_valid: float
    curve: Sequence[CurvePoint]
    predictions: Predictions
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
