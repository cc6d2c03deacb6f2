"""Start and end of multi-process training: join the coordinator, and end all processes when one fails."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax

JOIN_TIMEOUT = 300.0  # seconds to wait for all processes at the start
HEARTBEAT_TIMEOUT = 60  # seconds without a heartbeat after which JAX considers a process dead
_EXIT_DELAY = 3.0  # seconds that process 0 waits after an error, since its exit ends the other processes
# Parts of error messages of collectives, barriers and the coordination service after another process died. All but the
# first two count in JAX errors only: connections to a bucket may be reset too.
_PEER_ERRORS = ("Gloo", "oordination service", "Connection closed by peer", "Connection reset", "heartbeat", "Barrier")


def check(
    coordinator: str | None, processes: int, process_id: int | None
) -> tuple[str | None, int | None, int | None] | None:
    """Convert the flags of these names to arguments of `joined`; None for a single process.

    Raises:
      ValueError: the flags contradict each other.
    """
    coordinator = coordinator or None
    auto = coordinator == "auto"
    if processes > 1 and not coordinator:
        raise ValueError(f"--processes={processes} requires --coordinator=HOST:PORT, the address of process 0")
    if processes == 1 and coordinator and not auto:
        raise ValueError(f"--coordinator={coordinator} requires --processes (their number) and --process-id")
    if processes > 1 and process_id is None and not auto:
        raise ValueError(
            f"--processes={processes} requires --process-id, from 0 to {processes - 1}, different for each"
        )
    if (process_id or 0) >= processes:
        raise ValueError(f"--process-id={process_id} must be less than --processes={processes}")
    if coordinator and not auto and not re.fullmatch(r".+:[1-9]\d{0,4}", coordinator):
        raise ValueError(f"--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.2:8476, or auto")
    if not coordinator:
        return None
    return (None, None, None) if auto else (coordinator, processes, process_id)


@contextlib.contextmanager
def joined(
    coordinator: str | None, processes: int | None, process_id: int | None, *, timeout: float = JOIN_TIMEOUT
) -> Iterator[None]:
    """Context that runs its block as one of several processes; an error in it ends all processes.

    After an error a process exits without waiting for the others. Those in a collective fail on the closed connection;
    the others are aborted by JAX after `HEARTBEAT_TIMEOUT` seconds, or immediately if process 0 exits. After success
    all wait for process 0, which writes the reports.

    Args:
      coordinator: HOST:PORT of process 0. None, also for the next two: detected on Cloud TPU, Slurm or MPI.
      processes: number of processes.
      process_id: index of this process.
      timeout: seconds to wait for the other processes at the start.

    Raises:
      SystemExit: raised by the block with an exit status, in all processes, as after SIGTERM. Any other exception ends
        the process.
    """

    def give_up() -> None:
        who = "this process" if process_id is None else f"process {process_id} of {processes}"
        where = "the coordinator of the cluster" if coordinator is None else f"--coordinator={coordinator}"
        _end(
            f"error: {who} waited {timeout:g} s for all processes at {where}: start all of them, each with a different "
            "--process-id from 0 on, with an address of process 0 that the others can reach"
        )

    # JAX's timeout aborts the process with only "Deadline Exceeded" as the message.
    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler does not run while JAX waits
    try:
        if coordinator is not None and process_id == 0:
            _check_port(int(coordinator.rpartition(":")[2]))
        jax.distributed.initialize(
            coordinator, processes, process_id, initialization_timeout=int(timeout) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT, shutdown_timeout_seconds=24 * 3600,
        )  # fmt: skip
    except Exception as error:  # the type depends on the cluster environment
        what, fix = (
            "--coordinator=auto finds no cluster that it can use",
            "omit it for a single process, or give --coordinator=HOST:PORT, --processes and --process-id",
        )
        if coordinator is not None:
            what, fix = (
                f"process {process_id} of {processes} cannot start at --coordinator={coordinator}",
                "give all processes another port if that one is in use, and an address of the host of process 0",
            )
        _end(f"error: {what} ({' '.join(str(error).split()):.300}): {fix}")
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    if processes not in (None, jax.process_count()):
        _end(f"error: --processes={processes}, but process 0 was started with {jax.process_count()}: give all the same")
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):  # a second Ctrl-C
            _end("", status=130)
        if isinstance(error, SystemExit) and isinstance(error.code, int | None):
            raise
        if cause := _peer_error(error):
            message = (
                f"error: process {jax.process_index()} of {jax.process_count()} stops, since another process ended "
                f"({cause}): see the output of that one. Start all processes again with the same command to resume "
                "from the last checkpoint"
            )
        else:
            message = str(error.code) if isinstance(error, SystemExit) else traceback.format_exc()
            time.sleep(_EXIT_DELAY if jax.process_index() == 0 else 0.0)
        _end(message)


def _check_port(port: int) -> None:
    """Raise OSError if a port of this machine is in use; JAX may crash (SIGSEGV) in that case."""
    with socket.socket() as free:
        free.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as gRPC does; connections of the last run may linger
        free.bind(("", port))


def _peer_error(error: BaseException) -> str:
    """First line of the root error about another process that died, in the exception chain; "" if there is none."""
    found, seen = "", [error]
    while cause := seen[-1].__cause__ or seen[-1].__context__:
        seen.append(cause)
    for each in seen:
        line = str(each).strip().split("\n")[0]
        signs = _PEER_ERRORS if isinstance(each, jax.errors.JaxRuntimeError) else _PEER_ERRORS[:2]
        if not isinstance(each, SystemExit) and any(sign in line for sign in signs):
            found = line[:200]
    return found


def _end(message: str, status: int = 1) -> NoReturn:
    """Exit without JAX's shutdown, which would wait for the other processes."""
    if message:
        print("\n" + message.rstrip(), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
