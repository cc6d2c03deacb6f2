"""Encodes a data set's recordings to unit records, in parallel on this machine or on a cluster.

    python -m data_pipelines.extract --task=lt_sc --raw=RAW/lt_sc --out=RECORDS/lt_sc --encoder=mfcc --clusters=100
    python -m data_pipelines.extract --task=fsc --raw=RAW/fsc --out=RECORDS/fsc --encoder=HUBERT/ --kmeans=KM100/
    python -m data_pipelines.extract --folders=DIR --out=RECORDS/my --encoder=tiny

Units come from a k-means (`--kmeans`; `tiny` has its own), or from one fitted on the train split first (`--clusters`).
Finished parts are kept next to OUT: after an interruption the same command continues. `--on-error=skip` lists files
that cannot be used in `OUT-refused.jsonl`; repaired ones are in `OUT-repaired.jsonl` (docs/own_data.md). For other
runners than this machine's processes, with their flags after `--`, see docs/cluster_extraction.md.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from spjax import process

    process.run("data_pipelines.extract")

import argparse
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from etils import epath

from data_pipelines import assemble, data_flags, fit_kmeans, flag_table, parts
from data_pipelines.clips import Splits
from data_pipelines.import_units import print_card
from data_pipelines.make_parts import KEPT, ExtractError, make_parts
from data_pipelines.parts import Job
from data_pipelines.splits import checked
from spjax import paths
from spjax.command_line import Parser, output
from spjax.data.records import Card
from spjax.data.tfrecords import RecordError
from spjax.data.write_records import check_free, write_unit_records
from spjax.extras import require
from spjax.io import assets, places
from spjax.tasks import Task


class Wanted(NamedTuple):
    """A data set to extract.

    Attributes:
      task: the task of its labels.
      splits: its clips; records are in the order of their ids.
      raw: root of the clips' paths, local or gs://.
      out: directory of the records, local or gs://.
      sources: sha256 of files that list the clips, for the card; hashes of the clips are added.
      notes: notes for the card.
    """

    task: Task
    splits: Splits
    raw: epath.PathLike
    out: epath.PathLike
    sources: Mapping[str, str] = {}
    notes: Sequence[str] = ()


def extract(
    task: Task,
    splits: Splits,
    raw: epath.PathLike,
    out: epath.PathLike,
    *,
    sources: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    **settings: Any,
) -> Card:
    """Encodes the clips of a data set and writes them as unit records.

    Args:
      task, splits, raw, out, sources, notes: see `Wanted`.
      settings: see `extract_all`.

    Raises:
      As `extract_all`.
    """
    return extract_all([Wanted(task, splits, raw, out, sources or {}, notes)], **settings)[0]


def extract_all(
    wanted: Sequence[Wanted],
    *,
    encoder: str,
    kmeans: epath.PathLike | None,
    layer: int = 6,
    plain_chunks: bool = False,
    lowpass: float | None = None,
    merge: bool = True,
    f0: bool = False,
    on_error: Literal["stop", "skip"] = "stop",
    runner: str | None = None,
    workers: int | None = None,
    options: Sequence[str] = (),
    overwrite: bool = False,
) -> list[Card]:
    """Encodes the clips of several data sets together and writes unit records of each.

    By default this starts processes, which import the main script: it must have `if __name__ == "__main__":`.

    Args:
      wanted: the data sets.
      encoder: "mfcc", "log_mel", or an imported encoder's directory; "tiny": "mfcc" with the bundled k-means.
      kmeans: directory of centroids, or "tiny"; None for an encoder that has its own.
      layer: of an encoder with weights.
      plain_chunks: cut long audio as the reference does.
      lowpass: cut-off frequency in Hz; None for no filter.
      merge: merge runs of equal units.
      f0: add f0: log Hz minus the mean of the speaker over all splits, or of the utterance if the speaker is unknown.
      on_error: "stop" at a file that cannot be used, or "skip" it and list it in `OUT-refused.jsonl`.
      runner: Beam runner, which has its own workers; None for this machine.
      workers: processes on this machine; None for one a core, 0 to encode in this process.
      options: of the Beam runner, such as ["--flink_master=HOST:8081"].
      overwrite: replace existing records.

    Returns:
      The card of each data set.

    Raises:
      OSError: a directory cannot be written.
      ExtractError: an output directory exists, a file cannot be used, no file of a label in train can, or a worker
        or the runner failed. Finished parts are kept.
      BuildError: a split without clips, a duplicate clip, or labels that are not in the task.
      RecordError: no clip of a split can be used.
      ValueError: the encoder or its k-means cannot be used.
      MissingExtraError: TensorFlow Datasets is not installed.
    """
    if not wanted:
        return []
    require("data", "writing unit records", "tensorflow_datasets")
    _check_workers(runner, workers, options)
    encoder, kmeans = assets.find_encoder(encoder, kmeans)
    # absolute: workers may run in another directory
    encoder, kmeans = encoder if _acoustic(encoder) else places.absolute(encoder), places.absolute(kmeans)
    loaded = parts.load_encoder(encoder, kmeans, layer, plain_chunks, lowpass)
    identity = {"encoder": loaded.name, "weights": _weights(encoder), "kmeans": loaded.kmeans.id}
    jobs: list[tuple[Wanted, Job, epath.Path]] = []
    for one in wanted:
        one = one._replace(
            splits=checked(one.splits, one.task), raw=places.absolute(one.raw), out=epath.Path(places.absolute(one.out))
        )
        _check_out(one.out, overwrite)
        job = Job(
            raw=one.raw, encoder=encoder, kmeans=kmeans, identity=identity,
            clips=tuple((clip.path, clip.start, clip.duration) for clips in one.splits.values() for clip in clips),
            layer=layer, plain_chunks=plain_chunks, lowpass=lowpass, merge=merge, f0=f0,
        )  # fmt: skip
        jobs.append((one, job, one.out.parent / f".{one.out.name}.parts-{job.hash[:12]}"))
    made = make_parts(
        [(job, folder) for _, job, folder in jobs],
        stop=on_error == "stop", runner=runner, workers=workers, options=options,
    )  # fmt: skip
    refused = [assemble.refused(some) for some in made]
    if on_error == "stop" and any(refused):
        why = next(why for some in refused for why in some.values())
        raise ExtractError(f"{why} Or skip such files by --on-error=skip. {KEPT}")
    for (one, _, _), reasons in zip(jobs, refused, strict=True):
        _check_labels(one, reasons)
    return [_write(one, job, loaded, some, overwrite) for (one, job, _), some in zip(jobs, made, strict=True)]


def _write(one: Wanted, job: Job, loaded: Any, made: Mapping[int, parts.Part], overwrite: bool) -> Card:
    """Writes the records of a data set and the lists of refused and repaired clips; deletes its parts.

    `loaded`: the encoder (`parts.load_encoder`).
    """
    out = epath.Path(one.out)
    hashes = {f"{split} clips": parts.clips_hash(clips) for split, clips in one.splits.items()}
    card = write_unit_records(
        out, one.task, assemble.utterances(one.task, one.splits, [made[number] for number in range(job.parts)], job.f0),
        overwrite=overwrite, vocabulary=len(loaded.kmeans.centroids), encoder=loaded.name, layer=loaded.layer or 0,
        kmeans=loaded.kmeans.id, merged=job.merge, sources={**one.sources, **hashes},
        notes=[*one.notes, *assemble.write_report(out, one.splits, assemble.refused(made), assemble.repaired(made))],
    )  # fmt: skip
    for folder in out.parent.iterdir():  # also parts of abandoned runs with other settings
        if folder.name.startswith(f".{out.name}.parts-"):
            folder.rmtree(missing_ok=True)
    return card


def _check_labels(one: Wanted, refused: Mapping[int, str]) -> None:
    """Raises ExtractError if all train clips of a label were refused."""
    every = [(split, clip) for split, clips in one.splits.items() for clip in clips]
    train = {number: clip for number, (split, clip) in enumerate(every) if split == "train"}
    for column, slot in enumerate(one.task.slots):
        left = {clip.labels[column] for number, clip in train.items() if number not in refused}
        for number, clip in train.items():
            if clip.labels[column] not in left:
                raise ExtractError(
                    f"every clip of {clip.labels[column]!r} ({slot.name}) in train was refused, such as: "
                    f"{refused[number]} {KEPT}"
                )


def _check_workers(runner: str | None, workers: int | None, options: Sequence[str]) -> None:
    if runner and workers is not None:
        raise ExtractError(f"--workers is for this machine: set the workers of {runner} by its own option, after --")
    if options and not runner:
        raise ExtractError(f"{' '.join(options)}: options after -- are those of a Beam runner: name it by --runner")
    if workers is not None and workers < 0:
        raise ExtractError(f"--workers={workers}: give 0 or more, or leave it out for one a core")


def _check_out(out: epath.PathLike, overwrite: bool) -> None:
    """Checks, before any work, that records can be written to `out`."""
    out = epath.Path(out)
    if out.exists() and not out.is_dir():
        raise ExtractError(f"{out} is a file: choose another output directory; it is created if absent")
    try:
        check_free(out, overwrite)
    except RecordError as error:
        raise ExtractError(str(error)) from error
    paths.to_write(out)


def _acoustic(encoder: str) -> bool:
    """Returns whether an encoder needs no weights; a folder of the same name is ignored."""
    from spjax.encoders.encoder import ACOUSTIC

    return encoder in ACOUSTIC


def _weights(encoder: str) -> str:
    """Returns the hash of an encoder's weights; "" for an encoder without weights."""
    if _acoustic(encoder):
        return ""
    card = epath.Path(encoder) / "config.json"
    return json.loads(card.read_text())["hash"] if card.exists() else ""


# ---- the command line


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    """Turns SIGTERM into SystemExit with status 143, so that workers are stopped and finished parts kept."""

    def end(*_: object) -> None:
        print(f"error: ended by SIGTERM. {KEPT}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parser() -> Parser:
    """Makes the parser of all flags except Beam's, which follow `--`."""
    made = Parser(
        prog="python -m data_pipelines.extract",
        description=__doc__,
    )
    made.add_argument("--out", metavar="DIR", type=output, required=True, help="unit records to make (local or gs://)")
    made.add_argument("--overwrite", action="store_true", help="replace existing records in --out")
    data_flags.add_data_flags(made)
    units = data_flags.add_encoder_flags(made)
    which = units.add_mutually_exclusive_group()
    flag_table.add(which, "kmeans", metavar="DIR")
    which.add_argument("--clusters", metavar="N", type=int, help="fit N on train, and save them as OUT-kmeans")
    units.add_argument("--no-merge", action="store_true", help="keep runs of equal units, one unit a frame")
    units.add_argument("--f0", action="store_true", help="measure f0")
    fit_kmeans.add_fit_flags(made)
    workers = made.add_argument_group("workers")
    workers.add_argument("--workers", metavar="N", type=int, help="processes (one a core; 0: in this process)")
    workers.add_argument("--runner", metavar="NAME", help="Beam runner, such as FlinkRunner (default: processes here)")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """The command line (`--help`)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    beam_options = argv[argv.index("--") + 1 :] if "--" in argv else []
    args = parser().parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    try:
        with _orderly_end(), places.translate_bucket_errors(), paths.writing(args.out):
            card = _extract_by(args, beam_options)
    except (ValueError, OSError) as error:  # every error of spjax is a ValueError
        sys.exit(f"error: {error}")
    print_card(card, args.out)


def _extract_by(args: argparse.Namespace, beam_options: Sequence[str]) -> Card:
    _check_workers(args.runner, args.workers, beam_options)
    _, kmeans = assets.find_encoder(args.encoder, args.kmeans)
    if (kmeans is None) == (args.clusters is None):
        raise ExtractError(
            f"--encoder={args.encoder} has its own k-means: leave --clusters out, or give another encoder"
            if kmeans
            else f"--encoder={args.encoder} needs a k-means: give --kmeans=DIR, or --clusters=N to fit one"
        )
    _check_out(args.out, args.overwrite)  # before a k-means is fitted
    if args.manifest or args.folders:  # jobs look for a task's records in a folder of the task's name
        args.name = args.name or args.out.rstrip("/").rpartition("/")[2]
    return extract_data(data_flags.chosen(args), args, beam_options)


def extract_data(data: data_flags.DataSet, args: argparse.Namespace, beam_options: Sequence[str] = ()) -> Card:
    """Extracts a data set as the flags say; with `clusters` a k-means is fitted first and saved as OUT-kmeans.

    Args:
      data: the result of `data_flags.chosen`.
      args: the flags of `parser`.
      beam_options: see `extract_all`.

    Raises:
      As `extract_all` and `fit_kmeans.fit_to`.
    """
    kmeans = args.kmeans
    if args.clusters is not None:
        kmeans = kmeans_of(args.out)
        fit_kmeans.fit_to(kmeans, data, args, overwrite=args.overwrite, report_refused=False)
    return extract(
        data.task,
        data.splits,
        data.raw,
        args.out,
        sources=data.sources,
        notes=data.notes,
        encoder=args.encoder,
        kmeans=kmeans,
        layer=args.layer,
        plain_chunks=args.plain_chunks,
        lowpass=args.lowpass,
        merge=not args.no_merge,
        f0=args.f0,
        on_error=args.on_error,
        runner=args.runner,
        workers=args.workers,
        options=beam_options,
        overwrite=args.overwrite,
    )


def kmeans_of(out: str) -> str:
    """Returns the directory of a k-means that is fitted for the records in `out`."""
    return f"{out.rstrip('/')}-kmeans"
