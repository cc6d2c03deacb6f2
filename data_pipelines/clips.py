"""A clip: an utterance of a data set before anything is read of it. Builders list these, extraction reads them."""

from __future__ import annotations

from typing import NamedTuple


class Clip(NamedTuple):
    """One utterance of a data set.

    Attributes:
      id: unique in its data set and the same on every machine: the path under the root, and the crop if there is one.
      path: the audio file, relative to the data set's root, with forward slashes.
      labels: one label a slot of the task, spelled as in the task.
      speaker: who speaks; "" where unknown.
      source: the recording that this one was cut or copied from, which must not stand in two splits; "" for itself.
      start: seconds into the file.
      duration: seconds; None for all the rest of the file.
    """

    id: str
    path: str
    labels: tuple[str, ...]
    speaker: str = ""
    source: str = ""
    start: float = 0.0
    duration: float | None = None


Splits = dict[str, list[Clip]]  # "train", "valid", "test"
