"""The process of a local Beam worker: `python -m data_pipelines.beam_worker`, started by `data_pipelines.extract`.

It is Beam's own worker on one thread. As many of them as there are cores share the machine without fighting, and what
a worker computes does not depend on how many there are: a convolution on two threads sums in another order than on one.
Its log goes to the launcher, not to the terminal.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping, Sequence

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "NPROC", "PJRT_NPROC")


def one_thread(environment: MutableMapping[str, str]) -> None:
    """Sets what keeps numpy, numba and JAX (NPROC), if they are not imported yet, to one thread each."""
    environment.update(dict.fromkeys(THREADS, "1"))
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers may share a GPU


def main(argv: Sequence[str]) -> None:
    """Serves bundles until the launcher goes away."""
    one_thread(os.environ)
    logging.getLogger().addHandler(logging.NullHandler())  # or the first warning would open one to the terminal
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(argv)


if __name__ == "__main__":
    main(sys.argv)
