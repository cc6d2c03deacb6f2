"""What every command has in common as a process: how it starts, how Ctrl-C ends it, and the processes it starts itself.

A command's module begins with `if __name__ == "__main__": process.run("its.name")`, before its imports: they take
seconds, and Ctrl-C may come during them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

INTERRUPTED = 130  # exit status after Ctrl-C, as of a shell


def run(module: str, huge_pages: bool = False) -> NoReturn:
    """Import a command's module, run its `main` and exit; Ctrl-C ends it at any moment with status 130, no traceback.

    This holds too where the parent had SIGINT ignored, as a script has for `command &`.

    Args:
      module: dotted name.
      huge_pages: start the process again first, with malloc's huge pages on (`huge_pages.with_huge_pages`).
    """
    signal.signal(signal.SIGINT, _leave)
    if huge_pages:
        from spjax.huge_pages import with_huge_pages

        # A Ctrl-C during the start of the next interpreter, which has another handler, waits until it comes here.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with_huge_pages()
    take(signal.SIGINT, _leave)
    try:
        main = importlib.import_module(module).main
        signal.signal(signal.SIGINT, signal.default_int_handler)  # now there may be something to tidy up
        main()
        status: Any = 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, _leave)
        _end_children()
        _leave()
    except SystemExit as end:
        status = end.code
    finally:
        signal.signal(signal.SIGINT, _leave)
    sys.exit(status)


def take(number: signal.Signals, handler: Callable[..., Any]) -> None:
    """Have a signal call `handler`, even where the parent of this process ignored or blocked it."""
    signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})


def _leave(*_: object) -> NoReturn:
    """End the process at once; what waits for threads or prints tracebacks at the interpreter's end is left out."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(INTERRUPTED)


def _end_children() -> None:
    for child in multiprocessing.active_children():
        child.terminate()


@contextlib.contextmanager
def worker_pool(processes: int, **settings: Any) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Processes for a computation, ended at once where the block is left by an exception, Ctrl-C included.

    They are spawned, since a fork would inherit JAX's locks.

    Args:
      processes: how many.
      settings: of `ProcessPoolExecutor`.
    """
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, spawn, **settings)
    submit = pool.submit

    def submitted(*arguments: Any, **options: Any) -> Any:
        # The first ones start the processes. A terminal sends Ctrl-C to them too, and this one ends them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return submit(*arguments, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    pool.submit = submitted  # type: ignore[method-assign]
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        _end_children()
        raise
    pool.shutdown()
