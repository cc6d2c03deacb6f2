"""Directories are replaced as a whole: an error or Ctrl-C leaves the earlier version, or one that readers refuse."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from etils import epath

from spjax.io import atomic, places

OLD, NEW = {"card": "old", "data": "old", "stale": "old"}, {"card": "new", "data": "new", "more": "new"}


def write(directory: Path, content: dict[str, str]) -> None:
    with atomic.replaced_directory(directory, last="card") as folder:
        for name, text in content.items():
            (folder / name).write_text(text)


def read(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local directory that is treated as a path in a bucket."""
    monkeypatch.setattr(places, "is_remote", lambda place: os.fspath(place).startswith(os.fspath(tmp_path)))
    monkeypatch.setattr(places, "at", epath.Path)
    monkeypatch.setattr(places, "copy", lambda source, target: target.write_bytes(source.read_bytes()))
    return tmp_path / "deep" / "pack"


def fail(monkeypatch: pytest.MonkeyPatch, where: object, name: str, call: int, error: BaseException) -> None:
    """Make a function raise at its nth call, from 0."""
    real, calls = getattr(where, name), iter(range(1000))

    def failing(*arguments: object) -> object:
        if next(calls) == call:
            raise error
        return real(*arguments)

    monkeypatch.setattr(where, name, failing)


def test_a_directory_of_a_bucket_is_replaced(bucket: Path) -> None:
    write(bucket, OLD)
    write(bucket, NEW)
    assert read(bucket) == NEW
    assert os.listdir(bucket.parent) == ["pack"]


@pytest.mark.parametrize("call", range(3))
def test_a_failed_upload_keeps_the_version_in_the_bucket(
    bucket: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(bucket, OLD)
    fail(monkeypatch, places, "copy", call, OSError("unreachable"))
    with pytest.raises(OSError, match="unreachable"):
        write(bucket, NEW)
    assert read(bucket) == OLD
    assert os.listdir(bucket.parent) == ["pack"]


@pytest.mark.parametrize("call", range(3))
def test_a_mixture_in_a_bucket_is_incomplete(bucket: Path, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write(bucket, OLD)
    with monkeypatch.context() as patch:
        fail(patch, type(epath.Path(bucket)), "replace", call, OSError("unreachable"))
        with pytest.raises(OSError, match="unreachable"):
            write(bucket, NEW)
    assert "card" not in read(bucket)
    write(bucket, NEW)
    assert read(bucket) == NEW


@pytest.mark.parametrize("call", range(2))
def test_ctrl_c_at_a_rename_keeps_the_earlier_version(
    tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "pack", OLD)
    with monkeypatch.context() as patch:
        fail(patch, Path, "rename", call, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "pack", NEW)
    assert read(tmp_path / "pack") == OLD
    assert os.listdir(tmp_path) == ["pack"]


def test_a_file_is_not_replaced_by_a_directory(tmp_path: Path) -> None:
    (tmp_path / "pack").write_text("mine")
    with pytest.raises(NotADirectoryError, match="pack is not a directory, and is not replaced: choose another path"):
        write(tmp_path / "pack", NEW)
    assert (tmp_path / "pack").read_text() == "mine"
    assert os.listdir(tmp_path) == ["pack"]
