"""Places: paths of this machine and of buckets (gs://), which are read and written alike.

In buckets everything goes through etils.epath and TensorFlow's file system, with the credentials of the machine. An
object appears there once all of it has arrived, but no directory is renamed in one step.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

from etils import epath
from tqdm import tqdm


def is_remote(place: epath.PathLike) -> bool:
    """Whether a place is in a bucket."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(place)))


def given(place: epath.PathLike) -> str:
    """A path as a user gives it: `~` is expanded, `file://` removed; every edge that takes paths calls this.

    Raises:
      ValueError: it is empty, or a URL other than gs://BUCKET; the message says what to give.
    """
    text = os.fspath(place)
    if not text.strip() or "\0" in text:
        raise ValueError(f"{text!r} is no path: give that of a file or directory")
    if "://" not in text and os.path.lexists(text):  # whatever it looks like
        return text
    scheme, _, rest = text.strip().partition(":")
    known, slashes = scheme.lower(), len(rest) - len(rest.lstrip("/"))
    if re.fullmatch("[A-Za-z]", scheme) and rest[:1] in ("\\", "/"):
        raise ValueError(f"{text} is a path of Windows: give one of this machine, under WSL /mnt/{known}/...")
    if known == "file" and (local := re.fullmatch("(?://(?:localhost)?)?(/[^/].*)", rest)):
        return urllib.parse.unquote(local[1])
    if scheme == "gs" and re.match("//[^/]", rest):
        return text.strip()
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) or not (slashes > 1 or (slashes and known in _SCHEMES)):
        return os.path.expanduser(text)
    if known == "gs":
        raise ValueError(f"{text} is no path in a bucket: write gs://BUCKET/PATH")
    if known == "file":
        raise ValueError(f"{text} names a file of another machine: copy it here, and give its path")
    raise ValueError(
        f"{text} is a {known}:// address, which is not read or written: copy the files to this machine or to a bucket "
        "of Cloud Storage, and give their path or gs://BUCKET/PATH"
    )


_SCHEMES = ("http", "https", "ftp", "file", "gs", "s3", "hdfs", "hf", "az", "abfs")  # known by one slash too


def to_write(place: epath.PathLike, *, file: bool = False) -> str:
    """As `given`, for a directory, or a file, that will be written; tried by a temporary directory there.

    Raises:
      ValueError: as `given`.
      OSError: nothing can be written there; the message names the place. Buckets are not tried.
    """
    text = given(place)
    if is_remote(text):
        return text
    path = Path(os.path.abspath(text))
    above = next(one for one in (path, *path.parents) if os.path.lexists(one))
    try:
        if not above.is_dir() and (above != path or not file):
            raise NotADirectoryError(errno.ENOTDIR, f"{above} is not a directory")
        os.rmdir(tempfile.mkdtemp(prefix=".spjax-", dir=above if above.is_dir() else above.parent))
    except OSError as error:
        raise unwritable(text, error) from error
    return text


def unwritable(place: epath.PathLike, error: Exception) -> OSError:
    """An error of writing, said of the place that was asked for and not of a temporary file beside it."""
    why = getattr(error, "strerror", None) or str(error)
    kind = type(error) if isinstance(error, OSError) else OSError
    return kind(f"{os.fspath(place)} cannot be written ({why}): choose another place, or mend this one")


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
