"""Makes all parts of extraction jobs: keeps finished ones, and encodes the rest in processes here or by a Beam runner.

Beam's own local processes are not used: it waits forever for one that was killed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import io
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from etils import epath
from tqdm import tqdm

from data_pipelines import parts
from data_pipelines.parts import Job, Part
from spjax import process
from spjax.extras import needs

LOOK_SECONDS = 0.5  # between looks for new parts
KEPT = "Finished parts are kept: run the same command again to continue."


class ExtractError(ValueError):
    """Extraction failed; the message names the file or flag and suggests a fix."""


def make_parts(
    jobs: Sequence[tuple[Job, epath.Path]],
    *,
    stop: bool,
    runner: str | None,
    workers: int | None,
    options: Sequence[str],
) -> list[dict[int, Part]]:
    """Returns the parts of each job by number, existing and new ones; incomplete if the run was stopped.

    Args:
      jobs: each with its folder.
      stop: stop at the first refused recording.
      runner, workers, options: see `extract.extract_all`.

    Raises:
      ExtractError: a worker or the runner failed.
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

    if todo := missing():
        with _progress(jobs):
            if runner:
                state = _run_beam(build_pipeline(todo, runner, options), runner)
                if missing() and not (mark and mark.exists()):
                    raise ExtractError(f"{runner} ended as {state} with parts missing: see its log. {KEPT}")
            else:
                _run_here(todo, workers)
    return [
        {number: parts.read_part(parts.part_path(folder, number)) for number in sorted(parts.parts_there(folder))}
        for _, folder in jobs
    ]


def _run_here(todo: Sequence[tuple[str, int]], workers: int | None) -> None:
    """Makes parts in `workers` processes (None: one a core), or with 0 in this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        if workers == 0:
            for element in todo:
                _make_part(element)
            return
        with process.worker_pool(min(workers or cores, len(todo))) as pool:
            for made in concurrent.futures.as_completed([pool.submit(_make_part, element) for element in todo]):
                made.result()
    except BrokenProcessPool as error:
        raise ExtractError(
            "a worker process died, possibly killed for lack of memory: try again with fewer --workers of "
            f"data_pipelines.extract. {KEPT}"
        ) from error


def _make_part(element: tuple[str, int]) -> None:
    """Makes a part; raises only an error that can be pickled, unlike some of TensorFlow's (buckets)."""
    try:
        parts.make_part(element)
    except Exception as error:
        raise ExtractError(f"a worker failed: {error}. {KEPT}") from error


def build_pipeline(todo: Sequence[tuple[str, int]], runner: str, options: Sequence[str] = ()) -> Any:
    """Builds the Beam pipeline that makes parts of jobs, without running it; its output is files.

    Args:
      todo: job file and number of each part.
      runner: Beam runner.
      options: Beam flags.

    Returns:
      An `apache_beam.Pipeline`.

    Raises:
      ExtractError: an unknown runner or invalid option.
      MissingExtraError: Beam is not installed.
    """
    with needs("data", f"--runner={runner}"):
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

    logging.basicConfig()  # Beam's warnings, such as of unknown options, go to the real stderr
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            settings = PipelineOptions([f"--runner={runner}", *options])
            pipeline = beam.Pipeline(options=settings)
            settings.get_all_options()  # validates all values now
    except (ValueError, ImportError) as error:
        raise ExtractError(f"--runner={runner} {' '.join(options)}: {error}") from error
    except SystemExit as error:  # from argparse, whose last line is the reason
        why = stderr.getvalue().strip().splitlines()[-1].rpartition("error: ")[2]
        raise ExtractError(f"--runner={runner} {' '.join(options)}: {why}") from error
    elements = pipeline | "parts" >> beam.Create(list(todo)) | "to all workers" >> beam.Reshuffle()
    _ = elements | "encode" >> beam.Map(parts.make_part)
    return pipeline


def _run_beam(pipeline: Any, runner: str) -> str:
    """Runs a pipeline and returns its final state; cancels its job if this process is interrupted."""
    jobs: list[Any] = []
    ended: list[Any] = []

    def run() -> None:
        try:
            jobs.append(pipeline.run())
            ended.append(jobs[0].wait_until_finish())
        except Exception as error:  # runners raise any type
            ended.append(error)

    # In the main thread, Beam would turn Ctrl-C and SIGTERM into errors of its own.
    thread = threading.Thread(target=run, name="pipeline", daemon=True)
    try:
        thread.start()
        thread.join()
    except BaseException:
        for job in jobs:
            with contextlib.suppress(Exception):
                job.cancel()
        raise
    if isinstance(ended[0], Exception):  # the last line of the message is the worker's error
        lines = [line.strip() for line in str(ended[0]).splitlines() if any(map(str.isalnum, line))]
        why = (
            lines[-1].rstrip(".") if lines else f"{type(ended[0]).__name__}, no answer from its job service or workers"
        )
        raise ExtractError(f"{runner} failed: {why}. {KEPT}") from ended[0]
    return str(ended[0])


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
        while not done.wait(LOOK_SECONDS):
            look()

    total = sum(len(job.clips) for job, _ in jobs)
    with tqdm(total=total, initial=before, desc="encoding", unit=" utterances", leave=False) as bar:
        watcher = threading.Thread(target=watch, name="progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            look()
