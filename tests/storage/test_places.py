"""Places: those of this machine stay what they were, those of buckets are told by their scheme; files appear whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from spjax.storage import files, places

PARTS = st.lists(
    st.from_regex(r"[\w=.:-]{1,8}", fullmatch=True).filter(lambda part: part not in (".", "..")), min_size=1
)


@given(PARTS)
def test_a_bucket_is_told_by_its_scheme_alone(parts: list[str]):
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


def test_places_here_ask_no_bucket():
    places.check_buckets(["runs/fsc", "/tmp", Path("a"), None, 3, ("gs://in/a/tuple",)])


@pytest.mark.parametrize("root", ["s3://bucket/run", "gs:///run", "hf://me/model"])
def test_other_schemes_are_refused(root: str):
    with pytest.raises(ValueError, match="is no bucket of Cloud Storage: give gs://BUCKET/PATH"):
        places.check_buckets([root])


def test_other_errors_pass_unchanged():
    with pytest.raises(KeyError), places.plainly():
        raise KeyError("mine")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
