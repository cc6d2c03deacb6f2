"""Makes a data set from the user's clips: the task, missing splits, and notes."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etils import epath

from data_pipelines import doubts
from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import copies
from data_pipelines.splits import SPLITS, BuildError, checked, grouped, stratified
from spjax.tasks import Slot, Task

ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}  # names of splits in any case, and what they mean
# Other names of splits, such as train_set, trn, dev-clean, val2017.
LIKE_A_SPLIT = re.compile(rf"({'|'.join(ALIASES)}|trn|tst)([\W\d_].*)?", re.IGNORECASE)
FRACTIONS = {"train": 0.8, "valid": 0.1, "test": 0.1}


class UserData(NamedTuple):
    """A data set of the user.

    Attributes:
      task: the task of its labels.
      splits: its clips.
      raw: root of the clips' paths.
      notes: sentences about what was skipped, and about likely mistakes.
    """

    task: Task
    splits: Splits
    raw: str
    notes: tuple[str, ...]


def finish(
    place: epath.Path,
    root: epath.Path,
    name: str,
    clips: Mapping[str, list[Clip]],
    columns: Sequence[str],
    metric: str | None,
    fractions: Mapping[str, float],
    seed: int,
    notes: Sequence[str],
    advice: str = "",
) -> UserData:
    """Makes the task and its missing splits.

    Args:
      place: the CSV or folder, for messages.
      root: of the clips' paths.
      name: of the task; converted to a valid one.
      clips: by split; clips under "" are to be split.
      columns: names of the slots.
      metric: None for accuracy, or exact_match of several slots.
      fractions, seed: of splits that are made.
      notes: put first.
      advice: appended to errors about the labels of a slot.

    Raises:
      BuildError: a slot with one label, a required split without clips, splits that cannot be made, or a label that is
        not in train.
    """
    every = [clip for part in clips.values() for clip in part]
    slots = []
    for number, column in enumerate(columns):
        counts = Counter(clip.labels[number] for clip in every)
        if len(counts) < 2:
            raise BuildError(
                f"{place}, {column}: every label is {next(iter(counts))!r}: give at least two different labels{advice}"
            )
        try:
            slots.append(Slot(column, tuple(sorted(counts))))
        except ValueError as error:
            raise BuildError(f"{place}: {error}; make these labels equal or distinct") from error
    task = Task(_task_name(name), tuple(slots), metric or ("accuracy" if len(slots) == 1 else "exact_match"))
    copy_of = copies(root, list(dict.fromkeys(clip.path for clip in every)))
    splits = _made(place, task, dict(clips), every, fractions, seed, copy_of, advice)
    for number, slot in enumerate(slots):
        known = {clip.labels[number] for clip in splits["train"]}
        for split in ("valid", "test"):
            unseen = sorted({clip.labels[number] for clip in splits[split]} - known)
            if unseen:
                raise BuildError(
                    f"{place}, {slot.name}: {unseen[0]!r} is in {split} but not in train ({len(unseen)} such labels); "
                    "move some of its clips to train, remove it, or use another seed if splits were made"
                    f"{advice}"
                )
    found = (doubts.of_spelling(task, every), doubts.of_splits(task, splits), doubts.of_copies(splits, copy_of))
    return UserData(task, checked(splits, task), str(root), (*notes, *itertools.chain(*found)))


def _made(
    place: epath.Path,
    task: Task,
    clips: dict[str, list[Clip]],
    every: list[Clip],
    fractions: Mapping[str, float],
    seed: int,
    copy_of: Mapping[str, str],
    advice: str,
) -> Splits:
    if set(clips) == set(SPLITS):
        return clips
    for split in ("train", "test"):
        if "" not in clips and split not in clips:
            raise BuildError(
                f"{place} has {', '.join(sorted(clips))} but no {split}: give it clips, or leave all splits to be made"
            )
    if "" in clips:
        parts = dict(fractions)
        if set(parts) != set(SPLITS):
            raise BuildError(f"fractions must be of {', '.join(SPLITS)}, not {dict(fractions)}")
        source, clips = every, {}
    else:  # only valid is missing
        parts = {split: fractions[split] / (fractions["train"] + fractions["valid"]) for split in ("train", "valid")}
        source = clips["train"]
    for number, slot in enumerate(task.slots):
        rare = [label for label, count in Counter(c.labels[number] for c in source).items() if count < len(parts)]
        if rare:
            raise BuildError(
                f"{place}, {slot.name}: {min(rare)!r} has fewer than {len(parts)} clips, too few to be in every split "
                f"that is made; add some, remove it, or give the splits in a column split{advice}"
            )

    def names(clip: Clip) -> list[tuple[str, str]]:
        found = (("speaker", clip.speaker), ("source", clip.source), ("content", copy_of.get(clip.path, "")))
        return [(what, value) for what, value in found if value]

    try:
        if any(map(names, source)):
            return {**clips, **grouped(source, parts, seed, names)}
        return {**clips, **stratified(source, parts, seed)}
    except BuildError as error:
        raise BuildError(f"{place}: {error}; give the splits in a column split") from error


def _task_name(name: str) -> str:
    """Converts a name to one that records may have: letters, digits and _, starting with a letter."""
    plain = re.sub(r"\W+", "_", unicodedata.normalize("NFKD", name), flags=re.ASCII).strip("_")
    return plain if plain[:1].isalpha() else f"task_{plain}".rstrip("_")
