"""Encoders on disk: round trip bit for bit, and errors of invalid files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from spjax.io import StorageError, files, read_encoder, save_encoder
from tests.encoders.hubert_models import KINDS, TINY, weights


def edit(directory: Path, **changes) -> None:
    path = directory / "config.json"
    described = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in described.items() if value is not None}))


def rewrite(directory: Path, change) -> None:
    """Changes the tensor file and its hash, so that only the tensors are wrong."""
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
    edit(directory, hash=files.tree_hash(tensors))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_encoder(tmp_path / "h", TINY, weights(), "tiny")
    return tmp_path / "h"


def test_round_trip(tmp_path: Path):
    params, provenance = weights(), {"source": "mine", "hours": 960}
    identity = save_encoder(tmp_path / "deep" / "h", TINY, params, "tiny", provenance)
    config, read, info = read_encoder(tmp_path / "deep" / "h")
    assert config == TINY
    assert info == {"name": "tiny", "hash": identity, "parameters": TINY.num_params, "provenance": provenance}
    assert files.flatten(read).keys() == files.flatten(params).keys()
    for path, array in files.flatten(params).items():
        np.testing.assert_array_equal(files.flatten(read)[path], array)
    assert sorted(p.name for p in (tmp_path / "deep" / "h").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(tmp_path: Path, kind: str):
    """Fields at their default are left out, so that earlier releases read an encoder that they can compute."""
    config = dataclasses.replace(TINY, **KINDS[kind])
    save_encoder(tmp_path, config, weights(config), "tiny")
    assert read_encoder(tmp_path)[0] == config
    described = json.loads((tmp_path / "config.json").read_text())
    new = {name for name in KINDS[kind] if not name.startswith("conv_kernels") and not name.startswith("conv_str")}
    new = {name for name in new if getattr(config, name)}
    assert described["version"] == (3 if new else 2)
    assert described.keys() & {"pre_norm", "conv_layer_norm", "conv_bias", "position_norm", "buckets"} <= new
    edit(tmp_path, version=2)
    if new:
        with pytest.raises(StorageError, match="has unknown"):
            read_encoder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 9}, "version 9, but this spjax reads up to 3.*Update spjax"),
        ({"format": "spjax-unit-lm"}, "is a unit LM, not a"),
        ({"hash": "0" * 64}, "has the hash .*, but .* says 000"),
        ({"hash": None}, "lacks hash"),
        ({"name": None}, "lacks name"),
        ({"heads": None}, "lacks heads"),
        ({"heads": 5}, "not a multiple of heads 5"),
        ({"layers": True}, "layers is True"),
        ({"layers": 3}, "lacks layers/2/attn_norm/bias"),
        ({"conv_kernels": 10}, "conv_kernels is 10"),
        ({"conv_strides": [5, 2]}, "7 conv_kernels, but 2 conv_strides"),
        ({"position_width": 14}, r"position/kernel has shape \[12, 6, 24\], must be \[14, 6, 24\]"),
        ({"dropout": 0.1}, "unknown dropout"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(saved: Path, changes, message):
    edit(saved, **changes)
    with pytest.raises(StorageError, match=message) as raised:
        read_encoder(saved)
    assert str(saved) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers/1/query/bias"), "lacks layers/1/query/bias"),
        (lambda t: t.update(stray=np.ones(1, np.float32)), "has unexpected stray"),
        (lambda t: t.update({"norm/bias": t["norm/bias"].astype(np.float16)}), "norm/bias is float16, must be float32"),
        (lambda t: t["norm/bias"].fill(np.nan), "norm/bias holds NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved: Path, change, message):
    rewrite(saved, change)
    with pytest.raises(StorageError, match=message) as raised:
        read_encoder(saved)
    assert "model.safetensors" in str(raised.value)


def test_truncated_and_altered_files_are_refused(saved: Path):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(StorageError, match=r"model\.safetensors is truncated or damaged"):
        read_encoder(saved)
    flipped = bytearray(content)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(StorageError, match="one of the two was altered"):
        read_encoder(saved)
    with pytest.raises(StorageError, match="does not exist"):
        read_encoder(saved / "absent")


def test_invalid_encoders_are_not_saved(tmp_path: Path):
    short, broken = weights(), weights()
    del short["norm"]["bias"]
    broken["norm"]["bias"][0] = np.inf
    for params, name, message in (
        (short, "tiny", "lacks norm/bias"),
        (broken, "tiny", "norm/bias holds NaN or infinity"),
        (weights(), " ", "has the name ' ': give a name"),
    ):
        with pytest.raises(StorageError, match=message):
            save_encoder(tmp_path / "h", TINY, params, name)
    assert list(tmp_path.iterdir()) == []
