"""Unit text with one unit a frame: lines `id|speaker|frames`, in which runs of equal units are not merged.

    p225_001|p225|71 71 71 12 12 63

Source NAME is the content of `NAME.frames.txt` and every `NAME.PART.frames.txt` of a folder, where PART is train, valid
or test (or val, dev) or any other word. The speaker may be empty if unknown. Optional tables `NAME.labels.tsv` or
`NAME.PART.labels.tsv` in the same folder are tab-separated, with a column `id` and columns of labels. `Clip.path` of
such an utterance is `FILE:LINE`, relative to the folder.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from data_pipelines.clips import Splits
from data_pipelines.splits import BuildError, composed, read_text
from data_pipelines.tables import read_table
from spjax.tasks import Task

SUFFIX = ".frames.txt"
PARTS = {"train": "train", "valid": "valid", "val": "valid", "dev": "valid", "test": "test"}  # part in a name → split
_LINE = re.compile(rf"(.*{re.escape(SUFFIX)}):(\d+)")
_FRAMES = re.compile(r"(?:0|[1-9]\d{0,8})(?: (?:0|[1-9]\d{0,8}))*", re.ASCII)


class Line(NamedTuple):
    """An utterance of unit text.

    Attributes:
      id: unique in its source.
      speaker: speaker id; "" if unknown.
      part: the file name between the source and the suffix; "" for none.
      path: `FILE:LINE`, relative to the folder.
      frames: int32 [F], one unit a frame.
    """

    id: str
    speaker: str
    part: str
    path: str
    frames: np.ndarray


class UnitSplits(NamedTuple):
    """A task that is published as unit text.

    Attributes:
      task: the task of the labels.
      splits: its utterances, by path.
      tables: files of the labels, relative to the folder.
      notes: sentences about the splits and about what was left out.
    """

    task: Task
    splits: Splits
    tables: tuple[str, ...]
    notes: tuple[str, ...]


def files_of(folder: epath.PathLike, source: str) -> dict[str, str]:
    """Returns the files of a source, sorted: name in the folder → part ("" for none); empty if there are none."""
    place = epath.Path(folder)
    names = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    found = {}
    for name in names:
        stem = name.removesuffix(SUFFIX)
        rest = stem.removeprefix(source)
        if stem != name and rest != stem and (not rest or (rest[0] == "." and "." not in rest[1:])):
            found[name] = rest[1:]
    return found


def read_source(folder: epath.PathLike, source: str) -> list[Line]:
    """Reads every utterance of a source, in file and line order; blank lines are skipped.

    Raises:
      BuildError: no file, a file without utterances, a line that is not `id|speaker|frames`, or a duplicate id.
    """
    files = files_of(folder, source)
    if not files:
        raise BuildError(f"{folder} has no {source}{SUFFIX} and no {source}.PART{SUFFIX}: give the folder that has it")
    found: list[Line] = []
    where: dict[str, str] = {}
    for name, part in files.items():
        before = len(found)
        for line in _read_file(epath.Path(folder), name, part):
            if line.id in where:
                raise BuildError(
                    f"{epath.Path(folder) / line.path}: {line.id!r} is in {where[line.id]} already: remove one of "
                    "the two lines, or give them different ids"
                )
            where[line.id] = line.path
            found.append(line)
        if len(found) == before:
            raise BuildError(f"{epath.Path(folder) / name} holds no utterance: fill it or remove it")
    return found


class Labels(NamedTuple):
    """Labels of a source: names of its tables, and the row of every utterance, in the order of the lines."""

    tables: tuple[str, ...]
    rows: list[Mapping[str, str]]


def read_labels(folder: epath.PathLike, source: str, lines: Iterable[Line], columns: Iterable[str]) -> Labels:
    """Reads the rows of utterances in their source's tables `*.labels.tsv`, which must have the columns.

    Raises:
      BuildError: no table; a missing column, value or utterance; a duplicate id; or a column `speaker` that differs
        from the line.
    """
    names = [name.removesuffix(SUFFIX) + ".labels.tsv" for name in files_of(folder, source)]
    names = [name for name in dict.fromkeys([f"{source}.labels.tsv", *names]) if (epath.Path(folder) / name).exists()]
    if not names:
        raise BuildError(
            f"{folder} has neither {source}.labels.tsv nor {source}.PART.labels.tsv with the labels: put them there"
        )
    rows = _rows([epath.Path(folder) / name for name in names], tuple(columns))
    found = []
    for line in lines:
        where = f"{epath.Path(folder) / line.path} ({line.id})"
        row = rows.get(line.id)
        if row is None:
            raise BuildError(f"{where} is in none of {', '.join(names)}: add a row, or remove the line")
        if row.get("speaker", line.speaker) != line.speaker:
            raise BuildError(
                f"{where} has the speaker {line.speaker!r}, its row in {', '.join(names)} "
                f"{row['speaker']!r}: correct one of them"
            )
        found.append(row)
    return Labels(tuple(names), found)


def _rows(tables: Iterable[epath.Path], columns: tuple[str, ...]) -> dict[str, Mapping[str, str]]:
    rows: dict[str, Mapping[str, str]] = {}
    for table in tables:
        for where, row in read_table(table, ("id", *columns), delimiter="\t"):
            values = {column: composed(text.strip()) for column, text in row.items()}
            blank = [column for column in ("id", *columns) if not values[column]]
            if blank:
                raise BuildError(f"{where} has no {blank[0]}: fill it or remove the row")
            if values["id"] in rows:
                raise BuildError(f"{where}: {values['id']!r} is in an earlier row already: remove one of the two")
            rows[values["id"]] = values
    return rows


def line_of(path: str) -> tuple[str, int] | None:
    """Splits the path of an utterance of unit text into (file, line); None for any other path."""
    found = _LINE.fullmatch(path)
    return (found[1], int(found[2])) if found else None


def read_paths(folder: epath.PathLike, paths: Iterable[str]) -> dict[str, Line]:
    """Reads the utterances at paths `FILE:LINE`.

    Raises:
      BuildError: a path does not exist, or a line of the files is not `id|speaker|frames`.
    """
    wanted = set(paths)
    files = sorted({found[0] for path in wanted if (found := line_of(path))})
    there = {line.path: line for name in files for line in _read_file(epath.Path(folder), name, "")}
    lacking = sorted(wanted - there.keys())
    if lacking:
        raise BuildError(f"{epath.Path(folder) / lacking[0]} does not exist: take the unit text from the same source")
    return {path: there[path] for path in sorted(wanted)}


def digest(line: Line) -> str:
    """Returns the sha256 of the units alone."""
    return hashlib.sha256(line.frames.astype("<i4").tobytes()).hexdigest()


def _read_file(folder: epath.Path, name: str, part: str) -> list[Line]:
    found = []
    for number, text in enumerate(io.StringIO(read_text(folder / name), newline=None), 1):
        text = text.strip()
        if not text:
            continue
        path = f"{name}:{number}"
        where = f"{folder / name}, line {number}"
        fields = text.split("|")
        key = composed(fields[0].strip())
        if len(fields) != 3 or not key:
            raise BuildError(f"{where}: {_short(text)} is not `id|speaker|frames`: correct the line")
        frames = " ".join(fields[2].split())
        if not _FRAMES.fullmatch(frames):
            odd = next((word for word in frames.split() if not _FRAMES.fullmatch(word)), None)
            what = "has no frames" if odd is None else f"has the frame {_short(odd)}, which is not a unit"
            raise BuildError(f"{where} ({key}) {what}: write numbers from 0 on, separated by spaces")
        units = np.asarray(frames.split(), np.int64).astype(np.int32)
        found.append(Line(key, composed(fields[1].strip()), part, path, units))
    return found


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
