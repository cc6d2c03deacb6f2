"""What listing and splitting a data set has in common: files found, tables read, clips shuffled, dealt out and checked.

Nothing here depends on the order in which a file system lists names, nor on the release of a library: listings are
sorted, and orders are drawn from raw bits of PCG64, which numpy guarantees never to change. The reference's splits came
out of Python's, numpy's or scikit-learn's own shuffles, some without a seed; ours have their sizes, not their members.

Names are compared as Unicode NFC: a disk may hold "č" as one letter or as two, depending on who unpacked the archive.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from etils import epath

from data_pipelines.clips import Clip, Splits
from spjax.speech2unit.audio import SUFFIXES
from spjax.tasks import Task

Item = TypeVar("Item")

SPLITS = ("train", "valid", "test")
PROTOCOLS = ("paper", "honest")


class BuildError(ValueError):
    """A raw data set is not what it must be; the message names the file, the value and the way out."""


class Row(NamedTuple):
    """A row of a table: where it stands ("FILE, line N", for messages) and its values by column."""

    where: str
    values: dict[str, str]


# ---- what is there


def check_protocol(protocol: str, known: Collection[str] = PROTOCOLS) -> None:
    """Raises BuildError unless `protocol` is one of `known`."""
    if protocol not in known:
        raise BuildError(f"protocol {protocol!r} is unknown: choose {' or '.join(known)}")


def composed(text: str) -> str:
    """The text in Unicode NFC, in which names of files, ids and labels are compared."""
    return unicodedata.normalize("NFC", text)


def relative(path: epath.PathLike, root: epath.PathLike) -> str:
    """`path` under `root`, with forward slashes and spelled as on disk (an id is its `composed` form)."""
    return epath.Path(path).relative_to(epath.Path(root)).as_posix()


def audio_files(
    raw: epath.PathLike, folder: str = "", suffixes: Sequence[str] = SUFFIXES, optional: bool = False
) -> dict[str, str]:
    """Every audio file below a folder. Hidden files and folders and other kinds of file are passed over.

    Args:
      raw: root of the data set; local or gs://.
      folder: where to look below it, with forward slashes.
      suffixes: what names of audio files end in, in lower case.
      optional: a folder that is missing or holds none gives no files instead of an error.

    Returns:
      Path relative to `raw`, in NFC → the same as spelled on disk (what `Clip.path` must say); sorted by the former.

    Raises:
      BuildError: the folder is missing or holds no audio, or two names differ only in how their letters are composed.
    """
    root = epath.Path(raw)
    top = root / folder if folder else root
    if not top.is_dir():
        if optional:
            return {}
        raise BuildError(f"{top} is no folder: unpack the data set there, or point to its root with --raw")
    found: dict[str, str] = {}
    folders = [top]
    while folders:
        for entry in folders.pop().iterdir():
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(tuple(suffixes)):
                path = relative(entry, root)
                if composed(path) in found:
                    raise BuildError(f"{root}: {path!r} is there twice, its letters composed and not: remove one")
                found[composed(path)] = path
            elif entry.is_dir():
                folders.append(entry)
    if not found and not optional:
        raise BuildError(f"{top} holds no audio ({', '.join(suffixes)}): unpack the data set there")
    return dict(sorted(found.items()))


def find(files: Mapping[str, str], path: str, where: str) -> str:
    """`path` (relative to the root) as it is spelled on disk.

    Raises:
      BuildError: `files` (of `audio_files`) lacks it. `where` says who names it.
    """
    spelled = files.get(composed(path))
    if spelled is None:
        raise BuildError(f"{where} names {path}, which is missing: unpack the whole data set, or remove the row")
    return spelled


def find_table(raw: epath.PathLike, name: str) -> epath.Path:
    """A split's table, at the root of the data set or in its folder `csv`.

    Raises:
      BuildError: in neither.
    """
    places = [epath.Path(raw) / "csv" / name, epath.Path(raw) / name]
    for place in places:
        if place.is_file():
            return place
    raise BuildError(f"{places[0]} is missing, and so is {places[1]}: it says what is in the split, put it there")


def read_text(path: epath.PathLike) -> str:
    """A text file in UTF-8, with or without byte order mark.

    Raises:
      BuildError: it is missing or not UTF-8.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise BuildError(f"{path} is missing: it belongs to the data set, put it there")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BuildError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error


def read_table(path: epath.PathLike, columns: Collection[str], delimiter: str = ",") -> list[Row]:
    """The rows of a delimited text file whose first line names its columns; blank lines are passed over.

    Raises:
      BuildError: missing, not UTF-8, lacks one of `columns`, or a row has more or fewer fields than the header.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    try:
        header = [name.strip() for name in next(reader, [])]
        lacking = [name for name in columns if name not in header]
        if lacking:
            raise BuildError(
                f"{path} has the columns {header}, lacks {', '.join(lacking)}: its first line must name them, "
                f"parted by {delimiter!r}"
            )
        if len(set(header)) < len(header):
            raise BuildError(f"{path} names a column twice: {header}")
        rows = []
        for fields in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(field.strip() for field in fields):
                continue
            if len(fields) != len(header):
                raise BuildError(f"{where} has {len(fields)} fields where the header has {len(header)}: correct it")
            rows.append(Row(where, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise BuildError(f"{path}, line {reader.line_num}: {error}; correct the line") from error
    if not rows:
        raise BuildError(f"{path} has no rows: take it from its source again")
    return rows


# ---- splitting


def shuffled(items: Iterable[Item], seed: int) -> list[Item]:
    """The items in an order drawn from the seed alone, the same on every machine and release. Sort them before."""
    items = list(items)
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(len(items))
    return [items[i] for i in np.argsort(bits, kind="stable")]


def uniform(count: int, seed: int) -> np.ndarray:
    """float64 [count] in [0, 1), drawn from the seed alone, the same on every machine and release."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, 1])).random_raw(count)
    return (bits >> np.uint64(11)) * 2.0**-53


def stratified(clips: Iterable[Clip], fractions: Mapping[str, float], seed: int) -> Splits:
    """Deals clips out one by one so that each split has its fraction of all of them and of every label combination.

    A combination with as many clips as there are splits, or more, is in every split. Speakers and sources are not
    looked at: `by_speaker` and `grouped` keep them together.

    Args:
      clips: in any order.
      fractions: share of each split, above 0, summing to 1.
      seed: of the draw.
    """
    shares = _shares(fractions)
    strata: dict[tuple[str, ...], list[Clip]] = {}
    for clip in shuffled(_by_id(clips), seed):
        strata.setdefault(clip.labels, []).append(clip)
    dealt: Splits = {split: [] for split in fractions}
    behind = np.zeros(len(shares))  # what each split is still owed by the strata before
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
            dealt[split] += members[end - count : end]
    return {split: _by_id(part) for split, part in dealt.items()}


def by_speaker(clips: Iterable[Clip], fractions: Mapping[str, float], seed: int) -> Splits:
    """`grouped` so that neither a speaker nor a source stands in two splits; clips without either stand alone."""
    return grouped(clips, fractions, seed, lambda clip: _names(speaker=clip.speaker, source=clip.source))


def by_source(clips: Iterable[Clip], fractions: Mapping[str, float], seed: int) -> Splits:
    """`grouped` so that no source stands in two splits; speakers may."""
    return grouped(clips, fractions, seed, lambda clip: _names(source=clip.source))


def grouped(
    clips: Iterable[Clip],
    fractions: Mapping[str, float],
    seed: int,
    names: Callable[[Clip], Iterable[Hashable]],
) -> Splits:
    """Deals clips out so that clips with a name in common are never parted, labels as even as that allows.

    Groups are dealt from the largest to the smallest, each to the split that it leaves nearest (chi-squared) to its
    share of every label; a split that would otherwise be left without a label comes first.

    Args:
      clips: in any order.
      fractions: share of each split, above 0, summing to 1.
      seed: settles what is equally good.
      names: what a clip must not share with a clip of another split.

    Raises:
      BuildError: fewer groups than splits.
    """
    shares = _shares(fractions)
    groups = _components(_by_id(clips), names)
    if len(groups) < len(shares):
        raise BuildError(
            f"{len(groups)} groups of clips that belong together (speakers, sources) cannot make {len(shares)} splits "
            f"({', '.join(fractions)}): name fewer splits, or split without regard to them"
        )
    groups = sorted(shuffled(groups, seed), key=len, reverse=True)
    labels = {label: column for column, label in enumerate(sorted({clip.labels for part in groups for clip in part}))}
    # One column a label, and one that every clip counts in, so that sizes are held too
    counts = np.zeros((len(groups), len(labels) + 1))
    for row, part in enumerate(groups):
        for clip in part:
            counts[row, labels[clip.labels]] += 1
        counts[row, -1] = len(part)
    target = shares[:, None] * counts.sum(axis=0)
    has = np.zeros_like(target)
    left = (counts > 0).sum(axis=0)  # groups not dealt yet that hold each label
    dealt: Splits = {split: [] for split in fractions}
    names_of = list(fractions)
    for part, its in zip(groups, counts, strict=True):
        lacking = has == 0
        urgent = lacking & (its > 0) & (left <= lacking.sum(axis=0))
        # no split may stay empty; then labels; then evenness
        cost = (its * (2 * has + its) / target).sum(axis=1)
        order = np.lexsort((np.arange(len(shares)), np.round(cost, 9), -urgent[:, :-1].sum(axis=1), ~urgent[:, -1]))
        chosen = int(order[0])
        dealt[names_of[chosen]] += part
        has[chosen] += its
        left = left - (its > 0)
    return {split: _by_id(part) for split, part in dealt.items()}


def folds(
    clips: Iterable[Clip], count: int, seed: int, names: Callable[[Clip], Iterable[Hashable]] | None = None
) -> list[list[Clip]]:
    """`count` equal parts, labels even; clips that share one of `names` (if given, as of `grouped`) stay together."""
    fractions = {str(number): 1 / count for number in range(count)}
    parts = grouped(clips, fractions, seed, names) if names else stratified(clips, fractions, seed)
    return list(parts.values())


def checked(splits: Mapping[str, Iterable[Clip]], task: Task) -> Splits:
    """The splits, each sorted by id, after a last look: what every `clips` function returns.

    Raises:
      BuildError: an empty split, an id twice in a split, or labels that the task does not have.
    """
    known = [frozenset(slot.labels) for slot in task.slots]
    in_order: Splits = {split: _by_id(part) for split, part in splits.items()}
    for split, clips in in_order.items():
        if not clips:
            raise BuildError(f"{task.name}: split {split!r} has no clips: the raw tree lacks what belongs there")
        twice = [name for name, number in Counter(clip.id for clip in clips).items() if number > 1]
        if twice:
            raise BuildError(f"{task.name}: split {split!r} has {twice[0]!r} twice ({len(twice)} such): remove one row")
        for clip in clips:
            if len(clip.labels) != len(known) or not all(map(frozenset.__contains__, known, clip.labels)):
                raise BuildError(
                    f"{task.name}: {clip.path} has the label {' | '.join(clip.labels)!r}, which the task lacks: "
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
    """Clips put together that share a name, directly or by way of others (union and find); in order of their first."""
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
