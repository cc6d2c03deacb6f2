"""Paths of local files and of buckets (gs://) with one interface.

Buckets are accessed through etils.epath and TensorFlow's file system, with the machine's credentials. An object in a
bucket appears when its upload is complete, but there is no atomic rename of directories.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, cast

from etils import epath
from tqdm import tqdm

from spjax.extras import needs
from spjax.paths import given
from spjax.paths import is_remote as is_remote


def at(place: epath.PathLike) -> Path:
    """Returns a path, local or in a bucket, with the methods of pathlib.

    Raises:
      ValueError: as `given`, except that `~` and file:// are left unchanged.
    """
    if is_remote(place):
        if given(place) != os.fspath(place):
            raise ValueError(f"{os.fspath(place)} is a URL: give the path {given(place)}")
        with needs("data", os.fspath(place)):
            importlib.metadata.distribution("tensorflow-datasets")  # epath uses TensorFlow's client
        return cast(Path, epath.Path(place))
    return Path(place)


def absolute(place: epath.PathLike) -> str:
    """Returns an absolute path; paths in buckets are returned unchanged."""
    path: str = os.fspath(place)
    return path if is_remote(place) else os.path.abspath(path)


@contextlib.contextmanager
def translate_bucket_errors() -> Iterator[None]:
    """Raises errors of TensorFlow's file system as OSErrors with a suggested fix; context manager or decorator.

    Raises:
      OSError: instead of TensorFlow's errors.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("tensorflow."):
            raise
        what, fix = _BUCKET_ERRORS.get(type(error).__name__, ("a bucket cannot be used", "try again later"))
        brief = " ".join(str(error).split())
        raise OSError(f"{what} ({brief:.300}): {fix}") from error


_GRANT = (
    "grant the account that runs this (on a TPU VM its service account) roles/storage.objectUser and "
    "roles/storage.legacyBucketReader on the bucket; elsewhere log in first: gcloud auth application-default login"
)
_AGAIN = "check the connection and run the same command again to continue"
_BUCKET_ERRORS = {  # name of TensorFlow's error: problem, suggested fix
    "PermissionDeniedError": ("a bucket refuses access", _GRANT),
    "UnauthenticatedError": ("a bucket refuses access", _GRANT),
    "NotFoundError": ("an object or bucket does not exist", "check the bucket's name and the path"),
    "FailedPreconditionError": ("a bucket cannot be reached", _AGAIN),
    "UnavailableError": ("a bucket cannot be reached", _AGAIN),
    "AbortedError": ("a bucket cannot be reached", _AGAIN),
    "DeadlineExceededError": ("a bucket cannot be reached", _AGAIN),
}


@translate_bucket_errors()
def check_buckets(places: Iterable[object]) -> None:
    """Checks that the buckets of some paths exist and can be accessed, before any work is done.

    Args:
      places: paths; everything that is not a path in a bucket is ignored.

    Raises:
      ValueError: a scheme other than gs://.
      OSError: a bucket does not exist, refuses access or cannot be reached.
    """
    remote = [os.fspath(place) for place in places if isinstance(place, str | os.PathLike) and is_remote(place)]
    for root in dict.fromkeys("/".join(place.split("/", 3)[:3]) for place in remote):
        if not root.startswith("gs://") or root == "gs://":
            raise ValueError(f"{root} is not a Cloud Storage bucket: give gs://BUCKET/PATH, or a local path")
        if not at(root).exists():
            raise FileNotFoundError(
                f"there is no bucket {root}: check its name, or create it with gcloud storage buckets create {root} "
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
    """Opens a regular file for reading, local or in a bucket. Pipes and devices, which may never end, are refused.

    Raises:
      OSError: missing, not readable, or not a regular file.
    """
    if is_remote(path):
        return cast(IO[bytes], at(path).open("rb"))
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe without a writer would block
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind == stat.S_IFREG:
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise OSError(errno.EINVAL, f"it is {_NOT_FILES.get(kind, 'something else')}, not a file", os.fspath(path))


def read_limited(path: epath.PathLike, limit: int) -> bytes:
    """Reads all bytes of a regular file of at most `limit` bytes.

    Raises:
      OSError: as `open_regular`, or a larger file.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1) or b""  # some files of /proc return None
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than the limit of {limit >> 20} MiB", os.fspath(path))
    return content


@contextlib.contextmanager
def local(path: epath.PathLike) -> Iterator[Path]:
    """Yields a local path of the file, for libraries without bucket support; a remote file is copied for the block."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="spjax-") as folder:
        here = Path(folder) / at(path).name
        copy(path, here)
        yield here


def copy(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies a file from or to a bucket."""
    found = at(source).stat()
    total: int = found.length if is_remote(source) else found.st_size  # type: ignore[attr-defined]  # epath's attribute
    label = f"{at(target).name} {'to' if is_remote(target) else 'from'} the bucket"
    with (
        tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=total < _SHOWN, leave=False) as bar,
        at(source).open("rb") as read,
        at(target).open("wb") as write,
    ):
        while part := read.read(_COPIED):
            write.write(part)
            bar.update(len(part))


_COPIED = 64 << 20  # bytes a read
_SHOWN = 256 << 20  # bytes from which a progress bar is shown
