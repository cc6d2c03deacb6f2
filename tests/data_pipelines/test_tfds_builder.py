"""Builders that TFDS prepares, reads back and finds again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipelines.builders import CLIPS, UNIT_TEXT
from data_pipelines.clips import Clip
from data_pipelines.splits import PROTOCOLS, BuildError
from data_pipelines.tfds_builder import builder, builder_of
from spjax.encoders.audio import AudioError
from spjax.tasks import TASKS, Slot, Task

TASK = Task("rooms", (Slot("action", ("on", "off")), Slot("room", ("none", "hall"))), "exact_match")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    time = np.arange(16_000) / 16_000
    soundfile.write(folder / "a.wav", 0.5 * np.sin(2 * np.pi * 300 * time), 16_000, subtype="PCM_16")
    soundfile.write(folder / "b.wav", 0.5 * np.sin(2 * np.pi * 300 * time[::2]), 8_000, subtype="PCM_16")
    return folder


SPLITS = {
    "train": [
        Clip("a.wav@0.25", "a.wav", ("off", "hall"), "anna", "tape", 0.25, 0.5),
        Clip("a.wav", "a.wav", ("on", "none")),
    ],
    "test": [Clip("b.wav", "b.wav", ("on", "none"))],
}


def test_prepared_examples(raw: Path, tmp_path: Path):
    import tensorflow_datasets as tfds

    made = builder_of(TASK, SPLITS, raw, data_dir=tmp_path)
    made.download_and_prepare()
    found = tfds.builder_from_directory(tmp_path / "rooms" / "own" / "1.0.0")
    assert found.info.features["labels"]["action"].names == ["on", "off"]
    train = {one["id"].decode(): one for one in tfds.as_numpy(found.as_dataset(split="train"))}
    whole, crop = train["a.wav"], train["a.wav@0.25"]
    samples, _ = soundfile.read(raw / "a.wav", dtype="int16")
    np.testing.assert_array_equal(whole["audio"], samples)
    np.testing.assert_array_equal(crop["audio"], samples[4_000:12_000])
    assert {slot: int(label) for slot, label in crop["labels"].items()} == {"action": 1, "room": 1}
    assert (crop["speaker"], crop["source"], int(crop["source_rate"])) == (b"anna", b"tape", 16_000)
    (test,) = tfds.as_numpy(found.as_dataset(split="test"))
    assert (len(test["audio"]), int(test["source_rate"])) == (16_000, 8_000)
    audio, labels = next(iter(found.as_dataset(split="test", as_supervised=True)))
    assert audio.dtype == "int16"
    assert int(labels["room"]) == 0


def test_a_bad_recording_is_named(raw: Path, tmp_path: Path):
    (raw / "empty.wav").write_bytes(b"")
    bad = {"train": [Clip("empty.wav", "empty.wav", ("on", "none"))]}
    with pytest.raises(AudioError, match=r"empty.wav"):
        builder_of(TASK, bad, raw, data_dir=tmp_path).download_and_prepare()


@pytest.mark.parametrize("task", CLIPS)
def test_every_task_has_a_builder_of_either_protocol(task: str, tmp_path: Path):
    for protocol in PROTOCOLS:
        made = builder(task, tmp_path / "raw", protocol, data_dir=tmp_path)
        assert made.info.full_name == f"{task}/{protocol}/1.0.0"
        assert {name: slot.names for name, slot in made.info.features["labels"].items()} == {
            slot.name: list(slot.labels) for slot in TASKS[task].slots
        }
    with pytest.raises(BuildError):  # the folder is empty: an error before anything is written
        builder(task, tmp_path / "raw", data_dir=tmp_path).download_and_prepare()


def test_unknown_names_are_refused(tmp_path: Path):
    with pytest.raises(BuildError, match="task 'speech' is unknown: choose one of gsc"):
        builder("speech", tmp_path)
    with pytest.raises(BuildError, match="protocol 'fair' is unknown"):
        builder("gsc", tmp_path, "fair")


def test_every_task_can_be_listed():
    assert CLIPS.keys() | UNIT_TEXT.keys() == TASKS.keys()
    assert not CLIPS.keys() & UNIT_TEXT.keys()
