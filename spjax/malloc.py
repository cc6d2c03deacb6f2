"""Huge pages for XLA's scratch memory on Linux, by restarting the process with glibc's malloc tunable."""

from __future__ import annotations

import os
import sys


def with_huge_pages() -> None:
    """Restart this process with glibc's huge pages on, unless GLIBC_TUNABLES is set already.

    XLA on CPUs allocates its scratch memory in every step, and the page faults take a third of a small model's step.
    The tunable is only read when a process starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)
