"""Replace a directory of files as a whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from spjax.io import places


@contextlib.contextmanager
def replaced_directory(directory: epath.PathLike, last: str) -> Iterator[Path]:
    """Yield an empty local folder; after the block, its files become those of `directory`.

    The folder is a hidden sibling, which is renamed. An existing directory is renamed to `.NAME.replaced` first and
    deleted last; errors change nothing, a process killed in between leaves the old version there. A bucket renames only
    one file at a time: there, all files are uploaded to a hidden sibling, then `last` is deleted, and the files are
    renamed, `last` as the last. An error among these renames leaves the directory without `last`, which readers must
    treat as incomplete.

    Args:
      directory: final path, local or gs://; parents are created, and files of an existing one are deleted.
      last: name of a file of the directory.

    Raises:
      OSError: the directory cannot be written, or is a file.
    """
    if places.is_remote(directory):
        with tempfile.TemporaryDirectory(prefix="spjax-") as folder:
            yield Path(folder)
            _upload(Path(folder), places.at(directory), last)
        return
    final = Path(directory).resolve()
    if final.exists() and not final.is_dir():
        raise NotADirectoryError(f"{directory} is not a directory, and is not replaced: choose another path")
    final.parent.mkdir(parents=True, exist_ok=True)
    fresh, aside = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp"), _aside(final)
    try:
        fresh.mkdir()
        yield fresh
        for path in (*fresh.iterdir(), fresh):
            fsync(path)
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        try:
            if final.exists():
                final.rename(aside)
            fresh.rename(final)
        except BaseException:  # Ctrl-C too
            if aside.exists() and not final.exists():
                aside.rename(final)
            raise
        fsync(final.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _upload(folder: Path, final: Path, last: str) -> None:
    fresh = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: name == last)
    try:
        fresh.mkdir(parents=True)
        for name in names:
            places.copy(folder / name, fresh / name)
        (final / last).unlink(missing_ok=True)
        final.mkdir(exist_ok=True)
        for path in final.iterdir():
            if path.name not in names:
                path.unlink()
        for name in names:
            (fresh / name).replace(final / name)
    finally:
        with contextlib.suppress(Exception):  # keep the error of the upload
            epath.Path(fresh).rmtree(missing_ok=True)


def _aside(directory: Path) -> Path:
    """The previous version of a local directory while it is replaced."""
    return directory.parent / f".{directory.name}.replaced"


def where_aside(directory: Path) -> str:
    """Sentence for the message about an incomplete directory: where its previous version is; "" if there is none."""
    aside = _aside(directory)
    return f" An interrupted save left the previous version in {aside}: move it back." if aside.is_dir() else ""


def fsync(path: Path) -> None:
    """Write a file, or a directory's list of files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
