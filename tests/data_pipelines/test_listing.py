"""Listing of recordings: found, skipped and counted, and refused files."""

from __future__ import annotations

import os
import socket
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines import data_flags, extract, listing
from data_pipelines.listing import copies, list_recordings
from data_pipelines.manifests import read_folders
from data_pipelines.splits import BuildError
from spjax.encoders.audio import SUFFIXES
from tests.data_pipelines.builders.raw_trees import counts, distinct, everything, record, shared, sound


def classes(root: Path, count: int = 10, labels: tuple[str, ...] = ("no", "yes")) -> None:
    distinct(root, [f"{label}/{number}.wav" for label in labels for number in range(count)])


def test_audio_files_are_listed_in_order(tmp_path: Path):
    for name in ("b/2.WAV", "b/10.wav", "a.flac", ".hidden/x.wav", "b/._2.wav", "b/notes.txt", "c_wav/deep/er/č.wav"):
        path = tmp_path / unicodedata.normalize("NFD", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    found = listing.audio_files(tmp_path)
    assert list(found) == ["a.flac", "b/10.wav", "b/2.WAV", "c_wav/deep/er/č.wav"]  # the link leads to b
    assert all((tmp_path / path).is_file() for path in found.values())
    assert list(listing.audio_files(tmp_path, "b", suffixes=(".wav",))) == ["b/10.wav", "b/2.WAV"]
    assert listing.audio_files(tmp_path, "none", optional=True) == {}
    with pytest.raises(BuildError, match="none is not a folder"):
        listing.audio_files(tmp_path, "none")
    with pytest.raises(BuildError, match=r"b holds no audio \(.ogg\)"):
        listing.audio_files(tmp_path, "b", suffixes=(".ogg",))
    (tmp_path / "c_wav" / "deep" / "er" / "č.wav").write_bytes(b"")
    with pytest.raises(BuildError, match="exists twice"):
        listing.audio_files(tmp_path)


def test_every_supported_format_is_a_recording(tmp_path: Path):
    classes(tmp_path, 3)
    distinct(tmp_path, [f"stop/x{ending}" for ending in SUFFIXES] + ["stop/upper.WebM", "stop/dir.wav/deep.wav"])
    data = read_folders(tmp_path)
    assert data.task.slots[0].labels == ("no", "stop", "yes")
    assert len(everything(data.splits)) == 6 + len(SUFFIXES) + 2
    assert data.notes == ()


def test_skipped_files_are_counted_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    classes(tmp_path)
    distinct(
        tmp_path, ["no/a.txt", "no/b.TXT", "yes/sub/c.txt", "no/meta.json", "no/README", ".git/x.wav", "no/.x.wav"]
    )
    distinct(tmp_path, ["yes/1.wav.bak"])
    for name in ("no/a.txt", "no/b.TXT", "yes/sub/c.txt", "no/meta.json", "no/README"):
        (tmp_path / name).write_text("x")
    (tmp_path / "no" / "gone.txt").symlink_to("nowhere")
    parser = extract.argparse.ArgumentParser()
    data_flags.add_data_flags(parser)
    data = data_flags.chosen(parser.parse_args([f"--folders={tmp_path}"]))
    passed, misnamed = data.notes
    assert set(passed.removeprefix("skipped ").split(", ")) == {
        "3 .txt", "2 hidden", "1 .json", "1 without ending", "1 .bak", "1 dangling link"
    }  # fmt: skip
    assert passed.startswith("skipped 3 .txt, 2 hidden, 1 ")
    assert misnamed.startswith("skipped files with audio content: 1, the first yes/1.wav.bak; to include")
    errors = capsys.readouterr().err
    assert all(f"note: {note}" in errors for note in data.notes)


def test_many_extensions_are_summarised(tmp_path: Path):
    classes(tmp_path)
    for number in range(20):
        (tmp_path / "no" / f"x.{number}").write_text("x")
    (note,) = read_folders(tmp_path).notes
    assert note.endswith(", 12 others")


def _texts_only(root: Path) -> None:
    (root / "stop").mkdir()
    (root / "stop" / "a.txt").write_text("x")


def _misnamed(root: Path) -> None:
    distinct(root, ["stop/1.wave_file", "stop/2"])


def _link_to_a_class(root: Path) -> None:
    (root / "stop").symlink_to("no")


def _pipe(root: Path) -> None:
    os.mkfifo(root / "no" / "x.wav")


def _socket(root: Path) -> None:
    here = os.getcwd()
    os.chdir(root / "no")  # paths of sockets must be short
    try:
        socket.socket(socket.AF_UNIX).bind("x.wav")
    finally:
        os.chdir(here)


def _not_text(root: Path) -> None:
    open(os.fsencode(root / "no") + b"/\xff.wav", "wb").close()


def _outside(root: Path) -> None:
    distinct(root, ["loose.wav"])


def _empty_split(root: Path) -> None:
    distinct(root, [f"train/{label}/{n}.wav" for label in ("no", "yes") for n in range(3)])
    (root / "test").mkdir()
    for label in ("no", "yes"):
        for file in (root / label).iterdir():
            file.unlink()
        (root / label).rmdir()


@pytest.mark.parametrize(
    ("plant", "fault"),
    [
        (lambda root: (root / "stop").mkdir(), r"/stop holds no recording: put recordings there .* or move it out"),
        (_texts_only, r"/stop holds no recording \(skipped 1 .txt\)"),
        (_misnamed, r"/stop holds no recording .*audio content: 2, the first stop/1.wave_file; to include"),
        (_link_to_a_class, r"/stop holds no recording \(skipped 1 links to folders read elsewhere\)"),
        (_pipe, r"no/x.wav is a pipe, socket or device: replace it by a file, or remove it"),
        (_socket, r"no/x.wav is a pipe, socket or device: replace it by a file, or remove it"),
        (lambda root: (root / "no" / "x.wav").symlink_to("/dev/zero"), r"no/x.wav is a pipe, socket or device"),
        (lambda root: (root / "no" / "x.wav").symlink_to("nowhere"), r"no/x.wav is a dangling link"),
        (lambda root: (root / "no" / "x.wav").symlink_to("x.wav"), r"no/x.wav is a dangling link"),
        (lambda root: (root / "stop").symlink_to("nowhere"), r"/stop is a dangling link: replace it by a file"),
        (
            lambda root: distinct(root, [" /1.wav"]),
            r"the folder of ' /1.wav' has a blank name",
        ),
        (_not_text, r"the name '.*no/\\udcff.wav' has a control character or is not UTF-8: rename it"),
        (lambda root: distinct(root, ["no/a\nb.wav"]), r"the name '.*no/a\\nb.wav' has a control character"),
        (_outside, r"loose.wav is not in the folder of a class"),
        (_empty_split, r"/test holds no recording"),
    ],
)
def test_ambiguous_entries_are_refused(tmp_path: Path, plant: Callable[[Path], None], fault: str):
    classes(tmp_path)
    plant(tmp_path)
    with pytest.raises(BuildError, match=fault):
        read_folders(tmp_path)


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    classes(tmp_path)
    scan = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("/no"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(listing.os, "scandir", refuse)
    with pytest.raises(BuildError, match=r"/no cannot be read \(Permission denied\): change its permissions"):
        read_folders(tmp_path)


def test_links_to_folders_are_followed_once(tmp_path: Path):
    """In any order of names: folders are listed under their real path, and cycles and links to parents are skipped."""
    root, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    classes(root)
    distinct(elsewhere, ["inner/a.wav", "b.wav"])
    distinct(tmp_path, ["outside.wav"])
    for name, target in [
        ("0up", ".."),
        ("0top", "../.."),
        ("0self", "."),
        ("0yes", "../yes"),
        ("0self_link", "0self_link"),
    ]:
        (root / "no" / name).symlink_to(target)
    for name in ("from", "again"):
        (root / "no" / name).symlink_to(elsewhere)
    (root / "yes" / "part").symlink_to(elsewhere / "inner")
    found = list_recordings(root)
    assert [path for path in found.files if path.count("/") > 1] == ["no/again/b.wav", "no/again/inner/a.wav"]
    assert len(found.files) == 22
    assert found.passed == {"links to folders read elsewhere": 6, "dangling link": 1}


def test_a_class_may_be_a_link(tmp_path: Path):
    classes(tmp_path / "disk")
    (tmp_path / "data").mkdir()
    for label in ("no", "yes"):
        (tmp_path / "data" / label).symlink_to(tmp_path / "disk" / label)
    assert counts(read_folders(tmp_path / "data").splits) == (16, 2, 2)


def test_copies_are_found_by_size_sample_and_hash(tmp_path: Path):
    middle = b"x" * 100_000
    contents = {
        "a": b"1" + middle, "b": b"1" + middle, "c": b"2" + middle, "d": b"3" + middle[:-1],
        "e": middle + b"1", "f": b"", "g": b"", "h": b"2" + middle,
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert copies(tmp_path, [*contents, "missing"]) == {"a": "a", "b": "a", "c": "c", "h": "c"}


def test_copies_stay_in_one_split_and_are_reported(tmp_path: Path):
    classes(tmp_path, 30)
    for number in range(5):
        record(tmp_path, [f"yes/{number}.wav", f"yes/copy{number}.wav"], contents=sound() + b"same%d" % number)
    os.link(tmp_path / "no" / "7.wav", tmp_path / "no" / "hard.wav")
    (tmp_path / "no" / "soft.wav").symlink_to("8.wav")
    for seed in range(5):
        data = read_folders(tmp_path, seed=seed)
        split_of = {clip.path: split for split, part in data.splits.items() for clip in part}
        assert all(split_of[f"yes/{n}.wav"] == split_of[f"yes/copy{n}.wav"] for n in range(5))
        assert split_of["no/hard.wav"] == split_of["no/7.wav"]
        assert split_of["no/soft.wav"] == split_of["no/8.wav"]
        assert data.notes == ("files that hold the same bytes as another: 7, the first no/hard.wav as no/7.wav",)
        assert not shared(data.splits, "source")


def test_copies_in_two_splits_or_with_two_labels(tmp_path: Path):
    distinct(tmp_path, [f"{split}/{label}/{n}.wav" for split in ("train", "test") for label in "ab" for n in range(9)])
    record(tmp_path, ["train/a/3.wav", "test/a/x.wav", "test/b/y.wav"])
    _, crossing, torn = read_folders(tmp_path).notes
    assert crossing.startswith("recordings that are in two splits, as copies: 1, the first ")
    assert "train/a/3.wav" in crossing
    assert torn.startswith("recordings whose copies have different labels: 1, the first ")
    assert "test/b/y.wav (b)" in torn


def test_labels_missing_in_a_split(tmp_path: Path):
    distinct(tmp_path, [f"{name}.wav" for name in ("train/a/0", "train/b/1", "train/c/2", "valid/a/3", "test/b/4")])
    assert read_folders(tmp_path).notes == (
        "valid lacks 2 of 3 labels of label, the first 'b'",
        "test lacks 2 of 3 labels of label, the first 'a'",
    )


def test_labels_that_look_alike(tmp_path: Path):
    classes(tmp_path, 4, ("yes", "Yes", "no", "1", "1.0"))
    (note,) = read_folders(tmp_path).notes
    assert note == ("labels of label: '1' and '1.0' look almost alike and are treated as different (2 such pairs)")
