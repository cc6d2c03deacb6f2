"""Recordings below a folder: which files are some, what is passed over, and which are copies of each other."""

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
from spjax.speech2unit.audio import SUFFIXES
from spjax.storage import places

ENDINGS_NAMED = 8  # in a report of what was passed over
_UNFIT = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
)  # in a name: control characters, line ends, bytes that are no UTF-8
SAMPLE_BYTES = 4096  # from the middle of files of equal size, before all of them is hashed


class Listing(NamedTuple):
    """What is below a folder.

    Attributes:
      files: path of every recording relative to the root, in NFC → the same as spelled on disk; sorted by the former.
      folders: every folder that is not hidden, and link to one, relative to the root and in NFC.
      passed: what was passed over, by kind: an ending such as ".txt", "hidden" and so on → how many.
      misnamed: files that hold audio and do not end like it, relative to the root.
    """

    files: dict[str, str]
    folders: frozenset[str]
    passed: Counter[str]
    misnamed: tuple[str, ...]

    def notes(self) -> list[str]:
        """What was passed over, in a sentence or two."""
        found = []
        if self.passed:
            kinds = [f"{number} {kind}" for kind, number in self.passed.most_common(ENDINGS_NAMED)]
            rest = sum(self.passed.values()) - sum(number for _, number in self.passed.most_common(ENDINGS_NAMED))
            found.append(f"passed over {', '.join(kinds)}" + (f", {rest} others" if rest else ""))
        if self.misnamed:
            found.append(
                f"files passed over that hold audio: {len(self.misnamed)}, the first {self.misnamed[0]}; if they are "
                "meant, rename them to end like recordings"
            )
        return found


def list_recordings(
    raw: epath.PathLike, folder: str = "", suffixes: Sequence[str] = SUFFIXES, thorough: bool = False
) -> Listing:
    """Looks for recordings, files that end in one of `suffixes` in any case, below a folder.

    Hidden files and folders (a name that starts with a dot) and other endings are passed over and counted. A folder is
    read whatever its name ends in, and once: a link to a folder is followed after all folders that are no links, unless
    that folder was read already or holds the one that is listed. In a bucket a name with such an ending is a file.

    Args:
      raw: root of the data set; local or gs://.
      folder: where to look below it, with forward slashes.
      suffixes: what names of recordings end in, in lower case.
      thorough: look into files of other endings for audio (local ones), and refuse dangling links that have no ending,
        which may have been folders.

    Raises:
      BuildError: the folder is missing; a folder cannot be read; two names differ only in how their letters are
        composed; a name holds control characters or is not UTF-8; or a recording is a dangling link or no regular file.
    """
    root = epath.Path(raw)
    top = root / folder if folder else root
    if not top.is_dir():
        raise BuildError(f"{top} is no folder: unpack the data set there, or point to its root with --raw")
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
                raise BuildError(f"{here / name} is a {kind}: put what is meant there, or remove it")
            elif _UNFIT.search(path):
                raise BuildError(
                    f"the name {os.fspath(here / name)!r} has a control character or is not UTF-8: rename it"
                )
            elif composed(path) in files:
                raise BuildError(f"{root}: {path!r} is there twice, its letters composed and not: remove one")
            else:
                files[composed(path)] = path
    return Listing(dict(sorted(files.items())), frozenset(read), passed, tuple(sorted(misnamed)))


def audio_files(
    raw: epath.PathLike, folder: str = "", suffixes: Sequence[str] = SUFFIXES, optional: bool = False
) -> dict[str, str]:
    """Every recording below a folder, which must hold some: the files of `list_recordings`.

    Args:
      raw, folder, suffixes: as of `list_recordings`.
      optional: a folder that is missing or holds none gives no files instead of an error.

    Raises:
      BuildError: as of `list_recordings`, or the folder holds no recording.
    """
    top = epath.Path(raw) / folder if folder else epath.Path(raw)
    if optional and not top.is_dir():
        return {}
    files = list_recordings(raw, folder, suffixes).files
    if not files and not optional:
        raise BuildError(f"{top} holds no audio ({', '.join(suffixes)}): unpack the data set there")
    return files


def copies(raw: epath.PathLike, paths: Sequence[str]) -> dict[str, str]:
    """Files that hold the same bytes as others: each of them → the first of its kind in the order of `paths`.

    Only files of equal size are compared: by a sample of each, and those that agree in it by the hash of the whole.
    Files that cannot be read are left to whoever reads them as audio.
    """
    root = epath.Path(raw)

    def sample(path: str) -> Hashable:
        with (root / path).open("rb") as file:
            file.seek(size_of[path] // 2)
            return file.read(SAMPLE_BYTES)

    def whole(path: str) -> Hashable:
        with (root / path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    size_of = dict(zip(paths, parts.file_stats(raw, paths)[:, 0].tolist(), strict=True))
    groups = _alike([path for path in size_of if size_of[path] > 0], size_of.__getitem__)
    for look in (sample, whole):
        groups = [part for group in groups for part in _alike(group, look)]
    return {path: group[0] for group in groups for path in group}


def _alike(paths: Sequence[str], look: Callable[[str], Hashable]) -> list[list[str]]:
    """Groups of two paths or more that look the same."""

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
    """`top` and every folder below it, with name and kind of what else is in it.

    Hidden entries are counted in `passed` alone. Folders that are met a second time are counted there and not read.
    """
    remote = places.is_remote(top)
    seen = {_inode(above) for above in _above(top)} if not remote else set()
    folders: list[epath.Path] = [top]
    links: list[epath.Path] = []
    while folders or links:
        if not folders:  # a link must not take a folder from the place where it is
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
    """Name and kind of everything in a folder of this machine."""
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
    """Name and kind of everything in a folder of a bucket, where to ask for a kind takes a request."""
    return [
        (entry.name, "file" if entry.name.lower().endswith(suffixes) or not entry.is_dir() else "folder")
        for entry in folder.iterdir()
    ]


def _above(folder: epath.Path) -> list[str]:
    """The folders that hold a folder, links followed."""
    path, found = os.path.realpath(folder), []
    while (parent := os.path.dirname(path)) != path:
        path = parent
        found.append(path)
    return found


def _inode(path: epath.PathLike) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _holds_audio(path: epath.Path) -> bool:
    """Whether a file starts like one of the formats of recordings."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    known = head.startswith((b"fLaC", b"OggS", b"ID3", b"caff", b"NIST_1A", b"\x1a\x45\xdf\xa3"))
    return known or head[8:] in (b"WAVE", b"AIFF", b"AIFC") or head[4:8] == b"ftyp"
