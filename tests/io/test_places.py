"""Local and bucket paths: bucket paths are recognised by their scheme; files are written atomically."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from spjax import paths
from spjax.compilation_cache import keep_programs
from spjax.io import files, places

PARTS = st.lists(
    st.from_regex(r"[\w=.:-]{1,8}", fullmatch=True).filter(lambda part: part not in (".", "..")), min_size=1
)


@given(PARTS)
def test_a_bucket_is_recognised_by_its_scheme(parts: list[str]):
    path = "/".join(parts)
    assert places.is_remote(f"gs://{path}")
    assert places.is_remote(epath.Path(f"gs://{path}"))
    for here in (path, f"/{path}", f"gs:/{path}", f"name=gs://{path}", Path(path)):
        assert not places.is_remote(here)


@given(PARTS)
def test_absolute_places_stay(parts: list[str]):
    remote, here = "gs://" + "/".join(parts), "/".join(parts)
    assert places.absolute(remote) == remote
    assert os.fspath(places.at(remote)) == remote
    assert places.absolute(here) == os.path.abspath(here)
    assert places.absolute(places.absolute(here)) == places.absolute(here)
    assert isinstance(places.at(here), Path)


def test_local_paths_access_no_bucket():
    places.check_buckets(["runs/fsc", "/tmp", Path("a"), None, 3, ("gs://in/a/tuple",)])


@pytest.mark.parametrize("root", ["s3://bucket/run", "gs:///run", "hf://me/model"])
def test_other_schemes_are_refused(root: str):
    with pytest.raises(ValueError, match="is not a Cloud Storage bucket: give gs://BUCKET/PATH"):
        places.check_buckets([root])


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("runs/fsc", "runs/fsc"),
        ("/data/a b.wav", "/data/a b.wav"),
        ("gs://bucket/x", "gs://bucket/x"),
        ("a:b/c", "a:b/c"),
        ("12:30/x.wav", "12:30/x.wav"),
        ("name:/x", "name:/x"),
        ("file:///data/a%20b.wav", "/data/a b.wav"),
        ("file://localhost/data/x", "/data/x"),
        ("file:/data/x", "/data/x"),
        ("~", os.path.expanduser("~")),
        ("~/x", os.path.expanduser("~/x")),
    ],
)
def test_paths_are_normalised(text: str, path: str):
    assert paths.given(text) == path


def test_an_existing_file_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("C:\\x.wav", "~", "https:"):
        Path(name).touch()
        assert paths.given(name) == name
    with pytest.raises(ValueError, match="which is not supported"):
        paths.given("https://x")


@pytest.mark.parametrize("url", ["https://host/x", "s3://bucket/x", "HTTPS://host/x", "ftp://host/x", "file:///x"])
def test_python_functions_refuse_urls(url: str):
    """Every public function that takes a path refuses URLs with a message."""
    import spjax

    for call in (
        lambda: spjax.load_unit_lm(url),
        lambda: spjax.load_prompt(url),
        lambda: spjax.load_encoder(url),
        lambda: spjax.load_encoder("mfcc", url),
        lambda: spjax.encode(url, spjax.load_encoder("mfcc")),
        lambda: spjax.SpeechPrompt.load("lm", None, url),
        lambda: spjax.PromptPack.load(url),
    ):
        with pytest.raises(ValueError, match=r"address, which is not supported|is a URL: give the path /x"):
            call()


def test_a_file_cut_off_by_a_full_disk_is_named_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the system's error, the message names the requested path, not a temporary file."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / ".temporary"))

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda place: files.write_file(place, b"content"),
        lambda place: files.write_directory(place, {"card.json": files.json_writer({})}, "card.json"),
    ):
        with pytest.raises(OSError, match=rf"^{tmp_path}/out cannot be written \(No space left on device\): choose"):
            write(tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", ["file/out", "file/deep/down", "/proc/out"])
def test_unwritable_paths_are_named(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for write in (
        paths.to_write,
        lambda place: files.write_file(place, b"x"),
        lambda p: files.write_directory(p, {"x": Path.touch}, "x"),
    ):
        with pytest.raises(OSError, match=f"{place} cannot be written"):
            write(place)
    assert os.listdir(tmp_path) == ["file"]


def test_an_unwritable_compilation_cache_only_warns(tmp_path: Path):
    import jax

    before = jax.config.values["jax_compilation_cache_dir"]
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"compiled programs are not kept: .*/file/xla cannot be written"):
        keep_programs(tmp_path / "file" / "xla")
    assert jax.config.values["jax_compilation_cache_dir"] == before


def test_other_errors_pass_unchanged():
    with pytest.raises(KeyError), places.translate_bucket_errors():
        raise KeyError("mine")


def test_files_are_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "deep" / "down" / "file"
    files.write_file(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
        with pytest.raises(OSError, match="no room"):
            files.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]
    files.write_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_file_of_this_machine_is_not_copied(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"content")
    with places.local(tmp_path / "file") as here:
        assert here == tmp_path / "file"
    places.copy(tmp_path / "file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"content"


def test_a_full_disk_is_reported_with_the_path(tmp_path: Path):
    with (
        pytest.raises(OSError, match=r"^runs/x cannot be written \(No space left on device\): choose another place"),
        paths.writing("runs/x"),
        open("/dev/full", "w") as file,
    ):
        file.write("x")
    with pytest.raises(FileNotFoundError, match="absent"), paths.writing("runs/x"):
        (tmp_path / "absent").read_bytes()
