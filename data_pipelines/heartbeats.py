"""Heartbeat files of workers, by which a launcher notices that all of them have died.

Most runners notice a dead worker, but Beam's local job service never does, and a launcher cannot query the workers of a
cluster. All of them can access the folder of their parts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

from etils import epath

BEAT_SECONDS = 5.0
PREFIX = "alive-"


@contextlib.contextmanager
def beating(folder: epath.Path, name: str) -> Iterator[None]:
    """Changes a file in `folder` every `BEAT_SECONDS` while the block runs, and deletes it at the end.

    Args:
      folder: of the heartbeats.
      name: unique in the folder.
    """
    path, over = folder / f"{PREFIX}{name}", threading.Event()

    def beat() -> None:
        count = 0
        while True:
            with contextlib.suppress(Exception):  # a missed beat must not stop the work; gs:// errors are no OSError
                path.write_text(f"{socket.gethostname()} {os.getpid()} {count}\n")
            if over.wait(BEAT_SECONDS):
                return
            count += 1

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(Exception):  # as above
            path.unlink(missing_ok=True)


def beats(folder: epath.Path) -> frozenset[tuple[str, str]]:
    """Returns (file, content) of each heartbeat file, dead workers' included; while it changes, a worker is alive."""
    found = set()
    for path in folder.iterdir():
        if path.name.startswith(PREFIX):
            with contextlib.suppress(Exception):  # the worker has finished, or the bucket cannot be reached
                found.add((os.fspath(path), path.read_text()))
    return frozenset(found)
