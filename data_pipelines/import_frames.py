"""Imports unit text with one unit a frame as unit records, merged, with durations.

    python -m data_pipelines.import_frames --task=esd_emotion --src=UNITS --out=runs/units/esd_emotion
    python -m data_pipelines.import_frames --task=mine --label=emotion --src=UNITS --out=runs/units/mine

The format is that of data_pipelines/frames.py, lines `id|speaker|frames`. A task that is known in this format
(esd_emotion, esd_speaker, vctk_gender, vctk_accent, vctk_speaker) has its labels and splits from
data_pipelines/builders. Any other name is a source: `mine` is all of `mine.frames.txt` and `mine.PART.frames.txt`. Its
labels are columns of `mine.labels.tsv` (`--label`) or, by default, the speaker, which pretraining ignores. If its files
have exactly the PARTs train, valid (val, dev) and test, those are the splits; otherwise it is split 80/10/10, with no
speaker in two splits unless the speaker is the label, and equal utterances always together.

`python -m spjax.main --units=UNITS` imports both formats of unit text in the same way, from UNITS or its subfolders.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from spjax import process

    process.run("data_pipelines.import_frames")

import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from data_pipelines.assemble import classes
from data_pipelines.builders import UNIT_TEXT
from data_pipelines.clips import Clip, Splits
from data_pipelines.frames import (
    PARTS,
    SUFFIX,
    Labels,
    Line,
    UnitSplits,
    digest,
    files_of,
    line_of,
    read_labels,
    read_paths,
    read_source,
)
from data_pipelines.import_units import add_import_flags, import_settings, import_units, print_card
from data_pipelines.splits import SPLITS, BuildError, by_speaker, check_protocol, checked, stratified
from data_pipelines.user_data import FRACTIONS
from spjax.command_line import Parser
from spjax.data.records import Card
from spjax.data.tfrecords import RecordError
from spjax.data.write_records import Utterance, write_unit_records
from spjax.encoders.units import merge
from spjax.io import places
from spjax.tasks import TASKS, Slot, Task

UNKNOWN = "unknown"  # label of an unknown speaker


def import_frames(
    task: str,
    src: epath.PathLike,
    out: epath.PathLike,
    *,
    labels: Sequence[str] = (),
    protocol: str = "paper",
    overwrite: bool = False,
    vocabulary: int = 100,
    **made_by: Any,
) -> Card:
    """Reads unit text with one unit a frame, checks every line, and writes unit records (see the module).

    Args:
      task: one of `builders.UNIT_TEXT`, or the name of a source.
      src: directory of the text.
      out: directory of the records.
      labels: columns of the source's tables, one a slot; empty for the speaker. Not for known tasks.
      protocol: of the splits of a task in `builders.UNIT_TEXT`.
      overwrite: replace existing records.
      vocabulary, made_by: see `import_units`.

    Returns:
      The card of the records.

    Raises:
      BuildError: a missing file or an invalid line; names file, line, value and a fix.
      RecordError: the records cannot be written.
    """
    if vocabulary < 1:
        raise BuildError(f"the vocabulary is {vocabulary}: give the number of units, at least 1")
    found = unit_splits(task, src, protocol, labels)
    lines = read_paths(src, [clip.path for part in found.splits.values() for clip in part])
    for path, line in lines.items():
        if (top := int(line.frames.max())) >= vocabulary:
            raise BuildError(
                f"{epath.Path(src) / path} ({line.id}) has the unit {top}, not one of 0..{vocabulary - 1}: correct it, "
                "or give the number of units by --vocabulary of data_pipelines.import_frames"
            )
    files = sorted({where[0] for path in lines if (where := line_of(path))} | set(found.tables))
    return write_unit_records(
        out,
        found.task,
        {
            split: [_utterance(clip, lines[clip.path], found.task) for clip in part]
            for split, part in found.splits.items()
        },
        overwrite=overwrite,
        vocabulary=vocabulary,
        **made_by,
        merged=True,
        sources={name: hashlib.sha256((epath.Path(src) / name).read_bytes()).hexdigest() for name in files},
        notes=(f"protocol: {protocol}", *found.notes) if task in UNIT_TEXT else found.notes,
    )


def unit_splits(task: str, src: epath.PathLike, protocol: str = "paper", labels: Sequence[str] = ()) -> UnitSplits:
    """Lists a task that is published as unit text; the arguments are those of `import_frames`.

    Raises:
      BuildError: a missing file, an invalid line, or labels for a known task.
    """
    if labels and task in TASKS:
        raise BuildError(f"task {task} is known and has its own labels: leave the labels out, or name another source")
    if task in UNIT_TEXT:
        return UNIT_TEXT[task].list(src, protocol)
    check_protocol(protocol)
    return _any_source(src, task, labels)


def has_frames(folder: epath.PathLike, task: str) -> bool:
    """Returns whether a folder holds unit text of a task with one unit a frame."""
    return any(files_of(folder, source) for source in (UNIT_TEXT[task].sources if task in UNIT_TEXT else (task,)))


def import_from(units: str, task: str, out: str) -> Card:
    """Imports a task from either format of unit text, in a folder or else in its direct subfolders.

    Args:
      units: folder of TASK/train.txt and so on (`import_units`) or SOURCE.PART.frames.txt (`import_frames`).
      task: name of the task.
      out: directory of the records.

    Raises:
      BuildError, RecordError: the task is found twice; or as of the two functions.
    """
    root = places.at(units)
    for folders in ([root], sorted(path for path in root.iterdir() if path.is_dir())):
        framed = [folder for folder in folders if has_frames(folder, task)]
        plain = [folder / task for folder in folders if task not in UNIT_TEXT and _has_text(folder / task)]
        if framed or plain:
            break
    if len(framed + plain) > 1:
        where = " and in ".join(map(str, framed + plain))
        raise BuildError(f"units of {task} are in {where}: give --units of spjax.main a folder that has them once")
    if framed or task in UNIT_TEXT:
        return import_frames(task, (framed or [root])[0], out)
    if not plain and task not in TASKS:
        raise BuildError(
            f"{root} and its subfolders hold no units of {task}: put {task}/train.txt and so on there, or "
            f"{task}{SUFFIX} or {task}.PART{SUFFIX}"
        )
    return import_units(task, (plain or [root / task])[0], out)


def _has_text(folder: Path) -> bool:
    return any((folder / f"{split}{ending}").is_file() for split in SPLITS for ending in (".txt", ".named"))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line (`--help`)."""
    parser = Parser(prog="python -m data_pipelines.import_frames", description=__doc__)
    parser.add_argument("--task", required=True, help=f"one of {', '.join(UNIT_TEXT)}, or the name of a source")
    add_import_flags(parser, "directory of the files *.frames.txt")
    parser.add_argument("--label", default="", help="columns of *.labels.tsv, comma-separated (default: the speaker)")
    parser.add_argument("--protocol", default="paper", help="splits of a known task: paper, honest (%(default)s)")
    args = parser.parse_args(argv)
    try:
        card = import_frames(
            args.task,
            args.src,
            args.out,
            labels=[label.strip() for label in args.label.split(",") if label.strip()],
            protocol=args.protocol,
            **import_settings(args),
        )
    except (BuildError, RecordError, OSError) as error:
        sys.exit(f"error: {error}")
    print_card(card, args.out)


def _any_source(src: epath.PathLike, source: str, labels: Sequence[str]) -> UnitSplits:
    """Lists a source of any name: labels from its columns or of a known task of that name; splits as in the module."""
    lines = read_source(src, source)
    known = TASKS.get(source)
    columns = tuple(slot.name for slot in known.slots) if known else tuple(labels) or ("speaker",)
    found = Labels((), [{} for _ in lines])
    if needed := [column for column in columns if column != "speaker"]:
        found = read_labels(src, source, lines, needed)
    first: dict[str, str] = {}  # digest → id of the first utterance with it
    clips = []
    for line, row in zip(lines, found.rows, strict=True):
        values = {**row, "speaker": line.speaker or UNKNOWN}
        copy_of = first.setdefault(digest(line), line.id)
        clips.append(Clip(line.id, line.path, tuple(values[column] for column in columns), line.speaker, copy_of))
    try:
        slots = [Slot(column, tuple(sorted({clip.labels[i] for clip in clips}))) for i, column in enumerate(columns)]
        task = known or Task(source, tuple(slots), "accuracy" if len(slots) == 1 else "exact_match")
    except ValueError as error:
        raise BuildError(f"{src}: {error}; correct the labels of {source}") from error
    splits, how = _make_splits(src, source, lines, clips, "speaker" in columns)
    notes = [how]
    if copies := len(clips) - len(first):
        apart = sum(
            n - 1 for n in Counter(name for part in splits.values() for name in {c.source for c in part}).values()
        )
        across = f", {apart:,} of them in another split" if apart else ""
        notes.append(f"{copies:,} of {len(clips):,} utterances repeat the frames of an earlier one{across}")
    return UnitSplits(task, checked(splits, task), found.tables, tuple(notes))


def _make_splits(
    src: epath.PathLike, source: str, lines: Sequence[Line], clips: Sequence[Clip], speaker: bool
) -> tuple[Splits, str]:
    """Makes the splits and a note about them; `speaker`: it is a label, so every speaker must be in train."""
    parts = {line.part for line in lines}
    if parts <= PARTS.keys() and {PARTS[part] for part in parts} == set(SPLITS):
        pairs = list(zip(lines, clips, strict=True))
        splits = {split: [clip for line, clip in pairs if PARTS[line.part] == split] for split in SPLITS}
        return splits, "splits: as the files are named"
    if len({clip.source for clip in clips}) < len(SPLITS):
        raise BuildError(f"{src}: {source} has too few utterances for {len(SPLITS)} splits: add some")
    if speaker:
        by_split = stratified([clip for clip in clips if clip.source == clip.id], FRACTIONS, seed=0)
        split_of = {clip.id: split for split, part in by_split.items() for clip in part}
        splits = {split: [clip for clip in clips if split_of[clip.source] == split] for split in SPLITS}
        return splits, "splits: made here, with utterances of every speaker in each"
    try:
        return by_speaker(clips, FRACTIONS, seed=0), "splits: made here, no speaker in two"
    except BuildError as error:
        raise BuildError(
            f"{src}: {error}; name the files {source}.train{SUFFIX}, {source}.valid{SUFFIX} and "
            f"{source}.test{SUFFIX} to set the splits"
        ) from error


def _utterance(clip: Clip, line: Line, task: Task) -> Utterance:
    units, durations = merge(line.frames)
    return Utterance(clip.id, units, classes(clip, task), durations, provenance=clip.path)


if __name__ == "__main__":
    main()
