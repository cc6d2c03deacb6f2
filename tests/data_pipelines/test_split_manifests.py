"""Split manifests: round trip, and detection of changes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from data_pipelines import split_manifests
from data_pipelines.clips import Clip
from data_pipelines.splits import BuildError
from spjax.tasks import Slot, Task
from tests.data_pipelines.builders.raw_trees import record, sound

TASK = Task("toy", (Slot("word", ("įjunk", "a b")), Slot("room", ("none", "hall"))), "exact_match")
SPLITS = {
    "train": [
        Clip("x/č.wav", "x/č.wav", ("įjunk", "none"), "anna", "tape 1", 0.25, 0.5),
        Clip("x/č.wav#2", "x/č.wav", ("a b", "hall")),
    ],
    "test": [Clip("y.flac", "y.flac", ("a b", "none"))],
}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    record(folder, ["x/č.wav"], contents=sound(frames=8_000, rate=8_000))
    record(folder, ["y.flac"])
    return folder


@pytest.fixture
def out(tmp_path: Path, raw: Path) -> Path:
    files = split_manifests.inspect_files(raw, [clip.path for part in SPLITS.values() for clip in part])
    split_manifests.write_splits(tmp_path / "out", TASK, SPLITS, files, "honest")
    return tmp_path / "out"


def test_round_trip(raw: Path, out: Path):
    read = split_manifests.read_splits(out)
    assert (read.task, read.protocol, read.splits) == (TASK, "honest", SPLITS)
    assert read.files["x/č.wav"][1:] == (16_044, 8_000, 1.0)
    assert sorted(path.name for path in out.iterdir()) == ["splits.json", "test.jsonl", "train.jsonl"]
    before = [path.read_bytes() for path in sorted(out.iterdir())]
    split_manifests.write_splits(out, TASK, SPLITS, read.files, "honest")
    assert before == [path.read_bytes() for path in sorted(out.iterdir())]


def test_a_missing_file_is_named(raw: Path):
    with pytest.raises(BuildError, match=r"nowhere.flac cannot be read \(No such file"):
        split_manifests.inspect_files(raw, ["y.flac", "nowhere.flac"])


def test_damage_is_detected(out: Path):
    manifest, card = out / "train.jsonl", out / "splits.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace("anna", "anne"))
    with pytest.raises(BuildError, match=r"train.jsonl is not the file that splits.json describes"):
        split_manifests.read_splits(out)
    manifest.unlink()
    with pytest.raises(BuildError, match=r"train.jsonl is not the file"):
        split_manifests.read_splits(out)
    value = json.loads(card.read_text())
    none = {split: hashlib.sha256(b"{}\n").hexdigest() for split in value["sha256"]}
    manifest.write_text("{}\n")
    for change, fault in [
        ({"version": 2}, "version 2, but must be"),
        ({"task": 3}, "splits.json is damaged"),
        ({"sha256": {}}, "it lists no split"),
        ({"sha256": {"train": none["train"]}}, "train.jsonl, line 1 is not a clip"),
    ]:
        card.write_text(json.dumps(value | change))
        with pytest.raises(BuildError, match=fault):
            split_manifests.read_splits(out)
    manifest.unlink()
    os.mkfifo(manifest)
    card.write_text(json.dumps(value))
    with pytest.raises(BuildError, match=r"train.jsonl is not the file"):
        split_manifests.read_splits(out)
    card.unlink()
    with pytest.raises(BuildError, match=r"splits.json is missing: .* or it is incomplete"):
        split_manifests.read_splits(out)


def test_lines_end_at_line_feeds_alone(tmp_path: Path):
    """Names may contain Unicode line separators."""
    (tmp_path / "a\u2028b.wav").write_bytes(b"a")
    clip = Clip("a\u2028b.wav", "a\u2028b.wav", ("yes",))
    files = split_manifests.inspect_files(tmp_path, [clip.path])
    task = Task("one", (Slot("word", ("no", "yes")),))
    split_manifests.write_splits(tmp_path / "out", task, {"train": [clip]}, files, "paper")
    assert split_manifests.read_splits(tmp_path / "out").splits == {"train": [clip]}
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(BuildError, match=r"pipe.wav is a folder, pipe or device"):
        split_manifests.inspect_files(tmp_path, ["pipe.wav"])


def test_files_that_are_not_audio_have_a_hash(tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(b"none")
    facts = split_manifests.inspect_files(tmp_path, ["a.wav", "a.wav"])["a.wav"]
    assert facts[1:] == (4, None, None)
    assert len(facts.sha256) == 64
    with pytest.raises(BuildError, match=r"y.flac was not inspected"):
        split_manifests.write_splits(tmp_path / "out", TASK, {"test": SPLITS["test"]}, {"a.wav": facts}, "paper")
