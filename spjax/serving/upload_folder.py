"""Where uploads lie: a folder of this process alone, in which nothing grows old, and and which goes with it."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

KEPT_SECONDS = 1800  # that an upload stays on the disk
FILE_BYTES = 16_384  # that a file weighs at least: nothing but small ones would be a burden too

_PREFIX = "spjax-uploads-"
_YOUNG = 60  # seconds: a folder that is younger may be without its lock yet


@functools.cache
def upload_folder() -> Path:
    """The folder of this process, made at the first call (below $TMPDIR), deleted at its exit.

    The process holds a lock on it, which the system takes back however it ends, so that the next server knows what one
    that was killed has left, and deletes it (`delete_orphans`).
    """
    delete_orphans(Path(tempfile.gettempdir()))
    own = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
    atexit.register(own.cleanup)
    fcntl.flock(os.open(own.name, os.O_RDONLY), fcntl.LOCK_EX)  # held open for as long as the process lives
    return Path(own.name)


def delete_orphans(where: Path) -> None:
    """Deletes the upload folders in a folder whose processes are gone."""
    for folder in where.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _opened(folder) as place:
            if time.time() - os.fstat(place).st_mtime > _YOUNG:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error while its process lives
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield place
    finally:
        os.close(place)


def delete_old(folder: Path, seconds: float = KEPT_SECONDS) -> None:
    """Deletes files below a folder that nobody wrote to for so many seconds, and folders that are empty as long."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        with contextlib.suppress(OSError):  # it went by itself, or is a folder with something in it
            if time.time() - path.lstat().st_mtime > seconds:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def used_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, `FILE_BYTES` of each at least."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if not path.is_dir():
                total += max(FILE_BYTES, path.lstat().st_size)
    return total
