"""The flags by which a command names a data set: one that spjax knows, splits written down, or the user's own data."""

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

# Flags that mean nothing but with some of --task, --splits, --manifest and --folders.
_ONLY_WITH = {
    **dict.fromkeys(("labels", "text", "crops", "source"), ("manifest",)),
    **dict.fromkeys(("name", "metric", "split-seed"), ("manifest", "folders")),
    "protocol": ("task",),
}


class DataSet(NamedTuple):
    """What a command is about.

    Attributes:
      task: what its labels mean.
      splits: its clips.
      raw: root of the clips' paths, local or gs://.
      sources: sha256 of files that say which clips there are, for the card of records.
      notes: what to say of it there.
    """

    task: Task
    splits: Splits
    raw: str
    sources: dict[str, str]
    notes: tuple[str, ...]


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `chosen` reads."""
    group = parser.add_argument_group("data set, local or gs://")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--task", metavar="NAME", help="a data set that spjax knows, unpacked in --raw")
    which.add_argument(
        "--splits", metavar="DIR", type=place, help="splits written down earlier, of the data set in --raw"
    )
    flag_table.add(which, "manifest", metavar="CSV")
    flag_table.add(which, "folders", metavar="DIR")
    flag_table.add(group, "raw", metavar="DIR")
    flag_table.add(group, "protocol")
    flag_table.add(group, "labels", metavar="A,B")
    flag_table.add(group, "text", metavar="A,B")
    flag_table.add(group, "crops")
    flag_table.add(group, "source", metavar="A")
    group.add_argument(
        "--name", help="what to call your own task (by default as --out of extraction, else as its file or folder)"
    )
    flag_table.add(group, "metric", choices=tuple(METRICS))
    flag_table.add(group, "split-seed")


def add_encoder_flags(parser: argparse.ArgumentParser) -> None:
    """What makes features of speech, and what to do about files that hold none."""
    group = parser.add_argument_group("encoder")
    flag_table.add(group, "encoder", required=True)
    group.add_argument("--layer", type=int, default=6, help="of a HuBERT or Whisper (%(default)s)")
    group.add_argument("--plain-chunks", action="store_true", help="cut long audio as the reference does")
    group.add_argument("--lowpass", type=float, metavar="HZ", help="hear nothing above, in files of any band width")
    flag_table.add(parser, "on-error", choices=("stop", "skip"), default="stop")


def chosen(args: argparse.Namespace, unit_text: bool = False) -> DataSet:
    """Lists the data set that the flags name.

    Args:
      args: the flags.
      unit_text: whether a task that comes as units instead of recordings will do.

    Raises:
      BuildError: flags that do not go together, an unknown task, or data that are not what they must be.
    """
    if (args.task or args.splits) and not args.raw:
        raise BuildError(f"--{'task' if args.task else 'splits'} needs --raw: the root of the unpacked data set")
    for flag, ways in _ONLY_WITH.items():
        if _given(getattr(args, flag.replace("-", "_"))) and not any(getattr(args, way) for way in ways):
            raise BuildError(f"--{flag} goes with {' or '.join(f'--{way}' for way in ways)} only: leave it out")
    if args.task:
        protocol = args.protocol or "paper"
        from data_pipelines.builders import CLIPS
        from data_pipelines.import_frames import has_frames, unit_splits

        if args.task not in CLIPS and has_frames(args.raw, args.task):
            if not unit_text:
                raise BuildError(
                    f"task {args.task} comes as unit text, of which there is nothing to extract: import it by "
                    f"python -m data_pipelines.import_frames --task={args.task} --src={args.raw} --out=..."
                )
            found = unit_splits(args.task, args.raw, protocol)
            return DataSet(found.task, found.splits, args.raw, {}, (f"protocol: {protocol}", *found.notes))
        if args.task not in CLIPS:
            raise BuildError(
                f"unknown task {args.task!r}: choose {', '.join(CLIPS)}, or bring your own data by --manifest or "
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
    """The names in a flag, with commas between them; None where it is not given."""
    return None if flag is None else [name.strip() for name in flag.split(",") if name.strip()]


def _sha256(path: epath.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
