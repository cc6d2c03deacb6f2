"""Flags that select a data set: a known one, splits written earlier, or the user's data."""

from __future__ import annotations

import argparse
import hashlib
import sys
from typing import Any, NamedTuple

from etils import epath

from data_pipelines import flag_table
from data_pipelines.clips import Splits
from data_pipelines.manifests import read_user_data
from data_pipelines.split_manifests import read_splits
from data_pipelines.splits import BuildError
from spjax.command_line import place
from spjax.tasks import METRICS, TASKS, Task

# Flags that are valid only with some of --task, --splits, --manifest and --folders.
_ONLY_WITH = {
    **dict.fromkeys(("labels", "text", "crops", "source"), ("manifest",)),
    **dict.fromkeys(("name", "metric", "split-seed"), ("manifest", "folders")),
    "protocol": ("task",),
}


class DataSet(NamedTuple):
    """A data set selected by flags.

    Attributes:
      task: the task of its labels.
      splits: its clips.
      raw: root of the clips' paths, local or gs://.
      sources: sha256 of files that list the clips, for the card of the records.
      notes: notes for the card.
    """

    task: Task
    splits: Splits
    raw: str
    sources: dict[str, str]
    notes: tuple[str, ...]


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `chosen` reads."""
    group = parser.add_argument_group("data set, local or gs://")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--task", metavar="NAME", help="a data set that spjax knows, unpacked in --raw")
    which.add_argument("--splits", metavar="DIR", type=place, help="splits of the data set in --raw, by spjax leaks")
    for where, name, metavar in (
        (which, "manifest", "CSV"), (which, "folders", "DIR"), (group, "raw", "DIR"), (group, "protocol", "NAME"),
    ):  # fmt: skip
        flag_table.add(where, name, metavar=metavar)
    own = parser.add_argument_group("your own data (docs/own_data.md)")
    for name, metavar in (("labels", "A,B"), ("text", "A,B"), ("source", "A"), ("split-seed", "N")):
        flag_table.add(own, name, metavar=metavar)
    flag_table.add(own, "crops")
    flag_table.add(own, "metric", metavar="NAME", choices=tuple(METRICS))
    own.add_argument("--name", metavar="NAME", help="of your task (default: that of --out, or of the data)")


def add_encoder_flags(parser: argparse.ArgumentParser) -> Any:
    """Adds the flags of the encoder and of the handling of unusable files, and returns the encoder's group."""
    flag_table.add(parser, "on-error", metavar="DO", choices=("stop", "skip"), default="stop")
    group = parser.add_argument_group("encoder")
    flag_table.add(group, "encoder", metavar="NAME", required=True)
    group.add_argument("--layer", metavar="N", type=int, default=6, help="of an encoder with weights (%(default)s)")
    group.add_argument("--plain-chunks", action="store_true", help="cut long audio as the reference does")
    group.add_argument("--lowpass", metavar="HZ", type=float, help="remove frequencies above, whatever the sample rate")
    return group


def chosen(args: argparse.Namespace, unit_text: bool = False) -> DataSet:
    """Lists the data set that the flags select.

    Args:
      args: parsed flags.
      unit_text: accept a task that is published as units instead of recordings.

    Raises:
      BuildError: conflicting flags, an unknown task, or invalid data.
    """
    if (args.task or args.splits) and not args.raw:
        raise BuildError(f"--{'task' if args.task else 'splits'} needs --raw: the root of the unpacked data set")
    for flag, ways in _ONLY_WITH.items():
        if _given(getattr(args, flag.replace("-", "_"))) and not any(getattr(args, way) for way in ways):
            raise BuildError(f"--{flag} is valid only with {' or '.join(f'--{way}' for way in ways)}: leave it out")
    if args.task:
        protocol = args.protocol or "paper"
        from data_pipelines.builders import CLIPS
        from data_pipelines.import_frames import has_frames, unit_splits

        if args.task not in CLIPS and has_frames(args.raw, args.task):
            if not unit_text:
                raise BuildError(
                    f"task {args.task} is published as unit text, so there is nothing to extract: import it by "
                    f"python -m data_pipelines.import_frames --task={args.task} --src={args.raw} --out=..."
                )
            found = unit_splits(args.task, args.raw, protocol)
            return DataSet(found.task, found.splits, args.raw, {}, (f"protocol: {protocol}", *found.notes))
        if args.task not in CLIPS:
            raise BuildError(
                f"unknown task {args.task!r}: choose {', '.join(CLIPS)}, or give your own data by --manifest or "
                "--folders"
            )
        splits = CLIPS[args.task](epath.Path(args.raw), protocol)
        return DataSet(TASKS[args.task], splits, args.raw, {}, (f"protocol: {protocol}",))
    if args.splits:
        manifest = read_splits(args.splits)
        names = [f"{split}.jsonl" for split in manifest.splits]
        sources = {name: _sha256(epath.Path(args.splits) / name) for name in names}
        notes = (f"protocol: {manifest.protocol}", *manifest.notes)
        return DataSet(manifest.task, manifest.splits, args.raw, sources, notes)
    place = epath.Path(args.manifest or args.folders)
    if args.folders and not place.exists():
        raise BuildError(f"{place} does not exist: correct the path")
    if place.is_dir() == bool(args.manifest):
        raise BuildError(
            f"{place} is {'a' if args.manifest else 'no'} folder: --manifest takes a CSV, --folders a folder"
        )
    columns: dict[str, Any] = {}
    if args.manifest:
        columns = {"labels": _names(args.labels), "text": _names(args.text) or ()}
        columns |= {"crops": args.crops, "source": args.source}
    data = read_user_data(
        place,
        args.raw,
        name=args.name,
        metric=args.metric,
        seed=args.split_seed or 0,
        **columns,
    )
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)
    return DataSet(data.task, data.splits, data.raw, {place.name: _sha256(place)} if args.manifest else {}, data.notes)


def _given(value: Any) -> bool:
    return value is not None and value is not False and value != ""


def _names(flag: str | None) -> list[str] | None:
    """Splits a comma-separated flag; None if the flag is not given."""
    return None if flag is None else [name.strip() for name in flag.split(",") if name.strip()]


def _sha256(path: epath.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
