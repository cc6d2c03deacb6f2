"""Entry point of a Beam worker process, started only by `data_pipelines.extract` and `data_pipelines.worker_pool`.

It runs Beam's worker on one thread. One worker a core then uses the machine fully without contention, and results do
not depend on the number of workers: a convolution on two threads sums in another order than on one. The worker is
killed when its parent exits. Its log goes to the runner, not to the terminal.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import MutableMapping, Sequence

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "NPROC", "PJRT_NPROC")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def one_thread(environment: MutableMapping[str, str]) -> None:
    """Limits numpy, numba and JAX (NPROC) to one thread each; call before they are imported."""
    environment.update(dict.fromkeys(THREADS, "1"))
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers may share a GPU


def die_with(launcher: int) -> None:
    """Kills this process when its parent, process id `launcher`, exits; at once if it has exited already.

    Otherwise a worker that waits for a connection would outlive the launcher by minutes. Linux only; no effect
    elsewhere.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # the parent exited before prctl took effect
            os._exit(1)


def main(argv: Sequence[str]) -> None:
    """Runs bundles until the launcher, whose process id is the argument, exits."""
    if len(argv) != 2 or not argv[1].isdecimal():
        sys.exit("this is an internal entry point: for cluster workers see python -m data_pipelines.worker_pool --help")
    die_with(int(argv[1]))
    one_thread(os.environ)
    logging.getLogger().addHandler(logging.NullHandler())  # else the first warning opens a handler to the terminal
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(argv[:1])


if __name__ == "__main__":
    main(sys.argv)
