"""Runs a pipeline that makes parts, and detects dead workers."""

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

POLL_SECONDS = 0.5  # between checks of the workers
GRACE_SECONDS = 20.0  # time for the pipeline to end after a worker has
CANCEL_SECONDS = 10.0  # time for a runner to cancel a job
LOOKS = 10  # heartbeat checks within `patience`: on gs:// each is slow
KEPT = "Finished parts are kept: run the same command again to continue."


def run_pipeline(
    pipeline: Any,
    runner: str,
    pids: Path,
    done: Callable[[], bool],
    heartbeats: Callable[[], object],
    patience: float,
) -> str:
    """Runs a pipeline and waits for it.

    Beam waits forever for a killed worker, so workers are monitored here: local ones as processes, others by their
    heartbeats. A dead worker is ignored if all parts are done.

    Args:
      pipeline: Beam pipeline.
      runner: its name, for messages.
      pids: directory with a file named by the process id of each process of the DirectRunner.
      done: returns whether nothing is left to do.
      heartbeats: returns a value that changes as long as any worker is alive.
      patience: seconds without a heartbeat after which the job is aborted.

    Returns:
      The final state of the pipeline.

    Raises:
      ExtractError: a worker failed, or all are dead; or the runner cannot be reached, or has ended.
    """
    _check_job_service(pipeline)
    jobs: list[Any] = []
    ended: list[Any] = []

    def run() -> None:
        try:
            jobs.append(pipeline.run())
            ended.append(jobs[0].wait_until_finish())
        except Exception as error:  # runners raise any type; the message has the worker's error
            ended.append(error)

    thread = threading.Thread(target=run, name="pipeline", daemon=True)
    thread.start()
    seen, changed = heartbeats(), time.monotonic()
    looked = changed
    try:
        while thread.is_alive():
            workers = [int(path.name) for path in pids.iterdir()]
            thread.join(POLL_SECONDS)
            dead = [pid for pid in workers if not _signal(pid, 0)]
            if dead:
                thread.join(GRACE_SECONDS)  # the pipeline may be ending, slowly on a busy machine
                if not thread.is_alive():
                    break
                if done():
                    return "DONE"
                raise ExtractError(
                    "a worker was killed, possibly for lack of memory: try again with fewer --workers of "
                    f"data_pipelines.extract. {KEPT}"
                )
            now = time.monotonic()
            if now - looked < patience / LOOKS:
                continue
            looked, before = now, seen
            seen = heartbeats()
            if seen != before:
                changed = now
            elif now - changed > patience:
                if done():
                    return "DONE"
                raise ExtractError(
                    f"no worker of {runner} has sent a heartbeat for {now - changed:.0f} s: they were killed, or none "
                    f"has started (--patience of data_pipelines.extract sets how long to wait). {KEPT}"
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
    """Checks that a job service listens at the endpoint, for which Beam would wait minutes."""
    from apache_beam.options.pipeline_options import PortableOptions

    endpoint = pipeline.options.view_as(PortableOptions).job_endpoint or ""
    host, colon, port = endpoint.rpartition(":")
    if not colon:  # no endpoint, or the one in this process
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CANCEL_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ExtractError(
            f"--job_endpoint={endpoint} cannot be reached ({error}): start the job service there, or correct it. {KEPT}"
        ) from error


def _cancel(jobs: list[Any]) -> None:
    """Asks the runner to cancel the job; it may not respond."""

    def cancel() -> None:
        with contextlib.suppress(Exception):
            jobs[0].cancel()

    if jobs:
        thread = threading.Thread(target=cancel, name="cancel", daemon=True)
        thread.start()
        thread.join(CANCEL_SECONDS)


def _why(error: Exception) -> str:
    """Returns the last line of an error, which has the worker's message; gRPC keeps it in `details`."""
    details = getattr(error, "details", lambda: "")()
    lines = [line.strip() for line in str(details or error).splitlines() if any(map(str.isalnum, line))]
    return lines[-1].rstrip(".") if lines else f"{type(error).__name__}; its workers cannot be reached, or died"


def _signal(pid: int, number: int) -> bool:
    """Sends a signal to one of our processes; returns False if it has ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
