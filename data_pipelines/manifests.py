"""The user's own data: a CSV, or a folder with a folder a class.

A CSV (UTF-8, commas, the first line names the columns) has a row an utterance:

    path,split,speaker,intent,room
    a/1.wav,train,anna,turn on,kitchen

- `path`: the audio file, relative to the root (the CSV's folder, unless told otherwise), or absolute below it;
- `split` (optional): train, valid or test; also training, validation, val, dev, eval, evaluation (these two: test);
- `speaker`, `source` (optional): who speaks, what it was cut from; neither will stand in two splits that are made here;
- `start`, `duration` (optional): a crop, in seconds; crops of one file have it as their source, unless told otherwise;
- every other column, or those named as labels: a slot of the task.

The names of the columns above may be in any case. Folders: `DIR/<class>/**/*.wav` or `DIR/<split>/<class>/**/*.wav`.

Splits that are not given are made, 80/10/10, seeded, stratified by label, and disjoint in speakers and sources where
these are known. Where only valid is not given it is taken from train. Classes are in the order of their sorted labels.
"""

from __future__ import annotations

import math
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from etils import epath
from tqdm import tqdm

from data_pipelines.clips import Clip, Splits
from data_pipelines.splits import (
    SPLITS,
    BuildError,
    Row,
    audio_files,
    by_speaker,
    checked,
    composed,
    read_table,
    read_text,
    stratified,
)
from spjax.tasks import Slot, Task

ALIASES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
RESERVED = ("path", "split", "speaker", "source", "start", "duration")
FRACTIONS = {"train": 0.8, "valid": 0.1, "test": 0.1}


def read_user_data(
    place: epath.PathLike,
    raw: epath.PathLike | None = None,
    *,
    labels: Sequence[str] | None = None,
    name: str | None = None,
    metric: str | None = None,
    seed: int = 0,
) -> tuple[Task, Splits, str]:
    """A CSV (`read_manifest`) or a folder (`read_folders`), whichever `place` is.

    Returns:
      The task, the splits, and the root that the clips' paths are relative to.

    Raises:
      BuildError: as of the two.
    """
    place = epath.Path(place)
    if place.is_dir():
        if raw is not None or labels is not None:
            raise BuildError(f"{place} is a folder: its folders are the labels, leave the root and label columns out")
        return *read_folders(place, name=name, metric=metric, seed=seed), str(place)
    root = epath.Path(raw) if raw is not None else place.parent
    return *read_manifest(place, root, labels=labels, name=name, metric=metric, seed=seed), str(root)


def read_manifest(
    path: epath.PathLike,
    raw: epath.PathLike | None = None,
    *,
    labels: Sequence[str] | None = None,
    name: str | None = None,
    metric: str | None = None,
    fractions: Mapping[str, float] = FRACTIONS,
    seed: int = 0,
) -> tuple[Task, Splits]:
    """A task and its clips from a CSV (form: this module's docstring).

    Args:
      path: the CSV; local or gs://.
      raw: what its paths are relative to; by default where it lies.
      labels: the label columns; by default all that mean nothing else.
      name: of the task; by default after the file.
      metric: one of `spjax.tasks.METRICS`; by default accuracy, or exact_match of several slots.
      fractions: of splits that are made.
      seed: of splits that are made.

    Raises:
      BuildError: names the file, the line, the column, the value and the way out.
    """
    path = epath.Path(path)
    root = epath.Path(raw) if raw is not None else path.parent
    rows = _rows(path)
    columns = _label_columns(path, list(rows[0].values), labels)
    clips: dict[str, list[Clip]] = defaultdict(list)
    line_of: dict[str, str] = {}
    for row in tqdm(rows, desc=path.name, unit=" rows"):
        clip = _clip(row, root, columns)
        if clip.id in line_of:
            raise BuildError(f"{row.where} repeats {line_of[clip.id]}, column path: {clip.path!r}; remove one of them")
        line_of[clip.id] = row.where
        clips[_split(row)].append(clip)
    if "" in clips and len(clips) > 1:
        raise BuildError(
            f"{line_of[clips[''][0].id]} has no split where others have one: fill it in everywhere, or nowhere"
        )
    advice = ""
    if labels is None and len(columns) > 1:
        advice = f"; if not all of {', '.join(columns)} are labels, name those that are (--labels)"
    return _finish(path, name or path.stem, _with_sources(clips), columns, metric, fractions, seed, advice)


def read_folders(
    folder: epath.PathLike,
    *,
    slot: str = "label",
    name: str | None = None,
    metric: str | None = None,
    fractions: Mapping[str, float] = FRACTIONS,
    seed: int = 0,
) -> tuple[Task, Splits]:
    """A task and its clips from a folder of folders (form: this module's docstring). Paths are relative to it.

    Args:
      folder: local or gs://.
      slot: what to call the one slot.
      name, metric, fractions, seed: as of `read_manifest`.

    Raises:
      BuildError: names the folder or file and the way out.
    """
    folder = epath.Path(folder)
    files = audio_files(folder)
    tops = {top for top, slash, _ in (file.partition("/") for file in files) if slash}
    others = sorted(top for top in tops if top.lower() not in ALIASES)
    with_splits = bool(tops) and not others
    if others and len(others) < len(tops):
        named = ", ".join(sorted(tops.difference(others)))
        raise BuildError(
            f"{folder}: {named} are named like splits, {', '.join(others)} not: if those are splits, move the others "
            "away or into them; if all are classes, rename those, or list the files in a CSV"
        )
    clips: dict[str, list[Clip]] = defaultdict(list)
    for file, path in files.items():
        *folders, _ = file.split("/")
        if len(folders) < (2 if with_splits else 1):
            form = "<split>/<class>/" if with_splits else "<class>/"
            raise BuildError(f"{folder / path} lies outside the folders of classes: move it to {folder}/{form}")
        split = ALIASES[folders[0].lower()] if with_splits else ""
        label = folders[1] if with_splits else folders[0]
        clips[split].append(Clip(file, path, (label.strip(),)))
    return _finish(folder, name or folder.name, dict(clips), [slot], metric, fractions, seed)


def _rows(path: epath.Path) -> list[Row]:
    if not path.is_file():
        raise BuildError(f"{path} is missing: correct the path of your CSV, or give a folder with a folder a class")
    first = read_text(path).partition("\n")[0]
    if "," not in first:
        for mark, called in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if mark in first:
                raise BuildError(f"{path}, line 1: {first.strip()!r} is parted by {called}: save it with commas")
    rows = read_table(path, ())
    header = list(rows[0].values)
    meant = {name: name.lower() if name.lower() in RESERVED else name for name in header}
    for known in RESERVED:
        alike = [name for name in header if meant[name] == known]
        if len(alike) > 1:
            raise BuildError(f"{path}, line 1: {' and '.join(alike)} are both the column {known}: rename one of them")
    if "path" not in meant.values():
        raise BuildError(f"{path} has the columns {header}, lacks path: name the one of the audio files so in line 1")
    return [Row(where, {meant[name]: value for name, value in values.items()}) for where, values in rows]


def _with_sources(clips: Mapping[str, list[Clip]]) -> dict[str, list[Clip]]:
    """Crops of one file belong together: where no source is given it is that of its other crops, or else the path."""
    every = [clip for part in clips.values() for clip in part]
    times = Counter(composed(clip.path) for clip in every)
    sources = {path: path for path, number in times.items() if number > 1}
    for clip in sorted(every, key=lambda clip: clip.source):  # not in order of rows, which must not matter
        if clip.source and composed(clip.path) in sources:
            sources[composed(clip.path)] = clip.source
    return {
        split: [clip._replace(source=clip.source or sources.get(composed(clip.path), "")) for clip in part]
        for split, part in clips.items()
    }


def _label_columns(path: epath.Path, header: list[str], labels: Sequence[str] | None) -> list[str]:
    if labels is not None:
        wrong = [column for column in labels if column not in header or column in RESERVED]
        if wrong or not labels:
            free = [column for column in header if column not in RESERVED]
            raise BuildError(f"{path}: {', '.join(wrong) or 'nothing'} cannot be the labels: choose from {free}")
        return list(labels)
    columns = [column for column in header if column not in RESERVED]
    if not columns:
        raise BuildError(f"{path} has no column of labels, only {', '.join(header)}: add one")
    if "" in columns:
        raise BuildError(f"{path}, line 1, column {header.index('') + 1} has no name: name it, or remove it")
    return columns


def _clip(row: Row, root: epath.Path, columns: Sequence[str]) -> Clip:
    where, values = row
    found = _find(where, root, values["path"].strip())
    labels = []
    for column in columns:
        label = composed(values[column].strip())
        if not label:
            raise BuildError(f"{where}, column {column}: the label is empty; fill it in, or remove the row")
        if len(label.splitlines()) > 1:
            raise BuildError(f"{where}, column {column}: {label!r} is more than one line; make it one")
        labels.append(label)
    start = _seconds(row, "start", 0.0)
    duration = _seconds(row, "duration", None)
    crop = f"@{_exact(start or 0.0)}" + (f"+{_exact(duration)}" if duration else "") if start or duration else ""
    return Clip(
        id=composed(found) + crop,
        path=found,
        labels=tuple(labels),
        speaker=composed(values.get("speaker", "").strip()),
        source=composed(values.get("source", "").strip()),
        start=start or 0.0,
        duration=duration,
    )


def _find(where: str, root: epath.Path, path: str) -> str:
    """The path relative to the root, as spelled on disk."""
    if not path:
        raise BuildError(f"{where}, column path is empty: fill it in, or remove the row")
    if posixpath.isabs(path) or "://" in path:
        try:
            path = epath.Path(path).relative_to(root).as_posix()
        except ValueError:
            raise BuildError(f"{where}, column path: {path} is not below {root}; give the root of all paths") from None
    path = posixpath.normpath(path)
    for spelled in dict.fromkeys([path, composed(path), unicodedata.normalize("NFD", path)]):
        if (root / spelled).is_file():
            return spelled
    hint = " with forward slashes" if "\\" in path else ""
    raise BuildError(f"{where}, column path: {root / path} is missing; correct the path{hint}, or remove the row")


def _seconds(row: Row, column: str, default: float | None) -> float | None:
    text = row.values.get(column, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or (column == "duration" and value == 0):
        raise BuildError(f"{row.where}, column {column}: {text!r} is no time in seconds; correct it")
    return value


def _exact(seconds: float) -> str:
    """All digits, so that crops that differ have ids that differ; none after the point where there need be none."""
    return repr(seconds).removesuffix(".0")


def _split(row: Row) -> str:
    text = row.values.get("split", "").strip()
    if text and text.lower() not in ALIASES:
        raise BuildError(f"{row.where}, column split: {text!r} is unknown; use one of {', '.join(SPLITS)}")
    return ALIASES[text.lower()] if text else ""


def _finish(
    place: epath.Path,
    name: str,
    clips: Mapping[str, list[Clip]],
    columns: Sequence[str],
    metric: str | None,
    fractions: Mapping[str, float],
    seed: int,
    advice: str = "",
) -> tuple[Task, Splits]:
    """The task and its splits, made where they are not given. `advice` ends errors about the labels of a slot."""
    every = [clip for part in clips.values() for clip in part]
    slots = []
    for number, column in enumerate(columns):
        counts = Counter(clip.labels[number] for clip in every)
        if len(counts) < 2:
            raise BuildError(f"{place}, {column}: every label is {next(iter(counts))!r}, nothing to tell apart{advice}")
        slots.append(Slot(column, tuple(sorted(counts))))
    task = Task(_task_name(name), tuple(slots), metric or ("accuracy" if len(slots) == 1 else "exact_match"))
    splits = _made(place, task, dict(clips), every, fractions, seed, advice)
    for number, slot in enumerate(slots):
        known = {clip.labels[number] for clip in splits["train"]}
        for split in ("valid", "test"):
            unseen = sorted({clip.labels[number] for clip in splits[split]} - known)
            if unseen:
                raise BuildError(
                    f"{place}, {slot.name}: {unseen[0]!r} stands in {split} and not in train ({len(unseen)} such), so "
                    "it cannot be learnt; move some of it to train, remove it, or take another seed if splits were made"
                    f"{advice}"
                )
    return task, checked(splits, task)


def _made(
    place: epath.Path,
    task: Task,
    clips: dict[str, list[Clip]],
    every: list[Clip],
    fractions: Mapping[str, float],
    seed: int,
    advice: str,
) -> Splits:
    if set(clips) == set(SPLITS):
        return clips
    for split in ("train", "test"):
        if "" not in clips and split not in clips:
            raise BuildError(
                f"{place} has {', '.join(sorted(clips))}, lacks {split}: give it clips, or leave all splits to be made"
            )
    if "" in clips:
        parts = dict(fractions)
        if set(parts) != set(SPLITS):
            raise BuildError(f"fractions must be of {', '.join(SPLITS)}, not {dict(fractions)}")
        source, clips = every, {}
    else:  # only valid is lacking
        parts = {split: fractions[split] / (fractions["train"] + fractions["valid"]) for split in ("train", "valid")}
        source = clips["train"]
    for number, slot in enumerate(task.slots):
        rare = [label for label, count in Counter(c.labels[number] for c in source).items() if count < len(parts)]
        if rare:
            raise BuildError(
                f"{place}, {slot.name}: {min(rare)!r} has fewer than {len(parts)} clips, too few to be in every split "
                f"that is to be made; add some, remove it, or say in a column split what goes where{advice}"
            )
    deal = by_speaker if any(clip.speaker or clip.source for clip in source) else stratified
    try:
        return {**clips, **deal(source, parts, seed)}
    except BuildError as error:
        raise BuildError(f"{place}: {error}; or say in a column split what goes where") from error


def _task_name(name: str) -> str:
    """What may be the name of records: letters, digits and _, a letter first."""
    plain = re.sub(r"\W+", "_", unicodedata.normalize("NFKD", name), flags=re.ASCII).strip("_")
    return plain if plain[:1].isalpha() else f"task_{plain}".rstrip("_")
