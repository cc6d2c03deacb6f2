"""Notes about likely mistakes in the user's data, which can still be used; for the screen and the card."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from data_pipelines.clips import Clip, Splits
from data_pipelines.splits import composed
from spjax.tasks import Task


def of_spelling(task: Task, clips: Sequence[Clip]) -> list[str]:
    """Reports labels and speakers that differ only in case, spacing or number format, and clips without a speaker.

    Nothing is changed: such labels count as different, and each clip without a speaker as a separate speaker.
    """
    named = {clip.speaker for clip in clips if clip.speaker}
    kinds = [(f"labels of {slot.name}", slot.labels) for slot in task.slots]
    found = []
    for what, values in (*kinds, ("speakers", sorted(named))):
        pairs = _alike(values)
        if pairs:
            one, other = pairs[0]
            more = f" ({len(pairs)} such pairs)" if len(pairs) > 1 else ""
            found.append(f"{what}: {one!r} and {other!r} look almost alike and are treated as different{more}")
    unnamed = sum(not clip.speaker for clip in clips)
    if named and unnamed:
        found.append(f"{unnamed} of {len(clips)} clips have no speaker: their speakers may be in several splits")
    return found


def of_splits(task: Task, splits: Splits) -> list[str]:
    """Reports labels that are missing in valid or test."""
    found = []
    for split in ("valid", "test"):
        for number, slot in enumerate(task.slots):
            lacking = sorted(set(slot.labels) - {clip.labels[number] for clip in splits[split]})
            if lacking:
                number_of = f"{len(lacking)} of {len(slot.labels)} labels of {slot.name}"
                found.append(f"{split} lacks {number_of}, the first {lacking[0]!r}")
    return found


def of_copies(splits: Splits, copy_of: Mapping[str, str]) -> list[str]:
    """Reports files of equal content: how many, which are in two splits, which have different labels.

    Args:
      splits: the clips.
      copy_of: see `data_pipelines.listing.copies`.
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
    # crops of copies are different utterances of the same recording
    spread: dict[str, list[tuple[str, Clip]]] = defaultdict(list)
    for group in groups.values():
        spread[copy_of[group[0][1].path]] += group
    crossing = [pair for group in spread.values() if (pair := _unlike(group, [split for split, _ in group]))]
    if crossing:
        (split, clip), (other_split, other) = crossing[0]
        found.append(
            f"recordings that are in two splits, as copies: {len(crossing)}, the first {clip.path} in {split} and "
            f"{other.path} in {other_split}; they inflate scores, remove one of each"
        )
    conflicting = [pair for group in groups.values() if (pair := _unlike(group, [clip.labels for _, clip in group]))]
    if conflicting:
        (_, clip), (_, other) = conflicting[0]
        found.append(
            f"recordings whose copies have different labels: {len(conflicting)}, the first {clip.path} "
            f"({', '.join(clip.labels)}) and {other.path} ({', '.join(other.labels)}); correct or remove one of each"
        )
    return found


def _unlike(
    group: Sequence[tuple[str, Clip]], values: Sequence[object]
) -> tuple[tuple[str, Clip], tuple[str, Clip]] | None:
    """Returns the first of a group and the first with another value; None if all values are equal."""
    for one, value in zip(group, values, strict=True):
        if value != values[0]:
            return group[0], one
    return None


def _alike(values: Iterable[str]) -> list[tuple[str, str]]:
    """Returns pairs of values that look the same to a reader."""
    first: dict[object, str] = {}
    return [(first[key], value) for value in values if first.setdefault(key := _normalised(value), value) != value]


def _normalised(text: str) -> object:
    """Removes differences that are hard to see: case, spacing, width of letters, number format."""
    seen = "".join(letter for letter in unicodedata.normalize("NFKC", text) if unicodedata.category(letter) != "Cf")
    seen = " ".join(composed(seen).casefold().replace("_", " ").split())
    return float(seen) if re.fullmatch(r"[+-]?\d+(\.\d*)?", seen) else seen
