"""Convert between one unit per frame and merged units with durations."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def merge(units: np.ndarray) -> tuple[Int[np.ndarray, " U"], Int[np.ndarray, " U"]]:
    """Merge runs of equal units into segments.

    Args:
      units: int [F], one a frame.

    Returns:
      units int32 [U], neighbours differ; durations int32 [U], frames of each segment, with sum F.

    Raises:
      ValueError: not int [F].
    """
    units = _integers(units, "units")
    starts = np.flatnonzero(np.diff(units, prepend=units[:1] - 1))
    return units[starts], np.diff(starts, append=len(units)).astype(np.int32)


def expand(units: np.ndarray, durations: np.ndarray) -> Int[np.ndarray, " F"]:
    """Inverse of `merge`: int32 [F], one unit a frame.

    Args:
      units: int [U]
      durations: int [U], frames of each, 0 or more.

    Raises:
      ValueError: not int [U] both, or a negative duration.
    """
    units, durations = _integers(units, "units"), _integers(durations, "durations")
    if len(units) != len(durations) or (durations < 0).any():
        raise ValueError(
            f"{len(units)} units and {len(durations)} durations, the smallest {durations.min(initial=0)}: "
            "give one duration of 0 or more for each unit"
        )
    return np.repeat(units, durations)


def _integers(array: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} are {array.dtype} {list(array.shape)}, must be integers of one dimension")
    return array.astype(np.int32)
