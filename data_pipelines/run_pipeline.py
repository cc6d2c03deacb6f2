"""Runs a pipeline that makes parts to its end, whatever becomes of its workers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipelines.pipeline import ExtractError

POLL_SECONDS = 0.5  # between two looks at what the workers have done
GRACE_SECONDS = 20.0  # from the end of a worker to that of the pipeline, if it ends
CANCEL_SECONDS = 10.0  # that a runner has to give up a job
LOOKS = 10  # at signs of life, while patience lasts: on gs:// each takes its time
KEPT = "What was done is kept: the same command goes on from there."


def run_pipeline(
    pipeline: Any,
    runner: str,
    pids: Path,
    done: Callable[[], bool],
    signs: Callable[[], object],
    patience: float,
) -> str:
    """Runs a pipeline to its end.

    Beam waits for ever for a worker that was killed, so workers are watched here: those of this machine as processes,
    others by their signs of life. It matters only until all is done.

    Args:
      pipeline: of Beam.
      runner: its name, for messages.
      pids: directory with a file for each process of the DirectRunner, its number for a name.
      done: whether there is nothing left to do.
      signs: something that differs from one time to the next as long as any worker lives.
      patience: seconds without a sign of life after which the job is given up.

    Returns:
      The state it ended in.

    Raises:
      ExtractError: a worker failed, or none lives; or the runner cannot be reached, or is no more.
    """
    _check_job_service(pipeline)
    jobs: list[Any] = []
    ended: list[Any] = []

    def run() -> None:
        try:
            jobs.append(pipeline.run())
            ended.append(jobs[0].wait_until_finish())
        except Exception as error:  # whatever a runner raises: it holds the worker's own words
            ended.append(error)

    thread = threading.Thread(target=run, name="pipeline", daemon=True)
    thread.start()
    seen, changed = signs(), time.monotonic()
    looked = changed
    try:
        while thread.is_alive():
            workers = [int(path.name) for path in pids.iterdir()]
            thread.join(POLL_SECONDS)
            dead = [pid for pid in workers if not _signal(pid, 0)]
            if dead:
                thread.join(GRACE_SECONDS)  # the pipeline may be ending, on a machine that has much else to do
                if not thread.is_alive():
                    break
                if done():
                    return "DONE"
                raise ExtractError(
                    "a worker was killed, maybe for want of memory: try again with fewer --workers of "
                    f"data_pipelines.extract. {KEPT}"
                )
            now = time.monotonic()
            if now - looked < patience / LOOKS:
                continue
            looked, before = now, seen
            seen = signs()
            if seen != before:
                changed = now
            elif now - changed > patience:
                if done():
                    return "DONE"
                raise ExtractError(
                    f"no worker of {runner} has given a sign of life for {now - changed:.0f} s: they were killed, or "
                    f"none has started (how long to wait is --patience of data_pipelines.extract). {KEPT}"
                )
    finally:
        if thread.is_alive():
            _cancel(jobs)
        for path in pids.iterdir() if thread.is_alive() else ():
            _signal(int(path.name), signal.SIGKILL)
    if isinstance(ended[0], Exception):
        raise ExtractError(f"{runner} failed: {_why(ended[0])}. {KEPT}") from ended[0]
    return str(ended[0])


def _check_job_service(pipeline: Any) -> None:
    """That something listens where the job is to be handed in, for which Beam would wait for minutes."""
    from apache_beam.options.pipeline_options import PortableOptions

    endpoint = pipeline.options.view_as(PortableOptions).job_endpoint or ""
    host, colon, port = endpoint.rpartition(":")
    if not colon:  # none, or the one in this process
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CANCEL_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ExtractError(
            f"--job_endpoint={endpoint} cannot be reached ({error}): start the job service there, or correct it. {KEPT}"
        ) from error


def _cancel(jobs: list[Any]) -> None:
    """Has the runner give up the job, if that can be asked of it: it may be what is no more."""

    def cancel() -> None:
        with contextlib.suppress(Exception):
            jobs[0].cancel()

    if jobs:
        thread = threading.Thread(target=cancel, name="cancel", daemon=True)
        thread.start()
        thread.join(CANCEL_SECONDS)


def _why(error: Exception) -> str:
    """The last line of what was raised, where a worker's own words stand; gRPC keeps them apart."""
    details = getattr(error, "details", lambda: "")()
    lines = [line.strip() for line in str(details or error).splitlines() if any(map(str.isalnum, line))]
    return lines[-1].rstrip(".") if lines else f"{type(error).__name__}; its workers cannot be reached, or were lost"


def _signal(pid: int, number: int) -> bool:
    """Sends a signal to one of our processes; False if it is no more."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
