"""Download files (cache and hashes by pooch; interrupted downloads are resumed) and unpack untrusted archives."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import sys
import tarfile
import time
import urllib.parse
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

_STEP = 1 << 20
_LONGEST_WAIT = 60.0  # seconds between two attempts
_MOST_UNPACKED = 32 << 30  # bytes of an archive's files; Speech Commands has 2.4 GB
_MOST_FILES = 1_000_000


class FetchError(RuntimeError):
    """A file cannot be downloaded or used; the message names the URL, the path, and what to do."""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _transfer(url: str, part: Path, timeout: float, bar: tqdm) -> None:
    """One request, which resumes `part` if the server supports it."""
    import requests  # here: requests, urllib3 and pooch are slow to import
    import urllib3

    have = _size(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        sent = response.headers.get("Content-Range", "")
        if have and response.status_code == requests.codes.requested_range_not_satisfiable:
            if sent.endswith(f"/{have}"):
                return  # the partial file is complete
            part.unlink()
            raise requests.ConnectionError("the partial file is longer than the published one and was deleted")
        if not response.ok:
            raise requests.HTTPError(f"HTTP {response.status_code} {response.reason}", response=response)
        start = have if response.status_code == requests.codes.partial_content else 0
        if start and not sent.startswith(f"bytes {start}-"):
            raise requests.ConnectionError(f"asked for bytes from {start} on, the server sent {sent!r:.40}")
        missing, free = int(response.headers.get("Content-Length", 0)), shutil.disk_usage(part.parent).free
        if missing > free:
            raise OSError(errno.ENOSPC, f"{missing:,} bytes are missing and {free:,} are free on its disk")
        bar.total, bar.n = start + missing if missing else None, start
        with part.open("ab" if start else "wb") as file:
            try:
                while chunk := response.raw.read1(_STEP):  # what has arrived, which is kept if the connection ends
                    file.write(chunk)
                    file.flush()
                    bar.update(len(chunk))
            except urllib3.exceptions.HTTPError as error:
                of = f" of {bar.total:,}" if missing else ""
                raise requests.ConnectionError(f"the connection ended after {bar.n:,}{of} bytes: {error}") from error
            os.fsync(file.fileno())


def _resume(url: str, part: Path, attempts: int, wait: float, timeout: float) -> None:
    """Transfer until `part` is complete; raises the last error after `attempts` failures without progress."""
    import requests
    import urllib3

    before = most = _size(part)
    failed = 0
    with tqdm(desc=part.stem, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        while True:
            try:
                return _transfer(url, part, timeout, bar)
            except requests.RequestException as error:
                failed = 1 if _size(part) > most else failed + 1
                most = max(most, _size(part))
                reason = getattr(error.__context__, "reason", None)
                if isinstance(reason, urllib3.exceptions.NewConnectionError) and most == before:
                    raise FetchError(f"no connection: {reason}") from error  # retrying is pointless
                status = error.response.status_code if error.response is not None else 500
                temporary = status >= 500 or status in (408, 425, 429)
                if failed >= attempts or not temporary or isinstance(error, requests.exceptions.SSLError):
                    raise FetchError(str(error)) from error
                pause = min(wait * 2 ** (failed - 1), _LONGEST_WAIT)
                tqdm.write(f"{url}: {error}; retrying in {pause:g} s", file=sys.stderr)
                time.sleep(pause)


def download(
    url: str,
    path: str | Path,
    *,
    sha256: str | None = None,
    attempts: int = 5,
    wait: float = 1.0,
    timeout: float = 60.0,
) -> Path:
    """Download a file, unless it is there; it appears under its name only when it is complete.

    Partial downloads are kept as NAME.part; the next attempt, or the next call, resumes them.

    Args:
      url: http or https.
      path: where to write; parents are created.
      sha256: hex; a download with another one is deleted.
      attempts: failed attempts in a row without progress, after which to stop.
      wait: seconds before the second attempt; doubled for each further one.
      timeout: seconds without data.

    Returns:
      The path.

    Raises:
      FetchError: refused by the server, no connection, a full disk, another sha256.
    """
    import pooch

    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise FetchError(f"{url} is not an http or https address.")

    def resume(url: str, output: str, _pooch: object) -> None:
        _resume(url, part, attempts, wait, timeout)
        os.replace(part, output)

    pooch.get_logger().setLevel("WARNING")  # the progress bar says the same
    try:
        pooch.retrieve(url, sha256, path.name, path.parent, downloader=resume)
    except FetchError as error:
        kept = f" {_size(part):,} bytes are kept in {part}; the same command resumes." if _size(part) else ""
        raise FetchError(
            f"{url}: {error}.{kept} Or get {url} by other means, put it at {path}, and give the same command again."
        ) from error
    except ValueError as error:  # of pooch, with both hashes
        raise FetchError(f"{url}: {error} The same command downloads it again.") from error
    except OSError as error:  # of writing
        raise FetchError(
            f"{part} cannot be written: {error.strerror or error}. Free some space, then repeat the command: "
            f"it resumes after {_size(part):,} bytes."
        ) from error
    return path


def _check_member(member: tarfile.TarInfo) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name:
        raise FetchError(f"it holds {member.name!r:.100}, which is outside its folder")
    if not member.isfile() and not member.isdir():
        raise FetchError(f"it holds {member.name!r:.100}, which is neither a file nor a folder")


def unpack(archive: str | Path, target: str | Path, most: int = _MOST_UNPACKED) -> Path:
    """Unpack a .tar.gz into a folder, which appears only when it is complete; a single top-level folder is dropped.

    `pooch.Untar` is not used: below Python 3.12 it follows paths outside the folder.

    Args:
      archive: untrusted: links, paths outside the folder and devices are refused.
      target: a folder that does not exist yet; parents are created.
      most: most bytes of all files.

    Returns:
      The folder.

    Raises:
      FetchError: no such archive, damaged, or with contents that are refused.
    """
    archive, target = Path(archive), Path(target)
    fresh = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    size = count = 0
    bar = {"total": _size(archive), "desc": f"unpack {archive.name}", "delay": 2, "leave": False}
    try:
        with (
            archive.open("rb") as packed,
            tqdm.wrapattr(packed, "read", **bar) as shown,
            gzip.GzipFile(fileobj=shown) as plain,
            tarfile.open(fileobj=plain, mode="r|") as tar,
        ):
            for member in tar:
                _check_member(member)
                size, count = size + member.size, count + 1
                if size > most or count > _MOST_FILES:
                    raise FetchError(f"it unpacks to more than {most:,} bytes or {_MOST_FILES:,} files")
                tar.extract(member, fresh, filter="data")
            while plain.read(_STEP):  # up to the end, to detect truncation and damage after the last file
                size += _STEP
                if size > most:
                    raise FetchError(f"it unpacks to more than {most:,} bytes")
        held = list(fresh.iterdir())
        if not held:
            raise FetchError("it is empty")
        top = held[0] if len(held) == 1 and held[0].is_dir() else fresh
        os.replace(top, target)
    except FetchError as error:
        raise FetchError(f"{archive} was not unpacked: {error}.") from error
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise FetchError(f"{archive} is damaged, or not a .tar.gz ({error}). Fetch it again.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target
