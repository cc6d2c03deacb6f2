"""Makes all parts of extraction jobs: keeps finished ones and runs a pipeline for the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath
from tqdm import tqdm

from data_pipelines import parts
from data_pipelines.heartbeats import beats
from data_pipelines.parts import Job, Part
from data_pipelines.pipeline import LOCAL, ExtractError, build_pipeline, unknown_options
from data_pipelines.run_pipeline import KEPT, POLL_SECONDS, run_pipeline


def make_parts(
    jobs: Sequence[tuple[Job, epath.Path]],
    *,
    stop: bool,
    runner: str,
    workers: int | None,
    options: Sequence[str],
    patience: float,
) -> list[dict[int, Part]]:
    """Returns the parts of each job by number, existing and new ones; incomplete if the run was stopped.

    If a cluster fails a job after finishing some parts, it is resubmitted for the missing ones.

    Args:
      jobs: each with its folder.
      stop: stop at the first refused recording.
      runner, workers, options: see `build_pipeline`; workers None: one a core.
      patience: see `run_pipeline`.

    Raises:
      ExtractError: the pipeline failed.
    """
    mark = jobs[0][1] / f"stopped-{uuid.uuid4().hex}" if stop else None
    files = []
    for job, folder in jobs:
        folder.mkdir(parents=True, exist_ok=True)
        files.append(parts.save_job(folder, dataclasses.replace(job, stop=os.fspath(mark or ""))))
        _delete_stale(job, folder)

    def missing() -> list[tuple[str, int]]:
        return [
            (file, number)
            for file, (job, folder) in zip(files, jobs, strict=True)
            for number in sorted(set(range(job.parts)) - parts.parts_there(folder))
        ]

    def stopped() -> bool:
        return bool(mark and mark.exists())

    def progress() -> object:
        return [(parts.parts_there(folder), beats(folder)) for _, folder in jobs]

    todo = missing()
    if todo:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with _progress(jobs), _quiet_beam():
            for name in unknown_options(options):
                tqdm.write(f"note: Beam has no option --{name}: it is passed to {runner}", file=sys.stderr)
            while todo:
                with tempfile.TemporaryDirectory() as pids:
                    pipeline = build_pipeline(todo, runner, min(workers or cores, len(todo)), options, pids=pids)
                    try:
                        state = run_pipeline(
                            pipeline, runner, Path(pids), lambda: stopped() or not missing(), progress, patience
                        )
                        failure = ExtractError(f"{runner} ended as {state} with parts missing: see its log. {KEPT}")
                    except ExtractError as error:
                        failure = error
                before, todo = len(todo), missing()
                if stopped() or not todo:
                    break
                if runner == LOCAL or len(todo) == before:  # without progress, another attempt is useless
                    raise failure
                tqdm.write(f"{failure} Resubmitting the {len(todo)} missing parts.", file=sys.stderr)
    return [
        {number: parts.read_part(parts.part_path(folder, number)) for number in sorted(parts.parts_there(folder))}
        for _, folder in jobs
    ]


def _delete_stale(job: Job, folder: epath.Path) -> None:
    """Deletes parts whose recordings have changed or were refused (they may have been repaired since)."""
    there = [(number, parts.read_part(parts.part_path(folder, number))) for number in sorted(parts.parts_there(folder))]
    for (number, part), same in zip(there, parts.unchanged(job, there), strict=True):
        if not same or any(part.refused):
            parts.part_path(folder, number).unlink()


@contextlib.contextmanager
def _progress(jobs: Sequence[tuple[Job, epath.Path]]) -> Iterator[None]:
    """Shows a progress bar of the utterances in finished parts, of all workers, and of seconds of speech a second."""
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
    """Silences Beam, which logs every step and opens a handler to the terminal at its first warning.

    The thread in which it reads a job service's messages raises an exception when the service ends, as does the job.
    """

    def hook(args: threading.ExceptHookArgs) -> None:
        if not args.thread or args.thread.name != "wait_until_finish_read":
            before(args)

    before, threading.excepthook = threading.excepthook, hook
    root, beam, nowhere = logging.getLogger(), logging.getLogger("apache_beam"), logging.NullHandler()
    level = beam.level
    root.addHandler(nowhere)
    beam.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        threading.excepthook = before
        root.removeHandler(nowhere)
        beam.setLevel(level)
