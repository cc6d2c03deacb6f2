"""Signs of life of workers, as files: a launcher that sees none learns that the last of them is gone.

Most runners notice a lost worker by themselves, Beam's local job service never does, and no launcher can ask the
workers of a cluster how they are. But all of them reach the folder of their parts.
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
    """Has a file in `folder` change every `BEAT_SECONDS`, while what is within runs; it goes with it.

    name: of what is done, unique in the folder.
    """
    path, over = folder / f"{PREFIX}{name}", threading.Event()

    def beat() -> None:
        count = 0
        while True:
            with contextlib.suppress(Exception):  # a missed beat matters less than the work; gs:// raises no OSError
                path.write_text(f"{socket.gethostname()} {os.getpid()} {count}\n")
            if over.wait(BEAT_SECONDS):
                return
            count += 1

    heart = threading.Thread(target=beat, name="heartbeat", daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join()
        with contextlib.suppress(Exception):  # likewise
            path.unlink(missing_ok=True)


def beats(folder: epath.Path) -> frozenset[tuple[str, str]]:
    """File and content of each sign of life, also of those that are gone: somebody lives while it differs."""
    found = set()
    for path in folder.iterdir():
        if path.name.startswith(PREFIX):
            with contextlib.suppress(Exception):  # it was done in between, or the bucket is away
                found.add((os.fspath(path), path.read_text()))
    return frozenset(found)
