"""Paths as users give them, and whether something can be written there. Nothing but the standard library is imported.

Reading and writing them, on this machine or in a bucket, is `spjax.storage.places`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether a place is in a bucket."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(place)))


def given(place: str | os.PathLike[str]) -> str:
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


ZIP, GZIP, BZIP2, XZ = b"PK\3\4", b"\x1f\x8b", b"BZh", b"\xfd7zXZ"  # first bytes of files
_PACKED = {
    ZIP: "a zip archive",
    GZIP: "compressed with gzip",
    BZIP2: "compressed with bzip2",
    XZ: "compressed with xz",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
}


def packed(start: bytes) -> str | None:
    """What an archive or a compressed file is called, by its first 262 bytes; None for other files."""
    if start[257:262] == b"ustar":
        return "a tar archive"
    return next((name for magic, name in _PACKED.items() if start.startswith(magic)), None)


_SCHEMES = ("http", "https", "ftp", "file", "gs", "s3", "hdfs", "hf", "az", "abfs")  # known by one slash too


def to_write(place: str | os.PathLike[str], *, file: bool = False) -> str:
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


def unwritable(place: str | os.PathLike[str], error: Exception) -> OSError:
    """An error of writing that names the place that was asked for, not a temporary file beside it."""
    why = getattr(error, "strerror", None) or str(error)
    kind = type(error) if isinstance(error, OSError) else OSError
    return kind(f"{os.fspath(place)} cannot be written ({why}): choose another place, or mend this one")


@contextlib.contextmanager
def writing(place: str | os.PathLike[str]) -> Iterator[None]:
    """A block that writes to a place: of a full disk, whose error names no file, it is said which.

    Raises:
      OSError: as in the block.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise unwritable(place, error) from error
        raise
