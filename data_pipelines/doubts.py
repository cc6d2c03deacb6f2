"""Notes on what may be wrong with the user's data though they can be used, for the screen and the card."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from data_pipelines.clips import Clip, Splits
from data_pipelines.splits import composed
from spjax.tasks import Task


def of_spelling(task: Task, clips: Sequence[Clip]) -> list[str]:
    """Labels, and speakers, that differ in case, spacing or the form of a number only; and speakers who are not named.

    Each is taken as it is spelled: labels as different ones, clips without a speaker as of a speaker each.
    """
    named = {clip.speaker for clip in clips if clip.speaker}
    kinds = [(f"labels of {slot.name}", slot.labels) for slot in task.slots]
    found = []
    for what, values in (*kinds, ("speakers", sorted(named))):
        pairs = _alike(values)
        if pairs:
            one, other = pairs[0]
            more = f" ({len(pairs)} such pairs)" if len(pairs) > 1 else ""
            found.append(f"{what}: {one!r} and {other!r} are spelled almost alike and taken as different{more}")
    nobody = sum(not clip.speaker for clip in clips)
    if named and nobody:
        found.append(f"{nobody} of {len(clips)} clips have no speaker: theirs may be in several splits")
    return found


def of_splits(task: Task, splits: Splits) -> list[str]:
    """Labels that valid or test lacks."""
    found = []
    for split in ("valid", "test"):
        for number, slot in enumerate(task.slots):
            lacking = sorted(set(slot.labels) - {clip.labels[number] for clip in splits[split]})
            if lacking:
                number_of = f"{len(lacking)} of {len(slot.labels)} labels of {slot.name}"
                found.append(f"{split} lacks {number_of}, the first {lacking[0]!r}")
    return found


def of_copies(splits: Splits, copy_of: Mapping[str, str]) -> list[str]:
    """Files of equal content: how many, which cross splits, which have other labels.

    Args:
      splits: the clips.
      copy_of: as of `data_pipelines.listing.copies`.
    """
    if not copy_of:
        return []
    groups: dict[tuple[str, float, float | None], list[tuple[str, Clip]]] = defaultdict(list)
    for split, clips in splits.items():
        for clip in clips:
            if clip.path in copy_of:
                groups[copy_of[clip.path], clip.start, clip.duration].append((split, clip))
    files = len(copy_of) - len(set(copy_of.values()))
    first, original = next((path, path_of) for path, path_of in copy_of.items() if path != path_of)
    found = [f"files that hold the same bytes as another: {files}, the first {first} as {original}"]
    # crops of copies are other utterances, and come from the same recording all the same
    spread: dict[str, list[tuple[str, Clip]]] = defaultdict(list)
    for group in groups.values():
        spread[copy_of[group[0][1].path]] += group
    crossing = [pair for group in spread.values() if (pair := _unlike(group, [split for split, _ in group]))]
    if crossing:
        (split, clip), (other_split, other) = crossing[0]
        found.append(
            f"recordings that are in two splits, as copies: {len(crossing)}, the first {clip.path} in {split} and "
            f"{other.path} in {other_split}; scores are too good by these, remove one of each"
        )
    torn = [pair for group in groups.values() if (pair := _unlike(group, [clip.labels for _, clip in group]))]
    if torn:
        (_, clip), (_, other) = torn[0]
        found.append(
            f"recordings whose copies have different labels: {len(torn)}, the first {clip.path} "
            f"({', '.join(clip.labels)}) and {other.path} ({', '.join(other.labels)}); correct or remove one of each"
        )
    return found


def _unlike(
    group: Sequence[tuple[str, Clip]], values: Sequence[object]
) -> tuple[tuple[str, Clip], tuple[str, Clip]] | None:
    """The first of a group, and the first of another value than it has; None where all have the same."""
    for one, value in zip(group, values, strict=True):
        if value != values[0]:
            return group[0], one
    return None


def _alike(values: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of values that a reader would take for the same."""
    first: dict[object, str] = {}
    return [(first[key], value) for value in values if first.setdefault(key := _essence(value), value) != value]


def _essence(text: str) -> object:
    """A text without what is hardly seen of it: case, spacing, width of letters, how a number is written."""
    seen = "".join(letter for letter in unicodedata.normalize("NFKC", text) if unicodedata.category(letter) != "Cf")
    seen = " ".join(composed(seen).casefold().replace("_", " ").split())
    return float(seen) if re.fullmatch(r"[+-]?\d+(\.\d*)?", seen) else seen
