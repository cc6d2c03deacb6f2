"""Several processes that train together: they arrive, and where one fails all end, each with a sentence."""

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

ARRIVE = 300.0  # seconds that a process waits for the others at the start
MISSED = 60  # seconds without a sign of life after which JAX takes a process for dead
_LAST = 3.0  # process 0, whose end is everyone's, leaves so many seconds after its own error
# What a collective, a barrier or the coordination service says where another process is gone; but the first two, only
# in errors of JAX: a bucket's or another service's connections are reset as well.
_GONE = ("Gloo", "oordination service", "Connection closed by peer", "Connection reset", "heartbeat", "Barrier")


def check(
    coordinator: str | None, processes: int, process_id: int | None
) -> tuple[str | None, int | None, int | None] | None:
    """The arguments of `joined` for the flags of those names; None for a process alone.

    Raises:
      ValueError: flags that do not go together.
    """
    coordinator = coordinator or None
    auto = coordinator == "auto"
    if processes > 1 and not coordinator:
        raise ValueError(f"--processes={processes} need --coordinator=HOST:PORT, where process 0 listens")
    if processes == 1 and coordinator and not auto:
        raise ValueError(f"--coordinator={coordinator} needs --processes, how many there are, and --process_id")
    if processes > 1 and process_id is None and not auto:
        raise ValueError(f"--processes={processes} need --process_id, another number from 0 on for each")
    if (process_id or 0) >= processes:
        raise ValueError(f"--process_id={process_id} must lie below --processes={processes}")
    if coordinator and not auto and not re.fullmatch(r".+:[1-9]\d{0,4}", coordinator):
        raise ValueError(f"--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.2:8476, or auto")
    if not coordinator:
        return None
    return (None, None, None) if auto else (coordinator, processes, process_id)


@contextlib.contextmanager
def joined(
    coordinator: str | None, processes: int | None, process_id: int | None, *, arrive: float = ARRIVE
) -> Iterator[None]:
    """The block is run as one of several processes; an error in it ends this process, and by that all.

    Nobody waits for the others after an error: who then stands in a collective is told by the closed connection, who
    does not is ended by JAX (an abort, with its stack) after `MISSED` seconds, or at once where process 0 is gone.
    After success, process 0 is waited for, which alone writes reports.

    Args:
      coordinator: HOST:PORT, where process 0 listens; None, and so the next two: as Cloud TPU, Slurm or MPI say.
      processes: how many there are.
      process_id: the number of this one.
      arrive: seconds to wait for the others.

    Raises:
      SystemExit: of the block, with a number: all leave together, as after SIGTERM. Everything else ends the process.
    """

    def give_up() -> None:
        who = "this process" if process_id is None else f"process {process_id} of {processes}"
        where = "the coordinator of the cluster" if coordinator is None else f"--coordinator={coordinator}"
        _end(
            f"error: {who} waited {arrive:g} s in vain for all processes to arrive at {where}: start every one, each "
            "with another --process_id from 0 on, at an address that process 0 can listen on and the others can reach"
        )

    # JAX's own timeout aborts the process and says no more than "Deadline Exceeded".
    timer = threading.Timer(arrive, give_up)
    timer.daemon = True
    timer.start()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler has no turn while JAX waits
    try:
        if coordinator is not None and process_id == 0:
            _check_port(int(coordinator.rpartition(":")[2]))
        jax.distributed.initialize(
            coordinator, processes, process_id, initialization_timeout=int(arrive) + 60,
            heartbeat_timeout_seconds=MISSED, shutdown_timeout_seconds=24 * 3600,
        )  # fmt: skip
    except Exception as error:  # ValueError, RuntimeError and others, by what there is of a cluster
        what, way_out = (
            "--coordinator=auto finds no cluster that it can use",
            "leave it out for a process alone, or give --coordinator=HOST:PORT, --processes and --process_id",
        )
        if coordinator is not None:
            what, way_out = (
                f"process {process_id} of {processes} cannot start at --coordinator={coordinator}",
                "give all another port if that one is taken, and an address of the host that runs process 0",
            )
        _end(f"error: {what} ({' '.join(str(error).split()):.300}): {way_out}")
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    if processes not in (None, jax.process_count()):
        _end(f"error: --processes={processes}, but process 0 was started with {jax.process_count()}: give all the same")
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):  # a second Ctrl-C, for which nobody else waits
            _end("", status=130)
        if isinstance(error, SystemExit) and isinstance(error.code, int | None):
            raise
        if gone := _lost(error):
            told = (
                f"error: process {jax.process_index()} of {jax.process_count()} goes no further, since another one "
                f"ended ({gone}): see what that one printed. The same command, started again for all, continues from "
                "the last checkpoint"
            )
        else:
            told = str(error.code) if isinstance(error, SystemExit) else traceback.format_exc()
            time.sleep(_LAST if jax.process_index() == 0 else 0.0)
        _end(told)


def _check_port(port: int) -> None:
    """Raises OSError where something listens at a port of this machine: JAX may crash (SIGSEGV) on finding that out."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC: the last run's connections may linger
        free.bind(("", port))


def _lost(error: BaseException) -> str:
    """What was first said of another process that is gone, in a line: by what led to the error; "" if nothing."""
    found, seen = "", [error]
    while cause := seen[-1].__cause__ or seen[-1].__context__:
        seen.append(cause)
    for each in seen:
        said = str(each).strip().split("\n")[0]
        signs = _GONE if isinstance(each, jax.errors.JaxRuntimeError) else _GONE[:2]
        if not isinstance(each, SystemExit) and any(sign in said for sign in signs):
            found = said[:200]
    return found


def _end(told: str, status: int = 1) -> NoReturn:
    """End the process without JAX's shutdown, which would wait for the others."""
    if told:
        print("\n" + told.rstrip(), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
