"""Reads the user's data: a CSV, or a folder with one subfolder a class.

A CSV (UTF-8, comma-separated, with a header line) has one row an utterance:

    path,split,speaker,intent,room
    a/1.wav,train,anna,turn on,kitchen

- `path`: audio file, relative to the root, or absolute. The root is the CSV's folder, or the deepest common folder if
  absolute paths are outside of it;
- `split` (optional): train, valid or test; also training, validation, val, dev, eval, evaluation (these two: test);
- `speaker` (optional): speaker id; a speaker is kept in one split when splits are made here;
- every other column, or those named as labels: a slot of the task.

Used only on request (by flag), else refused or ignored with a note:

- `start`, `duration` (`crops`): a crop, in seconds; the file is the source of its crops, unless one is given;
- a column of any name (`source`): the recording that the utterance was cut from, kept in one split as a speaker is;
- columns of free text (`text`): not labels; their quoted fields may have several lines.

The names of the columns above may be in any case. Folders: `DIR/<class>/**/*.wav` or `DIR/<split>/<class>/**/*.wav`,
in any supported audio format (`spjax.encoders.audio.SUFFIXES`); see `data_pipelines.listing` for skipped files.

Missing splits are made: 80/10/10, seeded, stratified by label, and disjoint in speakers and sources where known, and in
files of equal content. If only valid is missing it is taken from train. Classes are the labels in sorted order.
docs/own_data.md is the user's guide.
"""

from __future__ import annotations

import math
import os
import posixpath
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from tqdm import tqdm

from data_pipelines.clips import Clip
from data_pipelines.folders import read_folders
from data_pipelines.splits import SPLITS, BuildError, composed, is_file, read_text
from data_pipelines.tables import Row, read_table
from data_pipelines.user_data import ALIASES, FRACTIONS, LIKE_A_SPLIT, UserData, finish
from spjax import paths
from spjax.io import places

RESERVED = ("path", "split", "speaker")
TIMES = ("start", "duration")


def read_user_data(
    place: epath.PathLike,
    raw: epath.PathLike | None = None,
    *,
    name: str | None = None,
    metric: str | None = None,
    seed: int = 0,
    **columns: Any,
) -> UserData:
    """Reads a CSV (`read_manifest`) or a folder (`read_folders`), depending on `place`.

    Args:
      place, raw, name, metric, seed: see the two functions.
      columns: further arguments of `read_manifest`; only for a CSV.

    Raises:
      BuildError: as the two functions.
    """
    place = epath.Path(place)
    if not place.is_dir():
        return read_manifest(place, raw, name=name, metric=metric, seed=seed, **columns)
    if raw is not None or any(columns.values()):
        raise BuildError(f"{place} is a folder, whose subfolders are the labels: leave the root and columns out")
    return read_folders(place, name=name, metric=metric, seed=seed)


def read_manifest(
    path: epath.PathLike,
    raw: epath.PathLike | None = None,
    *,
    labels: Sequence[str] | None = None,
    text: Collection[str] = (),
    crops: bool = False,
    source: str | None = None,
    name: str | None = None,
    metric: str | None = None,
    fractions: Mapping[str, float] = FRACTIONS,
    seed: int = 0,
) -> UserData:
    """Reads a task and its clips from a CSV (see the module for the format).

    Args:
      path: the CSV; local or gs://.
      raw: root of the relative paths; None for the CSV's folder, or the common folder of all paths.
      labels: the label columns; None for all columns without another meaning.
      text: columns of free text.
      crops: use the columns start and duration as crops, in seconds.
      source: column of the recordings that the utterances were cut from.
      name: of the task; None for the file's name.
      metric: one of `spjax.tasks.METRICS`; None for accuracy, or exact_match of several slots.
      fractions: of splits that are made.
      seed: of splits that are made.

    Raises:
      BuildError: names the file, line, column, value and a fix.
    """
    path = epath.Path(path)
    rows = _rows(path, text, crops, source)
    base = epath.Path(places.absolute(path.parent if raw is None else raw))
    root = base if raw is not None else _root(base, rows)
    columns, notes = _label_columns(path, list(rows[0].values), labels, text, crops, source)
    if labels is None:
        notes += _check_guessed(path, columns, rows)
    clips: dict[str, list[Clip]] = defaultdict(list)
    line_of: dict[str, str] = {}
    for row in tqdm(rows, desc=path.name, unit=" rows", leave=False):
        _check_text(row, base, text)
        clip = _clip(row, base, root, columns, crops)
        if clip.id in line_of:
            advice = "remove one of them"
            if not crops and set(map(str.lower, row.values)) & set(TIMES):
                advice += ", or, if they are crops in seconds, give --crops"
            raise BuildError(f"{row.where} repeats {line_of[clip.id]}, column path: {clip.path!r}; {advice}")
        line_of[clip.id] = row.where
        clips[_split(row)].append(clip)
    if "" in clips and len(clips) > 1:
        raise BuildError(
            f"{line_of[clips[''][0].id]} has no split, but other rows have: give one in every row, or in none"
        )
    advice = ""
    if labels is None and len(columns) > 1:
        advice = f"; if not all of {', '.join(columns)} are labels, select the labels (--labels)"
    made = _with_sources(clips)
    return finish(path, root, name or path.stem, made, columns, metric, fractions, seed, notes, advice)


def _rows(path: epath.Path, text: Collection[str], crops: bool, source: str | None) -> list[Row]:
    """Reads the rows, renaming columns with a special meaning to the names in `RESERVED`, `TIMES` and "source"."""
    if not path.exists():
        raise BuildError(
            f"{path} is missing: correct the path of your CSV, or give a folder with one subfolder a class"
        )
    first = read_text(path).lstrip().partition("\n")[0]
    if "," not in first:
        for mark, called in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if mark in first:
                raise BuildError(f"{path}, line 1: {first.strip()!r} is separated by {called}: save it with commas")
    rows = read_table(path, (), multiline=text)
    header = list(rows[0].values)
    known = (*RESERVED, *(TIMES if crops else ()))
    meant = {name: name.lower() if name.lower() in known else name for name in header}
    if source is not None:
        if meant.get(source) != source:
            raise BuildError(f"{path} has no column {source!r} to use as source: choose from {', '.join(header)}")
        meant[source] = "source"
    for name in text:
        if meant.get(name) != name:
            raise BuildError(f"{path} has no column {name!r} to use as text: choose from {', '.join(header)}")
    for name in (*known, *(["source"] if source is not None else [])):
        alike = [column for column in header if meant[column] == name]
        if len(alike) > 1:
            raise BuildError(f"{path}, line 1: both {' and '.join(alike)} are the column {name}: rename one of them")
    if "path" not in meant.values():
        raise BuildError(f"{path} has the columns {header} but no path: rename the column of the audio files to path")
    ends = [name for name in header if name.lower() == "end" and name not in text]
    if crops and ends and "duration" not in meant.values():
        raise BuildError(f"{path} has the ends of crops ({ends[0]}): give their length in a column duration instead")
    if crops and not set(TIMES) & set(meant.values()):
        raise BuildError(f"{path} has the columns {header} but no start or duration: leave --crops out, or add one")
    rows = [Row(where, {meant[name]: value for name, value in values.items()}) for where, values in rows]
    return [Row(row.where, {**row.values, "path": _given(row)}) for row in rows]


def _given(row: Row) -> str:
    """Returns a row's path without file://; refuses other URLs than gs://."""
    path = row.values["path"].strip()
    try:
        return paths.given(path) if ":" in path else path
    except ValueError as error:
        raise BuildError(f"{row.where}, column path: {error}") from error


def _root(folder: epath.Path, rows: Iterable[Row]) -> epath.Path:
    """Returns the root of the clips' paths: the CSV's folder, or the common folder of it and all absolute paths."""
    if places.is_remote(folder):
        return folder
    given = {posixpath.normpath(row.values["path"]) for row in rows if "://" not in row.values["path"]}
    absolute = {os.path.dirname(path) for path in given if posixpath.isabs(path)}
    top = os.fspath(folder)
    if all(os.path.commonpath([top, above]) == top for above in absolute):
        return folder
    if any(not posixpath.isabs(path) for path in given):
        absolute.add(top)
    return epath.Path(os.path.commonpath(list(absolute)))


def _with_sources(clips: Mapping[str, list[Clip]]) -> dict[str, list[Clip]]:
    """Sets the source of crops without one: that of another crop of the same file, or else the file's path."""
    every = [clip for part in clips.values() for clip in part]
    times = Counter(composed(clip.path) for clip in every)
    sources = {path: path for path, number in times.items() if number > 1}
    for clip in sorted(every, key=lambda clip: clip.source):  # sorted, so that the order of rows does not matter
        if clip.source and composed(clip.path) in sources:
            sources[composed(clip.path)] = clip.source
    return {
        split: [clip._replace(source=clip.source or sources.get(composed(clip.path), "")) for clip in part]
        for split, part in clips.items()
    }


def _label_columns(
    path: epath.Path,
    header: list[str],
    labels: Sequence[str] | None,
    text: Collection[str],
    crops: bool,
    source: str | None,
) -> tuple[list[str], list[str]]:
    """Returns the label columns, and notes about unused columns."""
    used = {*RESERVED, *text} | (set(TIMES) if crops else set()) | ({"source"} if source is not None else set())
    free = [column for column in header if column not in used]
    if labels is not None:
        wrong = [column for column in labels if column not in free]
        if wrong or not labels or len(set(labels)) < len(labels):
            what = ", ".join(wrong or labels) or "nothing"
            raise BuildError(f"{path}: {what} cannot be the labels: choose from {free}, each once")
        unused = [column or "one without a name" for column in free if column not in labels]
        return list(labels), [f"unused columns: {', '.join(unused)}"] if unused else []
    if not free:
        raise BuildError(f"{path} has no label column, only {', '.join(header)}: add one")
    if "" in free:
        raise BuildError(f"{path}, line 1, column {header.index('') + 1} has no name: name it, or remove it")
    for column in free:
        if column.lower() in (*TIMES, "source"):
            flag = f"--source={column}" if column.lower() == "source" else "--crops"
            means = "the source of utterances" if column.lower() == "source" else "crops of files in seconds"
            others = ",".join(one for one in free if one.lower() not in (*TIMES, "end", "source")) or column
            raise BuildError(
                f"{path}: the column {column} may be {means}: if so, give {flag}; if not, select the label "
                f"columns, such as --labels={others}"
            )
    return free, []


def _check_guessed(path: epath.Path, columns: list[str], rows: Sequence[Row]) -> list[str]:
    """Refuses split columns that would become labels; returns a note with the label columns if there are several."""
    for column in columns if "split" not in rows[0].values else []:
        values = {row.values[column].strip() for row in rows}
        if len(values) > 1 and all(map(LIKE_A_SPLIT.fullmatch, values)):
            raise BuildError(
                f"{path}: the column {column} looks like splits ({', '.join(sorted(values)[:4])}): if so, name it "
                f"split, with values {', '.join(SPLITS)}; if it is a label, select the label columns by --labels"
            )
    if len(columns) < 2:
        return []
    return [f"label columns: {', '.join(columns)}; if not all of these are labels, select the labels by --labels"]


def _clip(row: Row, base: epath.Path, root: epath.Path, columns: Sequence[str], crops: bool) -> Clip:
    where, values = row
    found = _find(where, base, root, values["path"])
    labels = []
    for column in columns:
        label = composed(values[column].strip())
        if not label:
            raise BuildError(f"{where}, column {column}: the label is empty; fill it in, or remove the row")
        if len(label.splitlines()) > 1:
            raise BuildError(f"{where}, column {column}: {label!r} has more than one line; make it one")
        labels.append(label)
    start = (_seconds(row, "start") if crops else None) or 0.0
    duration = _seconds(row, "duration") if crops else None
    crop = f"@{_exact(start)}" + (f"+{_exact(duration)}" if duration else "") if start or duration else ""
    return Clip(
        id=composed(found) + crop,
        path=found,
        labels=tuple(labels),
        speaker=composed(values.get("speaker", "").strip()),
        source=composed(values.get("source", "").strip()),
        start=start,
        duration=duration,
    )


def _check_text(row: Row, base: epath.Path, text: Collection[str]) -> None:
    """Refuses free text with an unclosed quote: several lines, one of which contains the name of a file."""
    for column in text:
        lines = row.values[column].splitlines()
        for line in lines if len(lines) > 1 else []:  # also the first line: the text may precede the path
            for field in map(str.strip, line.split(",")):
                if field and is_file(base / field):
                    raise BuildError(
                        f"{row.where}, column {column}: the quote that opens there closes in a later row, after "
                        f"{field}; close it before the end of the field"
                    )


def _find(where: str, base: epath.Path, root: epath.Path, path: str) -> str:
    """Returns the path relative to the root, as on disk; relative paths are resolved against `base`."""
    if not path:
        raise BuildError(f"{where}, column path is empty: fill it in, or remove the row")
    if posixpath.isabs(path) or "://" in path:
        path = path if "://" in path else posixpath.normpath(path)
        try:
            path = epath.Path(path).relative_to(root).as_posix()
        except ValueError:
            raise BuildError(f"{where}, column path: {path} is not under {root}; give the root of all paths") from None
    elif base != root:
        path = posixpath.relpath(base / path, root)
    path = posixpath.normpath(path)
    for form in dict.fromkeys([path, composed(path), unicodedata.normalize("NFD", path)]):
        if is_file(root / form):
            return form
    if os.path.exists(root / path):
        raise BuildError(f"{where}, column path: {root / path} is a folder, pipe or device; give a recording")
    if not places.is_remote(root) and os.path.islink(root / path):
        raise BuildError(f"{where}, column path: {root / path} is a dangling link; restore the file, or remove the row")
    hint = " with forward slashes" if "\\" in path else ""
    raise BuildError(f"{where}, column path: {root / path} is missing; correct the path{hint}, or remove the row")


def _seconds(row: Row, column: str) -> float | None:
    text = row.values.get(column, "").strip()
    if not text:
        return None
    try:
        value = float(text) if "_" not in text else math.nan  # float() accepts 1_0
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or (column == "duration" and value == 0):
        raise BuildError(f"{row.where}, column {column}: {text!r} is not a time in seconds; correct it")
    return value


def _exact(seconds: float) -> str:
    """Formats seconds without loss, so that different crops have different ids; whole numbers without a point."""
    return repr(seconds).removesuffix(".0")


def _split(row: Row) -> str:
    text = row.values.get("split", "").strip()
    if text and text.lower() not in ALIASES:
        raise BuildError(f"{row.where}, column split: {text!r} is unknown; use one of {', '.join(SPLITS)}")
    return ALIASES[text.lower()] if text else ""
