"""Arabic Speech Commands, 40 words: split by a hash of the speaker; and the published recordings."""

from __future__ import annotations

from pathlib import Path

import pytest
from etils import epath

from data_pipelines.builders import ar40
from data_pipelines.splits import BuildError
from spjax.tasks import TASKS
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, record, shared

SPEAKERS = (1, 5, 13, 15, 19, 29)
WORDS = TASKS["ar40"].slots[0].labels


def plant(root: Path, order: int) -> None:
    names = [f"{word}/{who:08d}_NO_{take:02d}.wav" for word in WORDS for who in SPEAKERS for take in (1, 2)]
    record(root, names, order)


def test_splits(tmp_path: Path) -> None:
    found = listed(ar40.clips, plant, tmp_path, ["paper", "honest"])
    assert found["paper"] == found["honest"]
    splits = found["paper"]
    assert len(WORDS) == 40
    assert counts(splits) == (160, 160, 160)
    assert {clip.speaker[-2:] for clip in splits["test"]} == {"13", "15"}
    assert not shared(splits, "speaker")
    assert all(labels(part) == set(WORDS) for part in splits.values())


def test_faults_are_named(tmp_path: Path) -> None:
    plant(tmp_path, 0)
    record(tmp_path, ["hello/00000001_NO_01.wav"])
    with pytest.raises(BuildError, match=r"hello/00000001_NO_01\.wav has the label 'hello', which is not in the task"):
        ar40.clips(epath.Path(tmp_path))
    record(tmp_path, ["stop/one.wav"])
    with pytest.raises(BuildError, match=r"stop/one\.wav is not at <word>/<speaker>_NO_<take>"):
        ar40.clips(epath.Path(tmp_path))


def test_real_recordings(audio: Path) -> None:
    splits = ar40.clips(epath.Path(audio / "ar40_train"))
    assert counts(splits) == (4400, 1200, 1600)
    assert not shared(splits, "speaker")
    assert len({clip.speaker for clip in everything(splits)}) == 18
    assert all(labels(part) == set(WORDS) for part in splits.values())
