"""Shared functions of the builders: find files, read text, shuffle, split and check clips.

Results depend neither on directory order nor on library versions: listings are sorted, and random orders are drawn from
raw bits of PCG64, which numpy guarantees never to change. The reference's splits came from shuffles of Python, numpy or
scikit-learn, some without a seed; ours have their sizes, not their members.

Names are compared as Unicode NFC: a disk may have "č" as one code point or as two, depending on the unpacking tool.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from etils import epath

from data_pipelines.clips import Clip, Splits
from spjax import paths
from spjax.io import places
from spjax.tasks import Task

Item = TypeVar("Item")

SPLITS = ("train", "valid", "test")
PROTOCOLS = ("paper", "honest")


class BuildError(ValueError):
    """A raw data set is invalid; the message names the file and the value and suggests a fix."""


# ---- files


def check_protocol(protocol: str, known: Collection[str] = PROTOCOLS) -> None:
    """Raises BuildError unless `protocol` is one of `known`."""
    if protocol not in known:
        raise BuildError(f"protocol {protocol!r} is unknown: choose {' or '.join(known)}")


def composed(text: str) -> str:
    """Returns the text in Unicode NFC, the form in which file names, ids and labels are compared."""
    return unicodedata.normalize("NFC", text)


def relative(path: epath.PathLike, root: epath.PathLike) -> str:
    """Returns `path` relative to `root`, with forward slashes, as on disk (an id is its `composed` form)."""
    return epath.Path(path).relative_to(epath.Path(root)).as_posix()


def is_file(path: epath.PathLike) -> bool:
    """Returns whether a regular file exists; folders, pipes and devices do not count."""
    return epath.Path(path).is_file() if places.is_remote(path) else os.path.isfile(path)


def find(files: Mapping[str, str], path: str, where: str) -> str:
    """Returns `path` (relative to the root) as it is on disk.

    Args:
      files: the result of `audio_files`.
      path: path in a table.
      where: the position in the table, for messages.

    Raises:
      BuildError: `files` lacks the path.
    """
    found = files.get(composed(path))
    if found is None:
        raise BuildError(f"{where} names {path}, which is missing: unpack the whole data set, or remove the row")
    return found


def read_text(path: epath.PathLike) -> str:
    """Reads a text file in UTF-8, with or without byte order mark; used for all text of data sets.

    Raises:
      BuildError: a missing file, or one that is not UTF-8 or has NUL bytes.
    """
    path = epath.Path(path)
    if not is_file(path):
        what = "is not a regular file" if path.exists() else "is missing"
        raise BuildError(f"{path} {what}: it is part of the data set, put it there")
    content = path.read_bytes()
    marked = (name for mark, name in _OTHER_MARKS.items() if content.startswith(mark))
    if name := next(marked, paths.packed(content)):
        raise BuildError(f"{path} is {name}: save it as text in UTF-8")
    try:
        text = content.decode("utf-8").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BuildError(f"{path}, line {line} is not UTF-8 text ({error}): save it as UTF-8") from error
    if (first := text.find("\0")) >= 0:
        line = text.count("\n", 0, first) + 1
        raise BuildError(f"{path}, line {line} holds a NUL byte (text in UTF-16, or damaged): save it as UTF-8")
    return text


_OTHER_MARKS = {
    b"\xff\xfe\0\0": "text in UTF-32",
    b"\0\0\xfe\xff": "text in UTF-32",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    paths.ZIP: "a zip archive, such as a workbook of Excel",
}


# ---- splitting


def shuffled(items: Iterable[Item], seed: int) -> list[Item]:
    """Shuffles items by the seed alone, equally on every machine and version. Sort the items first."""
    items = list(items)
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(len(items))
    return [items[i] for i in np.argsort(bits, kind="stable")]


def uniform(count: int, seed: int) -> np.ndarray:
    """Draws float64 [count] in [0, 1) by the seed alone, equally on every machine and version."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, 1])).random_raw(count)
    return (bits >> np.uint64(11)) * 2.0**-53


def stratified(clips: Iterable[Clip], fractions: Mapping[str, float], seed: int) -> Splits:
    """Splits clips so that each split has its fraction of all clips and of every label combination.

    A combination with at least as many clips as there are splits is in every split. Speakers and sources are ignored;
    see `by_speaker` and `grouped`.

    Args:
      clips: in any order.
      fractions: of each split, above 0, summing to 1.
      seed: of the draw.
    """
    shares = _shares(fractions)
    strata: dict[tuple[str, ...], list[Clip]] = {}
    for clip in shuffled(_by_id(clips), seed):
        strata.setdefault(clip.labels, []).append(clip)
    splits: Splits = {split: [] for split in fractions}
    behind = np.zeros(len(shares))  # clips that each split is short of after the previous strata
    for _, members in sorted(strata.items()):
        exact = len(members) * shares
        number = np.floor(exact + 1e-9).astype(int)
        if len(members) >= len(shares):
            number = np.maximum(number, 1)
        behind += exact - number
        while (over := number.sum() - len(members)) != 0:
            able = number > (1 if len(members) >= len(shares) else 0)
            chosen = int(np.argmax(behind)) if over < 0 else int(np.argmin(np.where(able, behind, np.inf)))
            step = 1 if over < 0 else -1
            number[chosen] += step
            behind[chosen] -= step
        ends = np.cumsum(number)
        for split, end, count in zip(fractions, ends, number, strict=True):
            splits[split] += members[end - count : end]
    return {split: _by_id(part) for split, part in splits.items()}


def by_speaker(clips: Iterable[Clip], fractions: Mapping[str, float], seed: int) -> Splits:
    """Splits by `grouped` so that no speaker and no source is in two splits; clips with neither are single groups."""
    return grouped(clips, fractions, seed, lambda clip: _names(speaker=clip.speaker, source=clip.source))


def by_source(clips: Iterable[Clip], fractions: Mapping[str, float], seed: int) -> Splits:
    """Splits by `grouped` so that no source is in two splits; speakers may be."""
    return grouped(clips, fractions, seed, lambda clip: _names(source=clip.source))


def grouped(
    clips: Iterable[Clip],
    fractions: Mapping[str, float],
    seed: int,
    names: Callable[[Clip], Iterable[Hashable]],
) -> Splits:
    """Splits clips so that clips with a name in common stay together, with labels as balanced as that allows.

    Groups are assigned from the largest to the smallest, each to the split that it brings closest (chi-squared) to its
    fraction of every label; splits that would otherwise lack a label have priority.

    Args:
      clips: in any order.
      fractions: of each split, above 0, summing to 1.
      seed: breaks ties.
      names: returns the names that a clip must not share with a clip of another split.

    Raises:
      BuildError: fewer groups than splits.
    """
    shares = _shares(fractions)
    groups = _components(_by_id(clips), names)
    if len(groups) < len(shares):
        raise BuildError(
            f"{len(groups)} groups of clips that must stay together (speaker, source, equal files) are too few for "
            f"{len(shares)} splits ({', '.join(fractions)})"
        )
    groups = sorted(shuffled(groups, seed), key=len, reverse=True)
    labels = {label: column for column, label in enumerate(sorted({clip.labels for part in groups for clip in part}))}
    # One column a label, and a last one that counts every clip, to balance sizes
    counts = np.zeros((len(groups), len(labels) + 1))
    for row, part in enumerate(groups):
        for clip in part:
            counts[row, labels[clip.labels]] += 1
        counts[row, -1] = len(part)
    target = shares[:, None] * counts.sum(axis=0)
    has = np.zeros_like(target)
    left = (counts > 0).sum(axis=0)  # number of unassigned groups with each label
    splits: Splits = {split: [] for split in fractions}
    names_of = list(fractions)
    for part, its in zip(groups, counts, strict=True):
        lacking = has == 0
        urgent = lacking & (its > 0) & (left <= lacking.sum(axis=0))
        # Priorities: no empty split, then labels, then balance
        cost = (its * (2 * has + its) / target).sum(axis=1)
        order = np.lexsort((np.arange(len(shares)), np.round(cost, 9), -urgent[:, :-1].sum(axis=1), ~urgent[:, -1]))
        chosen = int(order[0])
        splits[names_of[chosen]] += part
        has[chosen] += its
        left = left - (its > 0)
    return {split: _by_id(part) for split, part in splits.items()}


def folds(
    clips: Iterable[Clip], count: int, seed: int, names: Callable[[Clip], Iterable[Hashable]] | None = None
) -> list[list[Clip]]:
    """Splits clips into `count` equal folds with balanced labels; `names` keeps clips together, as in `grouped`."""
    fractions = {str(number): 1 / count for number in range(count)}
    parts = grouped(clips, fractions, seed, names) if names else stratified(clips, fractions, seed)
    return list(parts.values())


def checked(splits: Mapping[str, Iterable[Clip]], task: Task) -> Splits:
    """Validates splits and sorts each by id; every `clips` function returns its result.

    Raises:
      BuildError: an empty split, a duplicate id in a split, or labels that are not in the task.
    """
    known = [frozenset(slot.labels) for slot in task.slots]
    in_order: Splits = {split: _by_id(part) for split, part in splits.items()}
    for split, clips in in_order.items():
        if not clips:
            raise BuildError(f"{task.name}: split {split!r} has no clips: the raw data set is incomplete")
        twice = [name for name, number in Counter(clip.id for clip in clips).items() if number > 1]
        if twice:
            raise BuildError(
                f"{task.name}: split {split!r} has {twice[0]!r} twice ({len(twice)} duplicates): remove one row"
            )
        for clip in clips:
            if len(clip.labels) != len(known) or not all(map(frozenset.__contains__, known, clip.labels)):
                raise BuildError(
                    f"{task.name}: {clip.path} has the label {' | '.join(clip.labels)!r}, which is not in the task: "
                    f"{'; '.join(f'{slot.name}: ' + ', '.join(slot.labels[:60]) for slot in task.slots)}"
                )
    return in_order


def _by_id(clips: Iterable[Clip]) -> list[Clip]:
    return sorted(clips, key=lambda clip: (clip.id, clip.start))


def _names(**values: str) -> list[tuple[str, str]]:
    return [(what, value) for what, value in values.items() if value]


def _shares(fractions: Mapping[str, float]) -> np.ndarray:
    shares = np.asarray(list(fractions.values()), np.float64)
    if not len(shares) or shares.min() <= 0 or abs(shares.sum() - 1) > 1e-6:
        raise BuildError(f"fractions must be above 0 and sum to 1, not {dict(fractions)}")
    return shares


def _components(clips: Sequence[Clip], names: Callable[[Clip], Iterable[Hashable]]) -> list[list[Clip]]:
    """Groups clips that share a name, directly or through others (union-find); groups in order of their first clip."""
    parent = list(range(len(clips)))

    def top(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Hashable, int] = {}
    for i, clip in enumerate(clips):
        for name in names(clip):
            a, b = sorted((top(i), top(first.setdefault(name, i))))
            parent[b] = a
    parts: dict[int, list[Clip]] = {}
    for i, clip in enumerate(clips):
        parts.setdefault(top(i), []).append(clip)
    return list(parts.values())
