"""Paths as users give them, and checks that they are writable. Imports only the standard library.

`spjax.io.places` reads and writes them, locally or in a bucket.
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
    """Whether a path is in a bucket."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(place)))


def given(place: str | os.PathLike[str]) -> str:
    """Normalise a path from a user: `~` is expanded, `file://` removed; called wherever paths enter the program.

    Raises:
      ValueError: it is empty, or a URL other than gs://BUCKET; the message says what to give.
    """
    text = os.fspath(place)
    if not text.strip() or "\0" in text:
        raise ValueError(f"{text!r} is not a path: give that of a file or directory")
    if "://" not in text and os.path.lexists(text):  # an existing file may have any name
        return text
    scheme, _, rest = text.strip().partition(":")
    known, slashes = scheme.lower(), len(rest) - len(rest.lstrip("/"))
    if re.fullmatch("[A-Za-z]", scheme) and rest[:1] in ("\\", "/"):
        raise ValueError(f"{text} is a Windows path: give one of this machine, under WSL /mnt/{known}/...")
    if known == "file" and (local := re.fullmatch("(?://(?:localhost)?)?(/[^/].*)", rest)):
        return urllib.parse.unquote(local[1])
    if scheme == "gs" and re.match("//[^/]", rest):
        return text.strip()
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) or not (slashes > 1 or (slashes and known in _SCHEMES)):
        return os.path.expanduser(text)
    if known == "gs":
        raise ValueError(f"{text} is not a path in a bucket: write gs://BUCKET/PATH")
    if known == "file":
        raise ValueError(f"{text} is on another machine: copy it here, and give its path")
    raise ValueError(
        f"{text} is a {known}:// address, which is not supported: copy the files to this machine or to a bucket "
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
    """Name of an archive or compressed file's format, by its first 262 bytes; None for other files."""
    if start[257:262] == b"ustar":
        return "a tar archive"
    return next((name for magic, name in _PACKED.items() if start.startswith(magic)), None)


_SCHEMES = ("http", "https", "ftp", "file", "gs", "s3", "hdfs", "hf", "az", "abfs")  # recognised with one slash too


def to_write(place: str | os.PathLike[str], *, file: bool = False) -> str:
    """As `given`, for a directory or file to write; checked by creating a temporary directory there.

    Raises:
      ValueError: see `given`.
      OSError: it is not writable; the message names the path. Buckets are not checked.
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
    """An error of writing that names the requested path, not a temporary file beside it."""
    why = getattr(error, "strerror", None) or str(error)
    kind = type(error) if isinstance(error, OSError) else OSError
    return kind(f"{os.fspath(place)} cannot be written ({why}): choose another place, or fix this one")


@contextlib.contextmanager
def writing(place: str | os.PathLike[str]) -> Iterator[None]:
    """Context manager: errors such as a full disk, which name no file, get the path of `place`.

    Raises:
      OSError: from the block.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise unwritable(place, error) from error
        raise
