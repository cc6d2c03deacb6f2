"""Lists recordings in a folder, counts skipped files, and finds copies."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from etils import epath

from data_pipelines import parts
from data_pipelines.splits import BuildError, composed, relative
from spjax.encoders.audio import SUFFIXES
from spjax.io import places

ENDINGS_NAMED = 8  # kinds of skipped files listed in a note
_UNFIT = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
)  # in a name: control characters, line separators, bytes that are not UTF-8
SAMPLE_BYTES = 4096  # from the middle of files of equal size, compared before the full hash


class Listing(NamedTuple):
    """Content of a folder.

    Attributes:
      files: path of every recording relative to the root, in NFC → the same path as on disk; sorted by the former.
      folders: every folder and link to a folder that is not hidden, relative to the root and in NFC.
      passed: number of skipped entries by kind: an extension such as ".txt", "hidden" and so on.
      misnamed: files with audio content but another extension, relative to the root.
    """

    files: dict[str, str]
    folders: frozenset[str]
    passed: Counter[str]
    misnamed: tuple[str, ...]

    def notes(self) -> list[str]:
        """Describes what was skipped, in a sentence or two."""
        found = []
        if self.passed:
            kinds = [f"{number} {kind}" for kind, number in self.passed.most_common(ENDINGS_NAMED)]
            rest = sum(self.passed.values()) - sum(number for _, number in self.passed.most_common(ENDINGS_NAMED))
            found.append(f"skipped {', '.join(kinds)}" + (f", {rest} others" if rest else ""))
        if self.misnamed:
            found.append(
                f"skipped files with audio content: {len(self.misnamed)}, the first {self.misnamed[0]}; to include "
                "them, rename them with the extension of a recording"
            )
        return found


def list_recordings(
    raw: epath.PathLike, folder: str = "", suffixes: Sequence[str] = SUFFIXES, thorough: bool = False
) -> Listing:
    """Lists recordings in a folder: files with one of the extensions `suffixes`, in any case.

    Hidden files and folders (whose name starts with a dot) and other extensions are skipped and counted. A folder is
    read whatever its extension, and only once: links to folders are followed after all real folders, unless the target
    was read already or contains the listed folder. In a bucket a name with such an extension is a file.

    Args:
      raw: root of the data set; local or gs://.
      folder: folder to list, relative to `raw`, with forward slashes.
      suffixes: extensions of recordings, in lower case.
      thorough: check local files with other extensions for audio content, and refuse dangling links without an
        extension, which may have been folders.

    Raises:
      BuildError: a missing or unreadable folder; two names that differ only in Unicode composition; a name with control
        characters or that is not UTF-8; or a recording that is a dangling link or not a regular file.
    """
    root = epath.Path(raw)
    top = root / folder if folder else root
    if not top.is_dir():
        raise BuildError(f"{top} is not a folder: unpack the data set there, or point to its root with --raw")
    files: dict[str, str] = {}
    read: set[str] = set()
    passed: Counter[str] = Counter()
    misnamed: list[str] = []
    for here, entries in _walk(top, tuple(suffixes), passed):
        inside = "" if here == root else relative(here, root)
        if here != top:
            read.add(composed(inside))
        for name, kind in entries:
            path = f"{inside}/{name}" if inside else name
            ending = os.path.splitext(name)[1].lower()
            lost = thorough and kind == "dangling link" and not ending
            if not name.lower().endswith(tuple(suffixes)) and not lost:
                passed[ending or "without ending" if kind == "file" else kind] += 1
                if thorough and kind == "file" and not places.is_remote(root) and _holds_audio(here / name):
                    misnamed.append(path)
            elif kind != "file":
                raise BuildError(f"{here / name} is a {kind}: replace it by a file, or remove it")
            elif _UNFIT.search(path):
                raise BuildError(
                    f"the name {os.fspath(here / name)!r} has a control character or is not UTF-8: rename it"
                )
            elif composed(path) in files:
                raise BuildError(
                    f"{root}: {path!r} exists twice, in composed and decomposed Unicode: remove one of the two"
                )
            else:
                files[composed(path)] = path
    return Listing(dict(sorted(files.items())), frozenset(read), passed, tuple(sorted(misnamed)))


def audio_files(
    raw: epath.PathLike, folder: str = "", suffixes: Sequence[str] = SUFFIXES, optional: bool = False
) -> dict[str, str]:
    """Lists every recording in a folder, which must have at least one: the files of `list_recordings`.

    Args:
      raw, folder, suffixes: see `list_recordings`.
      optional: return no files, instead of an error, if the folder is missing or has none.

    Raises:
      BuildError: as `list_recordings`, or the folder has no recording.
    """
    top = epath.Path(raw) / folder if folder else epath.Path(raw)
    if optional and not top.is_dir():
        return {}
    files = list_recordings(raw, folder, suffixes).files
    if not files and not optional:
        raise BuildError(f"{top} holds no audio ({', '.join(suffixes)}): unpack the data set there")
    return files


def copies(raw: epath.PathLike, paths: Sequence[str]) -> dict[str, str]:
    """Finds files of equal content: each file that has a copy → the first of its group in the order of `paths`.

    Only files of equal size are compared: first a sample of each, then the full hash. Unreadable files are ignored;
    reading them as audio reports them.
    """
    root = epath.Path(raw)

    def sample(path: str) -> Hashable:
        with (root / path).open("rb") as file:
            file.seek(size_of[path] // 2)
            return file.read(SAMPLE_BYTES)

    def full_hash(path: str) -> Hashable:
        with (root / path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    size_of = dict(zip(paths, parts.file_stats(raw, paths)[:, 0].tolist(), strict=True))
    groups = _alike([path for path in size_of if size_of[path] > 0], size_of.__getitem__)
    for look in (sample, full_hash):
        groups = [part for group in groups for part in _alike(group, look)]
    return {path: group[0] for group in groups for path in group}


def _alike(paths: Sequence[str], look: Callable[[str], Hashable]) -> list[list[str]]:
    """Groups paths for which `look` returns equal values; only groups of two or more."""

    def safely(path: str) -> Hashable:
        try:
            return look(path), None
        except OSError:
            return None, path

    found: dict[Hashable, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(8) as pool:
        for path, seen in zip(paths, pool.map(safely, paths), strict=True):
            found[seen].append(path)
    return [group for group in found.values() if len(group) > 1]


def _walk(
    top: epath.Path, suffixes: tuple[str, ...], passed: Counter[str]
) -> Iterator[tuple[epath.Path, list[tuple[str, str]]]]:
    """Yields `top` and every folder in it, with name and kind of the other entries.

    Hidden entries are only counted in `passed`. A folder found a second time is counted there and not read.
    """
    remote = places.is_remote(top)
    seen = {_inode(above) for above in _above(top)} if not remote else set()
    folders: list[epath.Path] = [top]
    links: list[epath.Path] = []
    while folders or links:
        if not folders:  # links last, so that a folder is listed under its real path
            links.sort(reverse=True)
        here = folders.pop() if folders else links.pop()
        if not remote:
            if (inode := _inode(here)) in seen:
                passed["links to folders read elsewhere"] += 1
                yield here, []
                continue
            seen.add(inode)
        others = []
        for name, kind in _remote_entries(here, suffixes) if remote else _entries(here):
            if name.startswith("."):
                passed["hidden"] += 1
            elif kind == "folder":
                folders.append(here / name)
            elif kind == "link to a folder":
                links.append(here / name)
            else:
                others.append((name, kind))
        yield here, others


def _entries(folder: epath.Path) -> list[tuple[str, str]]:
    """Returns name and kind of every entry of a local folder."""
    try:
        with os.scandir(folder) as entries:
            return [(entry.name, _kind(entry)) for entry in entries]
    except OSError as error:
        raise BuildError(
            f"{folder} cannot be read ({error.strerror}): change its permissions, or move it away"
        ) from error


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "link to a folder" if entry.is_symlink() else "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link to itself
        pass
    return "dangling link" if entry.is_symlink() and not os.path.exists(entry.path) else "pipe, socket or device"


def _remote_entries(folder: epath.Path, suffixes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Returns name and kind of every entry of a folder in a bucket, where looking up a kind costs a request."""
    return [
        (entry.name, "file" if entry.name.lower().endswith(suffixes) or not entry.is_dir() else "folder")
        for entry in folder.iterdir()
    ]


def _above(folder: epath.Path) -> list[str]:
    """Returns all parent folders, with links resolved."""
    path, found = os.path.realpath(folder), []
    while (parent := os.path.dirname(path)) != path:
        path = parent
        found.append(path)
    return found


def _inode(path: epath.PathLike) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _holds_audio(path: epath.Path) -> bool:
    """Returns whether a file starts with the magic bytes of an audio format."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    known = head.startswith((b"fLaC", b"OggS", b"ID3", b"caff", b"NIST_1A", b"\x1a\x45\xdf\xa3"))
    return known or head[8:] in (b"WAVE", b"AIFF", b"AIFC") or head[4:8] == b"ftyp"
