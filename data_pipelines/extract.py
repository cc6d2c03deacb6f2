"""A data set's recordings → unit records, as an Apache Beam pipeline.

    python -m data_pipelines.extract --task=lt_sc --raw=RAW/lt_sc --out=RECORDS/lt_sc --encoder=mfcc --clusters=100
    python -m data_pipelines.extract --task=fsc --raw=RAW/fsc --out=RECORDS/fsc --encoder=HUBERT/ --kmeans=KM100/
    python -m data_pipelines.extract --manifest=my.csv --out=RECORDS/my --encoder=mfcc --kmeans=KM/

The units are those of a k-means that is there (`--kmeans`), or of one that is fitted on the train split first
(`--clusters`) and kept beside the records, as `OUT-kmeans`.

By default one worker process a core runs on this machine. Any other Beam runner is a flag away, its own options follow
`--`; every place given must then be one that its workers reach, such as gs://:

    python -m data_pipelines.extract ... --runner=FlinkRunner -- --flink_master=HOST:8081 --parallelism=16

What is done is kept part by part in a hidden folder beside OUT: the same command goes on where the last one ended,
however that was. Records and card do not depend on runner, number of workers or interruptions.

A file that cannot be used ends the run with its name, or, by `--on-error=skip`, is left out: which ones and why is then
listed in `OUT-refused.jsonl`, a line each, and counted in the card.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from data_pipelines import data_flags, fit_kmeans, parts
from data_pipelines.clips import Clip, Splits
from data_pipelines.parts import Job, Part
from data_pipelines.splits import checked
from spjax.data.records import Card, Utterance, write_unit_records
from spjax.speech2unit import prosody
from spjax.tasks import Task

LOCAL = "DirectRunner"
POLL_SECONDS = 0.5  # between two looks at what the workers have done
GRACE_SECONDS = 20.0  # from the end of a worker to that of the pipeline, if it ends


class ExtractError(ValueError):
    """Extraction cannot go on; the message names the file or flag and the way out."""


class Wanted(NamedTuple):
    """A data set to make records of.

    Attributes:
      task: what its labels mean.
      splits: its clips; records come in the order of their ids.
      raw: root of the clips' paths, local or gs://.
      out: directory of the records, local or gs://.
      sources: sha256 of files that say which clips there are, for the card; hashes of the clips are added.
      notes: for the card.
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
    kmeans: epath.PathLike,
    layer: int = 6,
    plain_chunks: bool = False,
    lowpass: float | None = None,
    merge: bool = True,
    f0: bool = False,
    on_error: Literal["stop", "skip"] = "stop",
    runner: str = LOCAL,
    workers: int | None = None,
    options: Sequence[str] = (),
    overwrite: bool = False,
) -> list[Card]:
    """Encodes the clips of several data sets in one pipeline and writes unit records of each.

    Args:
      wanted: the data sets.
      encoder: "mfcc", "log_mel", or the directory of a HuBERT.
      kmeans: directory of its centroids.
      layer: of a HuBERT.
      plain_chunks: cut long audio as the reference does.
      lowpass: Hz above which nothing is heard; None for all.
      merge: merge runs of equal units.
      f0: measure f0: log Hz less the mean of the speaker over all splits, or of the utterance where nobody is named.
      on_error: "stop" at a file that cannot be used, or "skip" it and list it in `OUT-refused.jsonl`.
      runner: of Beam; DirectRunner starts processes here, any other brings its own workers.
      workers: processes of the DirectRunner, by default one a core.
      options: of Beam, as flags: ["--flink_master=HOST:8081"].
      overwrite: replace what is in the way.

    Returns:
      The card of each.

    Raises:
      ExtractError: a directory is taken, a file cannot be used, or the pipeline failed. What was done is kept.
      BuildError: a split without clips, a clip twice, or labels that the task lacks.
      RecordError: no clip of a split can be used.
      ValueError: the encoder or its k-means cannot be used.
    """
    if not wanted:
        return []
    _check_workers(runner, workers)
    encoder, kmeans = encoder if _acoustic(encoder) else _absolute(encoder), _absolute(kmeans)
    loaded = parts.load_encoder(encoder, kmeans, layer, plain_chunks, lowpass)
    jobs: list[tuple[Wanted, Job, epath.Path]] = []
    for one in wanted:
        one = one._replace(
            splits=checked(one.splits, one.task), raw=_absolute(one.raw), out=epath.Path(_absolute(one.out))
        )
        _check_out(one.out, overwrite)
        job = Job(
            raw=one.raw,
            encoder=encoder,
            kmeans=kmeans,
            identity={"encoder": loaded.name, "weights": _weights(encoder), "kmeans": loaded.kmeans.id},
            clips=tuple((clip.path, clip.start, clip.duration) for clips in one.splits.values() for clip in clips),
            layer=layer,
            plain_chunks=plain_chunks,
            lowpass=lowpass,
            merge=merge,
            f0=f0,
        )
        jobs.append((one, job, one.out.parent / f".{one.out.name}.parts-{job.hash[:12]}"))
    made = _make_parts([(job, folder) for _, job, folder in jobs], on_error == "stop", runner, workers, options)
    refused = [_refused(some) for some in made]
    if on_error == "stop" and any(refused):
        why = next(why for some in refused for why in some.values())
        raise ExtractError(
            f"{why} Or leave such files out by --on-error=skip. What was done is kept: the same command goes on from "
            "there."
        )
    cards = []
    for (one, job, _), some, reasons in zip(jobs, made, refused, strict=True):
        hashes = {f"{split} clips": parts.clips_hash(clips) for split, clips in one.splits.items()}
        card = write_unit_records(
            one.out,
            one.task,
            _utterances(one, [some[number] for number in range(job.parts)], f0),
            overwrite=overwrite,
            vocabulary=len(loaded.kmeans.centroids),
            encoder=loaded.name,
            layer=loaded.layer or 0,
            kmeans=loaded.kmeans.id,
            merged=merge,
            sources={**one.sources, **hashes},
            notes=[*one.notes, *_write_report(one, reasons)],
        )
        cards.append(card)
        for place in one.out.parent.iterdir():  # also of runs with other settings, given up
            if place.name.startswith(f".{one.out.name}.parts-"):
                place.rmtree(missing_ok=True)
    return cards


def build_pipeline(
    todo: Sequence[tuple[str, int]],
    runner: str = LOCAL,
    workers: int = 1,
    options: Sequence[str] = (),
    *,
    pids: str = "",
) -> Any:
    """The pipeline that makes parts of jobs; its result is files. Nothing is run.

    Args:
      todo: job file and number of each part.
      runner: of Beam. DirectRunner is here: worker processes of one thread each, by Beam's FnApiRunner; what Beam calls
        by that name would first try to fetch a program from the network.
      workers: processes of the DirectRunner.
      options: of Beam, as flags.
      pids: a directory in which each process of the DirectRunner leaves a file with its number for a name.

    Returns:
      An `apache_beam.Pipeline`.

    Raises:
      ExtractError: no such runner or option.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        if runner == LOCAL:
            settings = PipelineOptions([f"--direct_num_workers={workers}", *options])
            pipeline = beam.Pipeline(runner=_local_runner(pids), options=settings)
        else:
            pipeline = beam.Pipeline(options=PipelineOptions([f"--runner={runner}", *options]))
    except (ValueError, ImportError) as error:
        raise ExtractError(f"--runner={runner} {' '.join(options)}: {error}") from error
    elements = pipeline | "parts" >> beam.Create(list(todo)) | "to all workers" >> beam.Reshuffle()
    _ = elements | "encode" >> beam.Map(parts.make_part)
    return pipeline


def _check_workers(runner: str, workers: int | None) -> None:
    if runner != LOCAL and workers is not None:
        raise ExtractError(f"workers are the {LOCAL}'s: tell {runner} by its own option, after --")
    if workers is not None and workers < 1:
        raise ExtractError(f"--workers={workers}: give 1 or more, or leave it out for one a core")


def _check_out(out: epath.PathLike, overwrite: bool) -> None:
    """Whether records can be written there, as far as that can be known before any work is done."""
    out = epath.Path(out)
    if out.exists() and not out.is_dir():
        raise ExtractError(f"{out} is a file: choose another --out, a directory that is made if it is absent")
    if not overwrite and out.exists() and any(out.iterdir()):
        raise ExtractError(f"{out} is not empty: choose another directory, or replace what it holds (--overwrite)")
    if "://" not in os.fspath(out):  # what a bucket permits shows when it is written to
        above = next(place for place in Path(_absolute(out)).parents if place.exists())
        if not above.is_dir():
            raise ExtractError(f"{out} cannot be made, {above} is a file: choose another --out")
        if not os.access(above, os.W_OK | os.X_OK):
            raise ExtractError(f"{out} cannot be made, {above} cannot be written to: choose another --out")


def _local_runner(pids: str) -> Any:
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    root = shlex.quote(str(Path(__file__).resolve().parents[1]))
    known = f": > {shlex.quote(pids)}/$$; " if pids else ""
    path = f"PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}"
    command = f"{known}{path} exec {shlex.quote(sys.executable)} -m data_pipelines.beam_worker {os.getpid()}"
    return FnApiRunner(default_environment=SubprocessSDKEnvironment.from_command_string(command))


# ---- making the parts


def _make_parts(
    jobs: Sequence[tuple[Job, epath.Path]], stop: bool, runner: str, workers: int | None, options: Sequence[str]
) -> list[dict[int, Part]]:
    """The parts of each job by number, those that were there and those that a pipeline made; not all if it was stopped.

    jobs: each with its folder.

    Raises:
      ExtractError: the pipeline failed.
    """
    mark = jobs[0][1] / f"stopped-{uuid.uuid4().hex}" if stop else None
    todo: list[tuple[str, int]] = []
    for job, folder in jobs:
        folder.mkdir(parents=True, exist_ok=True)
        file = parts.save_job(folder, dataclasses.replace(job, stop=os.fspath(mark or "")))
        there = [
            (number, parts.read_part(parts.part_path(folder, number))) for number in sorted(parts.parts_there(folder))
        ]
        for (number, part), same in zip(there, parts.unchanged(job, there), strict=True):
            if not same or any(part.refused):  # what was refused may have been repaired since
                parts.part_path(folder, number).unlink()
        todo += [(file, number) for number in sorted(set(range(job.parts)) - parts.parts_there(folder))]
    state = ""
    if todo:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with _progress(jobs), _quiet_beam(), tempfile.TemporaryDirectory() as pids:
            pipeline = build_pipeline(todo, runner, min(workers or cores, len(todo)), options, pids=pids)
            state = _run(pipeline, runner, Path(pids), lambda: _complete(jobs) or bool(mark and mark.exists()))
    found = [
        {number: parts.read_part(parts.part_path(folder, number)) for number in sorted(parts.parts_there(folder))}
        for _, folder in jobs
    ]
    missing = sum(job.parts for job, _ in jobs) - sum(map(len, found))
    if missing and not (mark and mark.exists()):
        raise ExtractError(
            f"the pipeline ended as {state} with {missing} of {sum(job.parts for job, _ in jobs)} parts missing; the "
            f"others are kept. Look into the log of {runner} and give the same command again."
        )
    return found


def _complete(jobs: Sequence[tuple[Job, epath.Path]]) -> bool:
    return all(len(parts.parts_there(folder)) == job.parts for job, folder in jobs)


def _run(pipeline: Any, runner: str, pids: Path, done: Callable[[], bool]) -> str:
    """Runs a pipeline to its end, and returns the state it ended in.

    Beam waits for ever for a worker that was killed, so that is looked for here; it matters only until all is `done`.

    Raises:
      ExtractError: a worker failed.
    """
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append(pipeline.run().wait_until_finish())
        except Exception as error:  # whatever a runner raises: it holds the worker's own words
            ended.append(error)

    thread = threading.Thread(target=run, name="pipeline", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            workers = [int(path.name) for path in pids.iterdir()]
            thread.join(POLL_SECONDS)
            dead = [pid for pid in workers if not _signal(pid, 0)]
            if dead:
                thread.join(GRACE_SECONDS)  # the pipeline may be ending, on a machine that has much else to do
                if thread.is_alive() and not done():
                    raise ExtractError(
                        "a worker was killed, maybe for want of memory: try again with fewer --workers. What was done "
                        "is kept: the same command goes on from there."
                    )
                break
    finally:
        for path in pids.iterdir() if thread.is_alive() else ():
            _signal(int(path.name), signal.SIGKILL)
    state = ended[0] if ended else "DONE"
    if isinstance(state, Exception):
        last = (str(state).strip() or repr(state)).splitlines()[-1]
        raise ExtractError(f"a worker of {runner} failed: {last}. What was done is kept.") from state
    return str(state)


def _signal(pid: int, number: int) -> bool:
    """Sends a signal to one of our processes; False if it is no more."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


@contextlib.contextmanager
def _progress(jobs: Sequence[tuple[Job, epath.Path]]) -> Iterator[None]:
    """A bar that counts the utterances of finished parts, whoever makes them, and the seconds of speech per second."""
    done = threading.Event()
    seen = {parts.part_path(folder, number) for _, folder in jobs for number in parts.parts_there(folder)}
    before = sum(len(parts.read_part(path).counts) for path in seen)
    seconds, start = 0.0, time.monotonic()

    def look() -> None:
        nonlocal seconds
        there = {parts.part_path(folder, number) for _, folder in jobs for number in parts.parts_there(folder)}
        for path in there - seen:
            part = parts.read_part(path)
            seen.add(path)
            seconds += float(part.seconds.sum())
            bar.update(len(part.counts))
        bar.set_postfix_str(f"{seconds / (time.monotonic() - start):.0f} s of speech/s")

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            look()

    total = sum(len(job.clips) for job, _ in jobs)
    with tqdm(total=total, initial=before, desc="encoding", unit=" utterances") as bar:
        watcher = threading.Thread(target=watch, name="progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            look()


@contextlib.contextmanager
def _quiet_beam() -> Iterator[None]:
    """Beam reports every step of its own, and at its first warning opens a log to the terminal."""
    root, beam, nowhere = logging.getLogger(), logging.getLogger("apache_beam"), logging.NullHandler()
    level = beam.level
    root.addHandler(nowhere)
    beam.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.removeHandler(nowhere)
        beam.setLevel(level)


# ---- from parts to records


def _refused(made: Mapping[int, Part]) -> dict[int, str]:
    """Why a clip was refused, by its number over all splits."""
    return {
        number * parts.CLIPS_PER_PART + row: str(why)
        for number, part in made.items()
        for row, why in enumerate(part.refused)
        if why
    }


def _write_report(one: Wanted, refused: Mapping[int, str]) -> list[str]:
    """Lists what was refused in a file, prints it, and returns notes for the card."""
    out = epath.Path(one.out)
    report = out.parent / f"{out.name}-refused.jsonl"
    report.unlink(missing_ok=True)
    if not refused:
        return []
    every = [(split, clip) for split, clips in one.splits.items() for clip in clips]
    rows = [{"split": every[i][0], "id": every[i][1].id, "path": every[i][1].path, "why": refused[i]} for i in refused]
    report.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for why in dict.fromkeys(refused.values()):  # a file may hold many clips
        tqdm.write(f"refused: {why}", file=sys.stderr)
    counts = Counter(row["split"] for row in rows)
    return [
        f"{split}: {counts[split]} of {len(clips)} clips were refused"
        for split, clips in one.splits.items()
        if counts[split]
    ]


def _utterances(one: Wanted, made: Sequence[Part], f0: bool) -> dict[str, list[Utterance]]:
    """The records of every split, without what was refused.

    made: all parts of the job, in order.
    """
    counts, units, durations, pitch, voiced, rates, _, _, _ = (
        np.concatenate(arrays) for arrays in zip(*made, strict=True)
    )
    ends = np.cumsum(counts)
    every = [(split, clip) for split, clips in one.splits.items() for clip in clips]
    segments = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    said: dict[str, list[slice]] = defaultdict(list)
    for (_, clip), where in zip(every, segments, strict=True):
        said[clip.speaker].append(where)
    mean_of = {
        speaker: prosody.voiced_mean(*(np.concatenate([stream[where] for where in its]) for stream in (pitch, voiced)))
        for speaker, its in said.items()
        if speaker
    }
    found: dict[str, list[Utterance]] = {split: [] for split in one.splits}
    for row, (split, clip) in enumerate(every):
        if not counts[row]:
            continue
        where = segments[row]
        crop = f" from {_seconds(clip.start)} s" if clip.start or clip.duration else ""
        crop += f" for {_seconds(clip.duration)} s" if clip.duration else ""
        found[split].append(
            Utterance(
                id=clip.id,
                units=units[where],
                classes=_classes(clip, one.task),
                durations=durations[where],
                f0=prosody.normalise(pitch[where], voiced[where], mean_of.get(clip.speaker)) if f0 else None,
                provenance=f"{clip.path}{crop}, {rates[row]} Hz",
            )
        )
    return found


def _classes(clip: Clip, task: Task) -> list[int]:
    """Class ids over all slots."""
    labels = zip(clip.labels, task.slots, task.slot_offsets[:-1], strict=True)
    return [first + slot.labels.index(label) for label, slot, first in labels]


def _seconds(number: float) -> str:
    """All digits that it takes to tell it from any other number."""
    return repr(float(number)).removesuffix(".0")


def _acoustic(encoder: str) -> bool:
    """Whether an encoder is one of those that need no weights; a folder of such a name changes nothing."""
    from spjax.speech2unit.encoder import ACOUSTIC

    return encoder in ACOUSTIC


def _weights(encoder: str) -> str:
    """Hash of a HuBERT's weights; "" of an encoder that has none."""
    if _acoustic(encoder):
        return ""
    card = epath.Path(encoder) / "config.json"
    return json.loads(card.read_text())["hash"] if card.exists() else ""


def _absolute(place: epath.PathLike) -> str:
    """Workers may run in another directory."""
    return os.fspath(place) if "://" in os.fspath(place) else os.path.abspath(os.fspath(place))


# ---- the command line


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    """SIGTERM ends what is within as an error would: workers are ended, what was done is kept; exit status 143."""

    def end(*_: object) -> None:
        print("error: ended by SIGTERM. What was done is kept: the same command goes on from there.", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # only that one may say what signals do
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line (`--help`)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    beam_options = argv[argv.index("--") + 1 :] if "--" in argv else []
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.extract",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s (--task=NAME --raw=DIR | --manifest=CSV | --folders=DIR) --out=DIR --encoder=ENCODER "
        "(--kmeans=DIR | --clusters=N) [flags] [-- flags of Beam]",
    )
    data_flags.add_data_flags(parser)
    parser.add_argument("--out", required=True, help="directory of the unit records to make (local or gs://)")
    data_flags.add_encoder_flags(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--kmeans", metavar="DIR", help="centroids of the encoder's features")
    which.add_argument("--clusters", type=int, help="fit so many on the train split, and keep them as OUT-kmeans")
    parser.add_argument("--no-merge", action="store_true", help="a unit a frame: leave runs of equal units as they are")
    parser.add_argument("--f0", action="store_true", help="measure f0")
    fit_kmeans.add_fit_flags(parser)
    parser.add_argument("--runner", default=LOCAL, help="of Beam (%(default)s: processes on this machine)")
    parser.add_argument("--workers", type=int, help="processes of the DirectRunner (default: one a core)")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    args = parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    try:
        with _orderly_end():
            card = _extract_by(args, beam_options)
    except (ValueError, OSError) as error:  # every error of ours is a ValueError
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    for split, count in card.counts.items():
        print(f"{split}: {count:,} utterances in {len(card.shards[split])} file(s)")
    for note in card.notes:
        print(f"note: {note}")
    print(f"unit records: {args.out}")


def _extract_by(args: argparse.Namespace, beam_options: Sequence[str]) -> Card:
    _check_workers(args.runner, args.workers)
    _check_out(args.out, args.overwrite)  # before a k-means is fitted
    data = data_flags.chosen(args)
    kmeans = args.kmeans or f"{args.out.rstrip('/')}-kmeans"
    if not args.kmeans:
        fit_kmeans.fit_to(kmeans, data, args, overwrite=args.overwrite, tell_refused=False)
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


if __name__ == "__main__":
    main()
