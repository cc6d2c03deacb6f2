"""What came of a job: one member a seed, with its learning curve and its answers on a split."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What one member answered on one split.

    Attributes:
      ids: n utterance ids.
      true: integers [n, slots], class ids over all slots.
      predicted: integers [n, slots], likewise.
      probabilities: per slot [n, C_k], rows summing to 1.
    """

    ids: Sequence[str]
    true: np.ndarray
    predicted: np.ndarray
    probabilities: Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """One evaluation during training: epochs seen, mean training loss since the last one, valid metric."""

    epoch: float
    train_loss: float
    valid: float


@dataclasses.dataclass(frozen=True)
class Member:
    """One trained member of a bank.

    Attributes:
      seed: its seed.
      best_epoch: the epoch whose parameters were kept, chosen on valid.
      best_valid: the task's metric on valid at that epoch.
      curve: evaluations in order.
      predictions: on the split that the report is about.
      notes: anything else worth a line per member (learning rate, why it stopped).
    """

    seed: int
    best_epoch: float
    best_valid: float
    curve: Sequence[CurvePoint]
    predictions: Predictions
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
