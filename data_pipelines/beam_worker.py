"""The process of a Beam worker: `data_pipelines.extract` and `data_pipelines.worker_pool` start it, nobody else does.

It is Beam's own worker on one thread. As many of them as there are cores share the machine without fighting, and what
a worker computes does not depend on how many there are: a convolution on two threads sums in another order than on one.
It dies with whoever started it, however that ends. Its log goes to the runner, not to the terminal.
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
    """Sets what keeps numpy, numba and JAX (NPROC), if they are not imported yet, to one thread each."""
    environment.update(dict.fromkeys(THREADS, "1"))
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers may share a GPU


def die_with(launcher: int) -> None:
    """Ends this process when its parent, process number `launcher`, is no more; at once if it is gone already.

    A worker that is waiting for a connection would otherwise outlive the launcher by minutes. Linux only: elsewhere it
    is left to that.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # it went before this was asked for
            os._exit(1)


def main(argv: Sequence[str]) -> None:
    """Serves bundles until the launcher, whose process number is the argument, goes away."""
    if len(argv) != 2 or not argv[1].isdecimal():
        sys.exit("this is started by others: for workers of a cluster see python -m data_pipelines.worker_pool --help")
    die_with(int(argv[1]))
    one_thread(os.environ)
    logging.getLogger().addHandler(logging.NullHandler())  # or the first warning would open one to the terminal
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(argv[:1])


if __name__ == "__main__":
    main(sys.argv)
