"""Places: paths of this machine and of buckets (gs://), which are read and written alike.

In buckets everything goes through etils.epath and TensorFlow's file system, with the credentials of the machine. An
object appears there once all of it has arrived, but no directory is renamed in one step.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, cast

from etils import epath
from tqdm import tqdm

from spjax.paths import given, is_remote


def at(place: epath.PathLike) -> Path:
    """A place as a path with the methods of pathlib's, whether it is here or in a bucket.

    Raises:
      ValueError: as `given`; but `~` and file:// are left as they are.
    """
    if is_remote(place):
        if given(place) != os.fspath(place):
            raise ValueError(f"{os.fspath(place)} is a URL: give the path {given(place)}")
        return cast(Path, epath.Path(place))
    return Path(place)


def absolute(place: epath.PathLike) -> str:
    """A place that stays the same whatever directory one works in; those in buckets are so already."""
    return os.fspath(place) if is_remote(place) else os.path.abspath(os.fspath(place))


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """A block, or as a decorator a function, in which what TensorFlow's file system raises says what to do.

    Raises:
      OSError: instead of TensorFlow's errors.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("tensorflow."):
            raise
        what, way_out = _TOLD.get(type(error).__name__, ("a bucket cannot be used", "try again later"))
        brief = " ".join(str(error).split())
        raise OSError(f"{what} ({brief:.300}): {way_out}") from error


_GRANT = (
    "give who runs this (on a TPU VM its service account) roles/storage.objectUser and "
    "roles/storage.legacyBucketReader on the bucket; elsewhere log in first: gcloud auth application-default login"
)
_AGAIN = "check the connection, and the same command goes on"
_TOLD = {  # by the name of TensorFlow's error
    "PermissionDeniedError": ("a bucket refuses access", _GRANT),
    "UnauthenticatedError": ("a bucket refuses access", _GRANT),
    "NotFoundError": ("a bucket does not hold that", "check the bucket's name and the path"),
    "FailedPreconditionError": ("a bucket cannot be reached", _AGAIN),
    "UnavailableError": ("a bucket cannot be reached", _AGAIN),
    "AbortedError": ("a bucket cannot be reached", _AGAIN),
    "DeadlineExceededError": ("a bucket cannot be reached", _AGAIN),
}


@plainly()
def check_buckets(places: Iterable[object]) -> None:
    """Find out, before there is anything to lose, whether the buckets of some places can be used.

    Args:
      places: what is no path in a bucket is passed over.

    Raises:
      ValueError: a scheme other than gs://.
      OSError: there is no such bucket, it refuses access, or it is not reached.
    """
    remote = [os.fspath(place) for place in places if isinstance(place, str | os.PathLike) and is_remote(place)]
    for root in dict.fromkeys("/".join(place.split("/", 3)[:3]) for place in remote):
        if not root.startswith("gs://") or root == "gs://":
            raise ValueError(f"{root} is no bucket of Cloud Storage: give gs://BUCKET/PATH, or a path of this machine")
        if not epath.Path(root).exists():
            raise FileNotFoundError(
                f"there is no bucket {root}: check its name, or make it with gcloud storage buckets create {root} "
                "--location=REGION --uniform-bucket-level-access"
            )


_NOT_FILES = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: epath.PathLike) -> IO[bytes]:
    """Open a regular file for reading, here or in a bucket. Pipes and devices, which may never end, are refused.

    Raises:
      OSError: absent, not readable, or not a regular file.
    """
    if is_remote(path):
        return cast(IO[bytes], at(path).open("rb"))
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would block
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind == stat.S_IFREG:
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise OSError(errno.EINVAL, f"it is {_NOT_FILES.get(kind, 'something else')}, not a file", os.fspath(path))


def read_limited(path: epath.PathLike, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes.

    Raises:
      OSError: as `open_regular`, or a larger file.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1) or b""  # nothing yet, of some files of /proc
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit >> 20} MiB, the most that is read here", os.fspath(path))
    return content


@contextlib.contextmanager
def local(path: epath.PathLike) -> Iterator[Path]:
    """The file as one of this machine, for libraries that know no others; that of a bucket is copied for the block."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="spjax-") as folder:
        here = Path(folder) / at(path).name
        copy(path, here)
        yield here


def copy(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copy a file from or to a bucket."""
    found = at(source).stat()
    total: int = found.length if is_remote(source) else found.st_size  # type: ignore[attr-defined]  # epath's own
    told = f"{at(target).name} {'to' if is_remote(target) else 'from'} the bucket"
    with (
        tqdm(total=total, desc=told, unit="B", unit_scale=True, disable=total < _SHOWN) as bar,
        at(source).open("rb") as read,
        at(target).open("wb") as write,
    ):
        while part := read.read(_COPIED):
            write.write(part)
            bar.update(len(part))


_COPIED = 64 << 20  # bytes at a time
_SHOWN = 256 << 20  # bytes from which a copy takes its time
