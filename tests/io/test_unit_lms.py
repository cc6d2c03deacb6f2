"""Unit LMs on disk: round trip bit for bit, and errors of invalid files."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spjax.io import (
    StorageError,
    atomic,
    check_pack,
    files,
    load_pack,
    make_card,
    read_unit_lm,
    save_pack,
    save_unit_lm,
    unit_lm_hash,
)
from spjax.io.refresh import refresh
from spjax.io.unit_lms import FREE
from spjax.models import unit_lm
from spjax.models.config import ProsodyConfig, UnitLMConfig
from spjax.tasks import Slot, Task

CONFIG = UnitLMConfig(vocab_size=20, dim=8, layers=2, heads=2, ffn_dim=12)
STREAMS = dataclasses.replace(CONFIG, prosody=ProsodyConfig(max_duration=5, f0_edges=(-0.25, 0.0, 1 / 3)))
CONTINUOUS = dataclasses.replace(CONFIG, prosody=ProsodyConfig(discrete=False, f0_input=False))


def weights(seed=0, config=CONFIG):
    rng = np.random.default_rng(seed)
    return files.unflatten({path: rng.normal(size=shape).astype(np.float32) for path, shape in config.shapes.items()})


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


def test_round_trip(tmp_path: Path):
    params = weights()
    provenance = {"source": "mine", "valid_perplexity": 4.5, "trained_on": ["fsc", "gsc"]}
    identity = save_unit_lm(tmp_path / "deep" / "lm", CONFIG, params, provenance)
    config, read, info = read_unit_lm(tmp_path / "deep" / "lm")
    assert config == CONFIG
    assert info == {"hash": identity, "parameters": CONFIG.num_params, "provenance": provenance}
    assert identity == unit_lm_hash(params) == unit_lm_hash(read)
    for path, array in files.flatten(params).items():
        np.testing.assert_array_equal(files.flatten(read)[path], array)
    assert sorted(p.name for p in (tmp_path / "deep" / "lm").iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["lm"]


@pytest.mark.parametrize("config", [CONFIG, STREAMS, CONTINUOUS])
def test_the_stored_tree_matches_the_model(tmp_path: Path, config):
    import jax
    import jax.numpy as jnp

    made = jax.eval_shape(lambda key: unit_lm.init(key, config), jax.random.key(0))
    params = jax.tree.map(jnp.asarray, weights(config=config))
    save_unit_lm(tmp_path / "lm", config, params)
    _, read, info = read_unit_lm(tmp_path / "lm")
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), read) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), made
    )
    assert info["hash"] == unit_lm_hash(params, config.prosody)
    assert info["provenance"] == {}


def test_full_size_counts():
    assert sum(np.prod(shape) for shape in UnitLMConfig().shapes.values()) == 151_263_232


@pytest.mark.parametrize("config", [CONFIG, STREAMS], ids=["units", "streams"])
def test_bfloat16_weights_are_rounded_once(tmp_path: Path, config):
    """The file halves; the hash is that of the weights read as float32; rounded weights are stored bit for bit."""
    identity = save_unit_lm(tmp_path / "lm", config, weights(config=config), bfloat16=True)
    found, read, info = read_unit_lm(tmp_path / "lm")
    assert found == config
    assert info["hash"] == identity == unit_lm_hash(read, config.prosody)  # `unit_lm_hash` accepts float32 only
    for path, array in files.flatten(weights(config=config)).items():
        np.testing.assert_array_equal(files.flatten(read)[path], array.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert save_unit_lm(tmp_path / "again", config, read, bfloat16=True) == identity
    assert save_unit_lm(tmp_path / "wide", config, read) == identity
    stored = safetensors.numpy.load_file(tmp_path / "lm" / "model.safetensors")
    assert {array.dtype.name for array in stored.values()} == {"bfloat16"}
    before = (tmp_path / "lm" / "config.json").read_text()
    refresh(tmp_path / "lm")
    assert (tmp_path / "lm" / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "unknown dtype"),
        ({"dtype": None}, "lacks dtype"),
        ({"dtype": "float32"}, "dtype is 'float32', must be bfloat16"),
        ({"dtype": ["bfloat16"]}, "dtype is .*, must be bfloat16"),
        ({"hash": "0" * 64}, "has the hash .*, but .* says 000"),
    ],
)
def test_a_config_in_bfloat16_that_does_not_fit_is_refused(tmp_path: Path, changes, message):
    save_unit_lm(tmp_path / "lm", CONFIG, weights(), bfloat16=True)
    edit(tmp_path / "lm", **changes)
    with pytest.raises(StorageError, match=message):
        read_unit_lm(tmp_path / "lm")


def test_tensors_of_another_type_than_the_config_says(tmp_path: Path):
    for name, bfloat16 in (("half", True), ("whole", False)):
        save_unit_lm(tmp_path / name, CONFIG, weights(), bfloat16=bfloat16)
    tensors = [tmp_path / name / "model.safetensors" for name in ("half", "whole")]
    contents = [path.read_bytes() for path in tensors]
    for path, content, message in zip(
        tensors, reversed(contents), ("float32, must be bf", "bfloat16, must be f"), strict=True
    ):
        path.write_bytes(content)
        with pytest.raises(StorageError, match=message):
            read_unit_lm(path.parent)


def test_the_hash_covers_names_shapes_and_bits():
    base = {"a": np.zeros((2, 3), np.float32), "b": {"c": np.ones(2, np.float32)}}
    variants = [
        base,
        {"a": np.zeros((3, 2), np.float32), "b": {"c": np.ones(2, np.float32)}},
        {"a": np.zeros((2, 3), np.float32), "b": {"d": np.ones(2, np.float32)}},
        {"a": -np.zeros((2, 3), np.float32), "b": {"c": np.ones(2, np.float32)}},
    ]
    assert len({unit_lm_hash(tree) for tree in variants}) == 4
    turned = {"b": base["b"], "a": np.asfortranarray(base["a"])}
    assert unit_lm_hash(turned) == unit_lm_hash(base)
    with pytest.raises(StorageError, match="a is float16"):
        unit_lm_hash({"a": np.zeros(2, np.float16)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 9}, "version 9, but this spjax reads up to 5.*Update spjax"),
        ({"version": 2}, "lacks prosody"),
        ({"prosody": dataclasses.asdict(ProsodyConfig())}, "lacks heads/duration"),
        ({"version": "1"}, "version '1'"),
        ({"format": "other"}, "format 'other'"),
        ({"hash": "0" * 64}, "has the hash .*, but .* says 000"),
        ({"hash": None}, "lacks hash"),
        ({"heads": None}, "lacks heads"),
        ({"heads": 3}, "not a multiple of heads 3"),
        ({"layers": True}, "not all whole numbers"),
        ({"layers": 3}, r"has shape \[2, .*must be \[3, "),
        ({"vocab_size": 104}, r"embed has shape \[20, 8\], must be \[104, 8\]"),
        ({"dropout": 0.1}, "unknown dropout"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, changes, message):
    save_unit_lm(tmp_path / "lm", CONFIG, weights())
    edit(tmp_path / "lm", **changes)
    with pytest.raises(StorageError, match=message) as raised:
        read_unit_lm(tmp_path / "lm")
    assert str(tmp_path / "lm") in str(raised.value)


def test_the_format_and_that_of_older_releases(tmp_path: Path, caplog):
    """The format is these exact bytes; that of an older release loads with a warning and is refreshed to the same."""
    params = files.unflatten({path: np.ones(shape, np.float32) for path, shape in CONFIG.shapes.items()})
    save_unit_lm(tmp_path / "lm", CONFIG, params, {"source": "mine"})
    written = """{
  "format": "spjax-unit-lm",
  "version": 3,
  "vocab_size": 20,
  "dim": 8,
  "layers": 2,
  "heads": 2,
  "ffn_dim": 12,
  "hash": "3f93d317dc8205cdcb552a8723962cd9d5e464bf9a6e438b68b0f3ab8cfb474c",
  "parameters": 1240,
  "provenance": {
    "source": "mine"
  },
  "card_hash": "SEAL"
}
"""
    file = tmp_path / "lm" / "config.json"
    seal = json.loads(file.read_text())["card_hash"]
    assert file.read_text() == written.replace("SEAL", seal)
    assert read_unit_lm(tmp_path / "lm")[0].prosody is None
    assert not caplog.records
    file.write_text(written.replace('"version": 3', '"version": 1').replace(',\n  "card_hash": "SEAL"', ""))
    for _ in range(2):
        assert read_unit_lm(tmp_path / "lm")[0] == CONFIG
    (note,) = caplog.messages
    assert f"spjax.packs refresh {tmp_path / 'lm'}" in note
    refresh(tmp_path / "lm")
    assert file.read_text() == written.replace("SEAL", seal)


# ---- multi-stream LMs


finite = st.floats(-3, 3, allow_nan=False).map(lambda number: number + 0.0)  # no -0.0, which equals 0.0


@st.composite
def prosodies(draw):
    discrete = draw(st.booleans())
    edges = tuple(sorted(draw(st.lists(finite, max_size=4)))) if discrete else ()
    return ProsodyConfig(discrete, draw(st.booleans()), draw(st.booleans()), draw(st.integers(1, 30)), edges)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prosody=prosodies())
def test_streams_round_trip(tmp_path: Path, prosody):
    config = dataclasses.replace(CONFIG, prosody=prosody)
    params = weights(config=config)
    identity = save_unit_lm(tmp_path / "lm", config, params)
    found, read, info = read_unit_lm(tmp_path / "lm")
    assert found == config  # edges bit for bit
    assert info["hash"] == identity == unit_lm_hash(read, prosody)
    leaves = files.flatten(read)
    assert info["parameters"] == sum(array.size for array in leaves.values())
    for path, array in files.flatten(params).items():
        np.testing.assert_array_equal(leaves[path], array)
    described = json.loads((tmp_path / "lm" / "config.json").read_text())
    assert (described["version"], described["prosody"]["f0_edges"]) == (3, list(prosody.f0_edges))


@given(one=prosodies(), other=prosodies())
def test_the_hash_covers_prosody(one, other):
    params = {"a": np.zeros(2, np.float32)}
    assert (unit_lm_hash(params, one) == unit_lm_hash(params, other)) == (one == other)
    assert unit_lm_hash(params, one) != unit_lm_hash(params)


def test_the_hash_covers_edges_and_flags():
    params, prosody = weights(config=STREAMS), STREAMS.prosody
    changes = [
        {},
        {"duration_input": False},
        {"f0_input": False},
        {"max_duration": 6},
        {"f0_edges": (-0.25, 0.0, np.nextafter(1 / 3, 1))},
    ]
    assert len({unit_lm_hash(params, dataclasses.replace(prosody, **change)) for change in changes}) == len(changes)


def test_prosody_fields_of_later_releases_may_be_absent(tmp_path: Path):
    """Missing fields have default values, which the hash leaves out."""
    plain = dataclasses.replace(STREAMS, prosody=ProsodyConfig(f0_edges=STREAMS.prosody.f0_edges))
    save_unit_lm(tmp_path / "lm", plain, weights(config=plain))
    described = json.loads((tmp_path / "lm" / "config.json").read_text())
    prosody = {name: described["prosody"][name] for name in ("discrete", "f0_edges")}
    edit(tmp_path / "lm", prosody=prosody, card_hash=files.seal({**described, "prosody": prosody}, FREE))
    config, _, info = read_unit_lm(tmp_path / "lm")
    assert config == plain
    assert info["hash"] == described["hash"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "has unknown card_hash, prosody"),
        ({"prosody": None}, "has unexpected heads/duration"),
        ({"prosody": [1]}, r"prosody is \[1\], may have discrete, duration_input, f0_edges"),
        ({"discrete": 1}, "discrete is 1, must be true or false"),
        ({"discrete": False}, "continuous LM must have no f0_edges"),
        ({"f0_input": None}, "f0_input is None"),
        ({"max_duration": 0}, "max_duration is 0"),
        ({"max_duration": True}, "max_duration is True"),
        ({"max_duration": 6}, r"has shape \[10, 8\], must be \[11, 8\]"),
        ({"f0_edges": "0.5"}, "f0_edges as a list"),
        ({"f0_edges": [0.1, "0.2", 0.3]}, "finite numbers"),
        ({"f0_edges": [0.1, float("nan"), 0.3]}, "holds NaN, which is not valid JSON"),
        ({"f0_edges": [0.1, 10**400, 0.3]}, "finite numbers"),
        ({"f0_edges": [0.3, 0.2, 0.4]}, "must be ascending"),
        ({"f0_edges": [0.3, 0.4]}, r"has shape \[8, 8\], must be \[7, 8\]"),
        ({"f0_edges": [-0.25, 0.0, 0.4]}, "has the hash"),
        ({"duration_input": False}, "has the hash"),
        ({"frames": 50}, "prosody is .*, may have"),
    ],
)
def test_prosody_that_does_not_fit_is_refused(tmp_path: Path, changes, message):
    save_unit_lm(tmp_path / "lm", STREAMS, weights(config=STREAMS))
    if not changes.keys() & {"version", "prosody"}:
        changes = {"prosody": {**dataclasses.asdict(STREAMS.prosody), **changes}}
    edit(tmp_path / "lm", **changes)
    with pytest.raises(StorageError, match=message) as raised:
        read_unit_lm(tmp_path / "lm")
    assert str(tmp_path / "lm") in str(raised.value)


def test_streams_of_another_kind_are_refused(tmp_path: Path):
    with pytest.raises(StorageError, match=r"lacks streams/duration/bias, streams/duration/kernel"):
        save_unit_lm(tmp_path / "lm", CONTINUOUS, weights(config=STREAMS))
    with pytest.raises(StorageError, match=r"has unexpected heads/duration"):
        save_unit_lm(tmp_path / "lm", CONFIG, weights(config=STREAMS))


def test_a_prompt_is_bound_to_prosody_too(tmp_path: Path):
    params, task = weights(config=STREAMS), Task("toy", (Slot("word", ("yes", "no")),), "accuracy")
    codes = [[4], [5]]
    identity = save_unit_lm(tmp_path / "lm", STREAMS, params)
    card = make_card(task, kind="random", codes=codes, feeds=codes, outputs=20, config=STREAMS, lm_hash=identity)
    assert set(card["lm"]) == {"hash", "vocab_size", "dim", "layers", "heads", "ffn_dim"}
    prompt = {"key": np.zeros((2, 3, 8), np.float32), "value": np.zeros((2, 3, 8), np.float32)}
    save_pack(tmp_path / "pack", {**prompt, "sep": np.zeros((1, 8), np.float32)}, card)
    pack = load_pack(tmp_path / "pack")
    check_pack(pack, identity, STREAMS)
    deaf = dataclasses.replace(STREAMS.prosody, f0_input=False)
    with pytest.raises(StorageError, match="was trained with the unit LM of hash"):
        check_pack(pack, unit_lm_hash(params, deaf), dataclasses.replace(STREAMS, prosody=deaf))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers/query/bias"), "lacks layers/query/bias"),
        (lambda t: t.update(stray=np.ones(1, np.float32)), "has unexpected stray"),
        (lambda t: t.update(embed=t["embed"].astype(np.float16)), "embed is float16, must be float32"),
        (lambda t: t.update(embed=t["embed"][:-1]), r"embed has shape \[19, 8\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change, message):
    save_unit_lm(tmp_path / "lm", CONFIG, weights())
    rewrite(tmp_path / "lm", change)
    with pytest.raises(StorageError, match=message) as raised:
        read_unit_lm(tmp_path / "lm")
    assert "model.safetensors" in str(raised.value)


def test_truncated_and_altered_files_are_refused(tmp_path: Path):
    save_unit_lm(tmp_path / "lm", CONFIG, weights())
    path = tmp_path / "lm" / "model.safetensors"
    content = path.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(StorageError, match=r"model\.safetensors is truncated or damaged"):
            read_unit_lm(tmp_path / "lm")
    flipped = bytearray(content)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(StorageError, match="one of the two was altered"):
        read_unit_lm(tmp_path / "lm")
    path.unlink()
    with pytest.raises(StorageError, match=r"model\.safetensors does not exist"):
        read_unit_lm(tmp_path / "lm")
    (tmp_path / "lm" / "config.json").write_text("{")
    with pytest.raises(StorageError, match="is not valid JSON"):
        read_unit_lm(tmp_path / "lm")
    with pytest.raises(StorageError, match="does not exist"):
        read_unit_lm(tmp_path / "absent")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinite_weights_are_refused(tmp_path: Path, value):
    broken = weights()
    broken["final_norm"]["bias"][0] = value
    with pytest.raises(StorageError, match="final_norm/bias holds NaN or infinity"):
        save_unit_lm(tmp_path / "lm", CONFIG, broken)
    save_unit_lm(tmp_path / "lm", CONFIG, weights())
    rewrite(tmp_path / "lm", lambda tensors: tensors["final_norm/bias"].fill(value))
    with pytest.raises(StorageError, match=r"model\.safetensors: final_norm/bias holds NaN or infinity"):
        read_unit_lm(tmp_path / "lm")


def test_invalid_unit_lms_are_not_saved(tmp_path: Path):
    short = weights()
    del short["final_norm"]["bias"]
    with pytest.raises(StorageError, match="lacks final_norm/bias"):
        save_unit_lm(tmp_path / "lm", CONFIG, short)
    with pytest.raises(StorageError, match="JSON"):
        save_unit_lm(tmp_path / "lm", CONFIG, weights(), {"perplexity": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_saving_replaces_the_earlier_one(tmp_path: Path):
    save_unit_lm(tmp_path / "lm", CONFIG, weights(0))
    identity = save_unit_lm(tmp_path / "lm", CONFIG, weights(1))
    assert read_unit_lm(tmp_path / "lm")[2]["hash"] == identity
    assert [p.name for p in tmp_path.iterdir()] == ["lm"]
    (tmp_path / "lm" / "events.log").write_text("mine")
    with pytest.raises(StorageError, match=r"holds events\.log, which saving there would delete"):
        save_unit_lm(tmp_path / "lm", CONFIG, weights(2))
    assert (tmp_path / "lm" / "events.log").read_text() == "mine"


def _killed_at(step: int, calls: tuple[str, ...], monkeypatch):
    """Makes the n-th of the calls of a save fail, as a full disk or a signal would."""
    count = iter(range(1000))

    def failing(name, original):
        def run(*args, **kwargs):
            if next(count) == step:
                raise OSError(f"{name} failed")
            return original(*args, **kwargs)

        return run

    monkeypatch.setattr(atomic, "fsync", failing("fsync", atomic.fsync))
    monkeypatch.setattr(Path, "rename", failing("rename", Path.rename))
    monkeypatch.setattr(Path, "mkdir", failing("mkdir", Path.mkdir))


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("earlier", [False, True])
def test_a_failing_save_leaves_the_earlier_one_or_nothing(tmp_path: Path, step, earlier, monkeypatch):
    old, new = unit_lm_hash(weights(0)), unit_lm_hash(weights(1))
    if earlier:
        save_unit_lm(tmp_path / "lm", CONFIG, weights(0))
    with monkeypatch.context() as patch:
        _killed_at(step, ("fsync", "rename", "mkdir"), patch)
        try:
            save_unit_lm(tmp_path / "lm", CONFIG, weights(1))
            done = True
        except OSError:
            done = False
    if (tmp_path / "lm").exists():  # complete: the old or the new one
        assert read_unit_lm(tmp_path / "lm")[2]["hash"] in ({old, new} if earlier else {new})
    else:
        assert not earlier
    if done:
        assert read_unit_lm(tmp_path / "lm")[2]["hash"] == new
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_a_kill_between_the_renames_can_be_undone(tmp_path: Path):
    """After SIGKILL between the two renames, the error says where the earlier LM is."""
    save_unit_lm(tmp_path / "lm", CONFIG, weights(0))
    program = f"""
import os, signal, sys
from pathlib import Path
from spjax.io import files
rename = Path.rename
def die(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = die
files.write_directory({str(tmp_path / "lm")!r}, {{"config.json": lambda p: p.write_text("x"),
                                                 "model.safetensors": lambda p: p.write_text("x")}}, "config.json")
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == -9
    aside = tmp_path / ".lm.replaced"
    with pytest.raises(StorageError, match=r"interrupted save left the previous version in .*lm\.replaced"):
        read_unit_lm(tmp_path / "lm")
    assert read_unit_lm(aside)[2]["hash"] == unit_lm_hash(weights(0))
    save_unit_lm(tmp_path / "lm", CONFIG, weights(1))
    assert not aside.exists()
