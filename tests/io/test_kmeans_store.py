"""K-means on disk: round trip bit for bit, and errors of invalid files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from spjax.io import KMeans, StorageError, files, load_kmeans, save_kmeans

CARD = {"encoder": "hubert_base_ls960", "layer": 6, "fitted_on": {"hours": 3.5}, "provenance": {"source": "km.bin"}}


def kmeans(seed=0, card=CARD):
    return KMeans(np.random.default_rng(seed).normal(size=(7, 5)).astype(np.float32), dict(card))


def edit(directory: Path, **changes) -> None:
    path = directory / "card.json"
    described = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in described.items() if value != "absent"}))


@pytest.mark.parametrize("card", [CARD, {"encoder": "mfcc"}, {"encoder": "mfcc", "layer": None}])
def test_round_trip(tmp_path: Path, card):
    saved = kmeans(card=card)
    identity = save_kmeans(tmp_path / "deep" / "km", saved)
    read = load_kmeans(tmp_path / "deep" / "km")
    np.testing.assert_array_equal(read.centroids, saved.centroids)
    assert read.card == {"layer": None, "fitted_on": {}, "provenance": {}, **card}
    assert identity == read.hash == saved.hash
    assert read.id == saved.id == identity[:12]
    assert sorted(p.name for p in (tmp_path / "deep" / "km").iterdir()) == ["card.json", "centroids.safetensors"]
    described = json.loads((tmp_path / "deep" / "km" / "card.json").read_text())
    assert (described["format"], described["version"]) == ("spjax-kmeans", 2)
    assert (described["clusters"], described["dim"], described["hash"]) == (7, 5, identity)


def test_the_id_depends_on_the_centroids():
    assert kmeans(0).id == kmeans(0, {"encoder": "mfcc"}).id != kmeans(1).id
    assert kmeans(0).hash == files.tree_hash({"centroids": kmeans(0).centroids})


@pytest.mark.parametrize(
    "centroids", [np.zeros(3, np.float32), np.zeros((0, 3), np.float32), np.zeros((2, 3)), [[1.0]]]
)
def test_invalid_centroids_are_refused(centroids):
    with pytest.raises(ValueError, match=r"must be float32 \[C, D\]"):
        KMeans(centroids, CARD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 9}, "version 9, but this spjax reads up to 2.*Update spjax"),
        ({"format": "spjax-unit-lm"}, "is a unit LM, not a"),
        ({"hash": "0" * 64}, "has the hash .*, but .* says '000"),
        ({"hash": "absent"}, "lacks hash"),
        ({"encoder": "absent"}, "lacks encoder"),
        ({"encoder": ""}, "encoder is ''"),
        ({"layer": "6"}, "layer is '6'"),
        ({"layer": True}, "layer is True"),
        ({"clusters": 8}, r"centroids has shape \[7, 5\], must be \[8, 5\]"),
        ({"dim": 5.0}, "must be positive numbers"),
        ({"fitted_on": "gsc"}, "fitted_on is 'gsc', must be an object"),
        ({"whitened": True}, "unknown whitened"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(tmp_path: Path, changes, message):
    save_kmeans(tmp_path / "km", kmeans())
    edit(tmp_path / "km", **changes)
    with pytest.raises(StorageError, match=message) as raised:
        load_kmeans(tmp_path / "km")
    assert str(tmp_path / "km") in str(raised.value)


def test_truncated_and_altered_files_are_refused(tmp_path: Path):
    save_kmeans(tmp_path / "km", kmeans())
    path = tmp_path / "km" / "centroids.safetensors"
    content = path.read_bytes()
    for length in (0, 5, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(StorageError, match=r"centroids\.safetensors is truncated or damaged"):
            load_kmeans(tmp_path / "km")
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StorageError, match="one of the two was altered"):
        load_kmeans(tmp_path / "km")
    safetensors.numpy.save_file({"centers": kmeans().centroids}, path)
    with pytest.raises(StorageError, match="lacks centroids and has unexpected centers"):
        load_kmeans(tmp_path / "km")
    path.unlink()
    with pytest.raises(StorageError, match=r"centroids\.safetensors does not exist"):
        load_kmeans(tmp_path / "km")
    with pytest.raises(StorageError, match="does not exist"):
        load_kmeans(tmp_path / "absent")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({}, "encoder is None"),
        ({"encoder": "hubert", "layer": 0}, "layer is 0"),
        ({"encoder": "hubert", "layers": 6}, "unknown layers"),
        ({"encoder": "hubert", "provenance": ["km.bin"]}, "provenance is"),
        ({"encoder": "hubert", "fitted_on": {"loss": float("nan")}}, "JSON"),
    ],
)
def test_invalid_k_means_are_not_saved(tmp_path: Path, card, message):
    with pytest.raises(StorageError, match=message):
        save_kmeans(tmp_path / "km", kmeans(card=card))
    broken = kmeans()
    broken.centroids[2, 2] = np.inf
    with pytest.raises(StorageError, match="centroids holds NaN or infinity"):
        save_kmeans(tmp_path / "km", broken)
    assert list(tmp_path.iterdir()) == []


def test_saving_replaces_the_earlier_one(tmp_path: Path):
    save_kmeans(tmp_path / "km", kmeans(0))
    save_kmeans(tmp_path / "km", kmeans(1))
    assert load_kmeans(tmp_path / "km").id == kmeans(1).id
    (tmp_path / "km" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"holds notes\.txt, which saving there would delete"):
        save_kmeans(tmp_path / "km", kmeans(2))


def test_permissions_follow_the_umask(tmp_path: Path):
    before = os.umask(0o022)
    try:
        save_kmeans(tmp_path / "km", kmeans())
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "km").iterdir()} == {0o644}
