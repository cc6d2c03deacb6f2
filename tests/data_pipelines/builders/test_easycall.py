"""EasyCall: severities by speaker, short clips, splits by speaker."""

from __future__ import annotations

from pathlib import Path

import pytest
from etils import epath

from data_pipelines.builders import easycall
from data_pipelines.splits import BuildError
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, record, shared, sound

CONTROLS = [f"{sex}c{number:02}" for sex in "fm" for number in range(1, 7)]
SPEAKERS = sorted([*easycall.TOM, *CONTROLS])


def plant(root: Path, order: int) -> None:
    names = [f"{speaker}/Sessione{k % 2}/{speaker}_{k}.wav" for speaker in SPEAKERS for k in range(5)]
    record(root, names, order, sound(1000))


def test_scores_are_those_of_the_recipe():
    assert len(easycall.TOM) == 30
    by_score = {score: [s for s, its in sorted(easycall.TOM.items()) if its == score] for score in "12345"}
    assert by_score["2"] == ["f11"]
    assert by_score["3"] == ["f02", "m01", "m03", "m08", "m10", "m16", "m19"]
    assert by_score["4"] == ["m05", "m06", "m07"]
    assert by_score["5"] == ["f10", "m11", "m14"]


def test_paper_draws_utterances(tmp_path: Path):
    splits = listed(easycall.clips, plant, tmp_path, ["paper"])["paper"]
    assert counts(splits) == (168, 21, 21)
    assert all(labels(part) == set("012345") for part in splits.values())
    assert shared(splits, "speaker") == {("train", "valid"), ("train", "test"), ("valid", "test")}
    assert all(clip.labels == (easycall.TOM.get(clip.speaker, "0"),) for clip in everything(splits))


def test_honest_leaves_speakers_out(tmp_path: Path):
    splits = listed(easycall.clips, plant, tmp_path, ["honest"])["honest"]
    assert sum(counts(splits)) == 210
    assert shared(splits, "speaker") == set()
    assert labels(splits["train"]) == set("012345")
    assert labels(splits["valid"]) == labels(splits["test"]) == set("01345")  # TOM 2 has one speaker
    assert 0.6 < len(splits["train"]) / 210 < 0.85


def test_clips_under_1000_samples_at_16_khz_are_left_out(tmp_path: Path):
    plant(tmp_path, 0)
    record(tmp_path, ["f01/short.wav"], contents=sound(999))
    record(tmp_path, ["f01/short_44k.wav"], contents=sound(2700, 44_100))
    record(tmp_path, ["f01/long_8k.wav"], contents=sound(500, 8_000))
    record(tmp_path, ["f01/broken.wav"], contents=b"RIFF")
    ids = {clip.id for clip in everything(easycall.clips(epath.Path(tmp_path)))}
    assert not {"f01/short.wav", "f01/short_44k.wav"} & ids
    assert {"f01/long_8k.wav", "f01/broken.wav"} <= ids  # extraction reports unreadable files


@pytest.mark.parametrize("name", ["f04/a.wav", "noise/a.wav", "f01.wav"])
def test_a_folder_that_is_not_a_speaker(tmp_path: Path, name: str):
    plant(tmp_path, 0)
    record(tmp_path, [name])
    with pytest.raises(BuildError, match=r"is not a speaker of EasyCall .*point --raw"):
        easycall.clips(epath.Path(tmp_path))
