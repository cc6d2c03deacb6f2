"""The folder of this process for uploads: old files in it are deleted, and the folder itself at exit."""

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

KEPT_SECONDS = 1800  # for which an upload is kept on disk
FILE_BYTES = 16_384  # minimum that a file counts for, so that many tiny files hit the limit too

_PREFIX = "spjax-uploads-"
_YOUNG = 60  # seconds: a younger folder may not be locked yet


@functools.cache
def upload_folder() -> Path:
    """The upload folder of this process, created on the first call (in $TMPDIR), deleted at exit.

    The process holds a lock on it, which the system releases however the process ends, so that the next server can
    recognise and delete the folder of one that was killed (`delete_orphans`).
    """
    delete_orphans(Path(tempfile.gettempdir()))
    folder = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    fcntl.flock(os.open(folder.name, os.O_RDONLY), fcntl.LOCK_EX)  # held open for as long as the process lives
    return Path(folder.name)


def delete_orphans(where: Path) -> None:
    """Delete upload folders whose processes have ended."""
    for folder in where.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _opened(folder) as place:
            if time.time() - os.fstat(place).st_mtime > _YOUNG:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its process is alive
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield place
    finally:
        os.close(place)


def delete_old(folder: Path, seconds: float = KEPT_SECONDS) -> None:
    """Delete files and empty folders below `folder` that have not changed for `seconds`."""
    for path in sorted(folder.rglob("*"), reverse=True):  # files before the folder that holds them
        with contextlib.suppress(OSError):  # already deleted, or a folder that is not empty
            if time.time() - path.lstat().st_mtime > seconds:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def used_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, each counted as at least `FILE_BYTES`."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if not path.is_dir():
                total += max(FILE_BYTES, path.lstat().st_size)
    return total
