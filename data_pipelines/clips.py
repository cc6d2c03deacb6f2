"""Clips: the utterances of a data set before any audio is read. Builders list them, extraction reads them."""

from __future__ import annotations

from typing import NamedTuple


class Clip(NamedTuple):
    """One utterance of a data set.

    Attributes:
      id: unique in its data set and the same on every machine: path under the root, and the crop if there is one.
      path: audio file, relative to the data set's root, with forward slashes.
      labels: one label a slot of the task, exactly as in the task.
      speaker: speaker id; "" if unknown.
      source: the recording that this one was cut or copied from; all its clips belong in one split. "" for itself.
      start: seconds into the file.
      duration: seconds; None for the rest of the file.
    """

    id: str
    path: str
    labels: tuple[str, ...]
    speaker: str = ""
    source: str = ""
    start: float = 0.0
    duration: float | None = None


Splits = dict[str, list[Clip]]  # "train", "valid", "test"
