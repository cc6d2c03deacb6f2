"""The upload folder: old files are deleted, and folders of dead processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spjax.serving import upload_folder

OWN = """
import sys, time
from spjax.serving.upload_folder import upload_folder
print(upload_folder(), flush=True)
(upload_folder() / "speech.wav").write_bytes(b"speech")
time.sleep(float(sys.argv[1]))
"""


def started(where: Path, seconds: float) -> tuple[subprocess.Popen[str], Path]:
    """A process that keeps an upload folder for so many seconds."""
    environment = {**os.environ, "TMPDIR": str(where)}
    process = subprocess.Popen(
        [sys.executable, "-c", OWN, str(seconds)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_the_folder_is_deleted_with_its_process(tmp_path: Path):
    process, folder = started(tmp_path, 0)
    assert folder.parent == tmp_path
    process.wait(30)
    assert not folder.exists()


def test_folders_of_killed_processes_are_deleted(tmp_path: Path):
    (killed, dead), (living, alive) = started(tmp_path, 60), started(tmp_path, 60)
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait(30)
        young, other = tmp_path / "spjax-uploads-young", tmp_path / "other"
        for folder in (dead, alive, young, other):
            folder.mkdir(exist_ok=True)
            age = 0 if folder is young else 100
            os.utime(folder, (time.time() - age,) * 2)
        (tmp_path / "spjax-uploads-link").symlink_to(other)
        upload_folder.delete_orphans(tmp_path)
        assert not dead.exists()
        assert alive.exists()
        assert young.exists(), "its process may be about to lock it"
        assert other.exists()
    finally:
        living.kill()
        living.wait(30)


def test_old_files_are_deleted(tmp_path: Path):
    ages = {"a/old.wav": 1900, "b/new.wav": 100, "tmpold": 1900, "tmpnew": 100}
    for name, age in ages.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"part of a file")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / "empty").mkdir()
    os.utime(tmp_path / "empty", (time.time() - 1900,) * 2)
    upload_folder.delete_old(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"a", "b", "b/new.wav", "tmpnew"}, "a folder goes when it was empty for as long"


@pytest.mark.parametrize(("size", "weight"), [(0, 16_384), (100, 16_384), (20_000, 20_000)])
def test_small_files_count_at_a_minimum(tmp_path: Path, size: int, weight: int):
    for n in range(3):
        (tmp_path / f"{n}").mkdir()
        (tmp_path / f"{n}" / "a.wav").write_bytes(bytes(size))
    assert upload_folder.used_bytes(tmp_path) == 3 * weight
