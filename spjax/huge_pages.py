"""Memory for XLA's scratch arrays on Linux: programs of ours start themselves again with glibc's huge pages on."""

from __future__ import annotations

import os
import sys


def with_huge_pages() -> None:
    """Start this process again with glibc's huge pages on, unless it was, or says otherwise by GLIBC_TUNABLES.

    XLA for CPUs takes its scratch memory anew in every step, and the page faults of that cost a third of the time of a
    small model's step. The tunable is only read when a process starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)
