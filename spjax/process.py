"""Process handling shared by all commands: startup, Ctrl-C, and worker processes.

A command's module begins with `if __name__ == "__main__": process.run("its.name")`, before its imports: they take
seconds, during which Ctrl-C must work.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from spjax.extras import MissingExtraError

if TYPE_CHECKING:  # `run` must handle SIGINT as early as possible, so slow imports are done where they are used
    import concurrent.futures

INTERRUPTED = 130  # exit status after Ctrl-C, as in a shell
_LOOKS = 50  # checks whether a pool has ended, a tenth of a second each
AGAIN_SECONDS = 0.02  # until a Ctrl-C that could not be handled is sent again


def run(module: str, huge_pages: bool = False) -> NoReturn:
    """Import a command's module, run its `main` and exit; Ctrl-C ends it at any time with status 130, no traceback.

    This also works if the parent ignores SIGINT, as a shell script does for `command &`.

    Args:
      module: dotted name.
      huge_pages: restart the process first, with malloc's huge pages on (`malloc.with_huge_pages`).
    """
    signal.signal(signal.SIGINT, _leave)
    if huge_pages:
        from spjax.malloc import with_huge_pages

        # Blocks Ctrl-C during the start of the next interpreter, which has another handler; it is delivered here.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with_huge_pages()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sys.unraisablehook = _resend
    interrupted = False
    try:
        main = importlib.import_module(module).main
        signal.signal(signal.SIGINT, interrupt)  # from here on there may be something to clean up
        main()
        status: Any = 0
    except KeyboardInterrupt:
        interrupted = True
    except SystemExit as end:
        status = end.code
    except MissingExtraError as error:
        status = f"error: {error}"
    finally:
        signal.signal(signal.SIGINT, _leave)
        if interrupted or signal.getitimer(signal.ITIMER_REAL)[0]:  # the latter: a Ctrl-C is pending
            _end_children()
            _leave()
    sys.exit(status)


def interrupt(_: int, frame: Any) -> None:
    """Raise KeyboardInterrupt like Python's handler, but only after imports, during which libraries swallow exceptions.

    Raises:
      KeyboardInterrupt: outside of imports.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            _send_again()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _send_again() -> None:
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)


def _resend(ignored: Any) -> None:
    """For `sys.unraisablehook`: send Ctrl-C again if it came during code whose exceptions are ignored.

    JAX runs such code at every garbage collection.
    """
    if ignored.exc_type is KeyboardInterrupt:
        _send_again()
    else:
        sys.__unraisablehook__(ignored)


def _leave(*_: object) -> NoReturn:
    """End the process at once, without waiting for threads or printing tracebacks."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(INTERRUPTED)


def _end_children() -> None:
    import multiprocessing

    for child in multiprocessing.active_children():
        child.terminate()


def _prepare_worker() -> None:
    """Make this worker process end with its parent, since it would wait for work forever, and end fast."""
    import atexit
    import multiprocessing
    import threading

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()
    atexit.register(os._exit, 0)  # Python would take a second to free JAX's modules


@contextlib.contextmanager
def worker_pool(processes: int, **settings: Any) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """A pool of worker processes, ended at once if the block raises an exception, including Ctrl-C.

    They are spawned, since a fork would inherit JAX's locks, and end with this process, even if it is killed.

    Args:
      processes: number of processes.
      settings: of `ProcessPoolExecutor`.
    """
    import concurrent.futures
    import multiprocessing

    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, spawn, _prepare_worker, **settings)
    submit = pool.submit

    def submitted(*arguments: Any, **options: Any) -> Any:
        # The first calls start the processes. A terminal sends Ctrl-C to them too; only this process handles it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return submit(*arguments, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    pool.submit = submitted  # type: ignore[method-assign]
    try:
        yield pool
    except BaseException:
        manager: Any = pool._executor_manager_thread
        for _ in range(_LOOKS):  # it may be starting a process, and would print a traceback in a closed pool
            _end_children()
            if manager is None or not manager.is_alive():
                break
            manager.join(0.1)
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
