"""Bundled assets: they match their cards, are small, and load by name wherever a path is accepted."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors

import spjax
from configs import fsc
from spjax.config import parse
from spjax.io import StorageError, assets, load_kmeans, read_unit_lm
from spjax.jobs.pretraining import make_absent_lm

TINY = Path(spjax.__file__).parent / "assets" / "tiny"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_tiny_matches_its_readme_and_cards():
    config, params, info = read_unit_lm("tiny")  # also compares tensors and hash
    kmeans = load_kmeans("tiny")
    readme = (TINY / "README.md").read_text(encoding="utf-8")
    assert info["hash"] in readme
    assert kmeans.hash in readme
    assert f"{info['parameters']:,} parameters" in readme
    assert info["parameters"] == config.num_params <= 4_000_000
    assert config.num_units == len(kmeans.centroids) == 100
    assert info["provenance"]["units"] == {
        "encoder": "mfcc", "layer": 0, "kmeans": kmeans.id, "merged": True, "vocabulary": 100,
    }  # fmt: skip
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    with safetensors.safe_open(TINY / "lm" / "model.safetensors", "np") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"BF16"}  # noqa: SIM118
    assert params["embed"].dtype == np.float32
    for path in files:
        if path.suffix != ".safetensors":
            assert not re.search(r"/(work|home|tmp|opt|root)\b", path.read_text(encoding="utf-8")), path


def test_tiny_loads_by_name():
    wave = np.random.default_rng(0).standard_normal(8000).astype(np.float32) / 10
    encoded = spjax.encode(wave, spjax.load_encoder("tiny"), rate=16_000)
    lm = spjax.load_unit_lm("tiny")
    logits = lm.logits(np.asarray([[2, *(encoded.units + 4)]]))
    assert logits.shape == (1, len(encoded.units) + 1, 104)
    assert np.isfinite(logits).all()
    for other in (spjax.load_encoder("tiny", "tiny"), spjax.load_encoder("mfcc", "tiny")):
        np.testing.assert_array_equal(spjax.encode(wave, other, rate=16_000).units, encoded.units)


def test_a_job_takes_its_lm_by_name(capsys: pytest.CaptureFixture[str]):
    config = fsc.get_config()
    config.lm = "tiny"
    parse(config)
    make_absent_lm(parse(config), None)
    assert config.lm == "tiny"  # the name in reports
    assert not capsys.readouterr().out
    config.lm = "tinny"
    with pytest.raises(FileNotFoundError, match=r"no unit LM at tinny: give --config.lm=DIR of one, or tiny"):
        make_absent_lm(parse(config), None)


@pytest.mark.parametrize(
    ("load", "what"),
    [
        (lambda: spjax.load_unit_lm("tinny"), "tinny.*or tiny"),
        (lambda: spjax.load_unit_lm("Tiny"), "Tiny.*or tiny"),
        (lambda: load_kmeans("tinny"), "tinny.*or tiny"),
        (lambda: spjax.load_encoder("tinny"), "'tinny' is neither.* tiny"),
        (lambda: spjax.load_encoder("mfcc", "tinny"), "tinny.*or tiny"),
        (lambda: spjax.load_encoder("log_mel", "tiny"), "was fitted on mfcc.*gives log_mel"),
        (lambda: spjax.load_encoder("tiny", "other"), "has its own k-means, which other is not.*the encoder mfcc"),
        (lambda: spjax.load_encoder("tiny", lowpass=4000), "was fitted on mfcc.*gives mfcc_lowpass_4000"),
    ],
)
def test_unknown_names_are_refused(load, what: str):
    with pytest.raises(ValueError, match=what):
        load()


def test_a_directory_of_the_same_name(elsewhere: Path):
    """A directory without an LM or k-means is ignored; one with either is ambiguous and refused."""
    (elsewhere / "tiny").mkdir()
    assert assets.find("tiny", "lm") == str(TINY / "lm")
    shutil.copytree(TINY / "lm", elsewhere / "tiny", dirs_exist_ok=True)
    with pytest.raises(StorageError, match=r"the directory tiny here holds a config.json too: write ./tiny"):
        spjax.load_unit_lm("tiny")
    card = json.loads((elsewhere / "tiny" / "config.json").read_text())
    assert spjax.load_unit_lm("./tiny").hash == card["hash"]
    assert assets.find("tiny", "kmeans") == str(TINY / "kmeans")
    with pytest.raises(StorageError, match=r"write ./tiny"):  # it might be a HuBERT
        spjax.load_encoder("tiny")
