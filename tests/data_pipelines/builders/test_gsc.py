"""Google Speech Commands v1: the speaker rule, resampling, crops of noise."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from etils import epath

from data_pipelines.builders import gsc
from data_pipelines.splits import BuildError
from spjax.tasks import TASKS
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, record, shared, sound

WORDS = (*gsc.COMMANDS, "bed", "cat", "zero")
SPEAKERS = [f"{number * 7919:08x}" for number in range(40)]
NOISES = ("exercise_bike", "pink_noise", "white_noise")


def plant(root: Path, order: int) -> None:
    record(root, [f"{gsc.WORDS}/{word}/{speaker}_nohash_0.wav" for word in WORDS for speaker in SPEAKERS], order)
    noise = sound(frames=5 * 16_000)
    record(root, [f"{gsc.WORDS}/_background_noise_/{name}.wav" for name in NOISES], order, noise)
    (root / gsc.WORDS / "_background_noise_" / "README.md").write_text("noise")
    tests = [f"{gsc.TEST}/{word}/00ff{number}_nohash_1.wav" for word in gsc.COMMANDS for number in range(3)]
    tests += [f"{gsc.TEST}/_unknown_/cat_00ff{number}_nohash_0.wav.wav" for number in range(3)]
    tests += [f"{gsc.TEST}/_silence_/{number}.wav" for number in range(3)]
    record(root, tests, order)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory):
    return listed(gsc.clips, plant, tmp_path_factory.mktemp("gsc"), ["paper", "honest"])


def test_speakers_are_in_the_published_splits(unit_text: Path):
    """The published valid and test units name their files, whose speakers must be in those splits."""
    named = {
        split: [line.split("|")[0] for line in (unit_text / "gsc" / f"{split}.named").read_text().splitlines()]
        for split in ("valid", "test")
    }
    speakers = {split: {gsc._speaker(name) for name in names} - {""} for split, names in named.items()}
    assert (len(speakers["valid"]), len(speakers["test"])) > (100, 100)
    assert {gsc.split_of(speaker) for speaker in speakers["valid"]} == {"valid"}
    assert {gsc.split_of(speaker) for speaker in speakers["test"]} == {None}


def test_paper_draws_classes_evenly_with_replacement(found):
    paper = found["paper"]
    by_rule = Counter(gsc.split_of(speaker) for speaker in SPEAKERS)
    expected = tuple(by_rule[split] * len(WORDS) + len(NOISES) for split in ("train", "valid"))
    assert counts(paper) == (*expected, 36)
    number = Counter(clip.labels[0] for clip in paper["train"])
    assert set(number) == set(TASKS["gsc"].slots[0].labels)
    assert max(number.values()) < 3 * min(number.values())
    again = [clip for clip in paper["train"] if "#" in clip.id]
    assert again
    assert {clip.id.partition("#")[0] for clip in again} <= {clip.id for clip in paper["train"]}
    assert all(clip.path == clip.id.partition("#")[0].partition("@")[0] for clip in everything(paper))


def test_silences_are_crops_of_a_second(found):
    silent = [clip for clip in everything(found["paper"]) + everything(found["honest"]) if clip.source]
    assert {clip.labels for clip in silent} == {("_silence_",)}
    assert all(clip.duration == 1.0 and 0 <= clip.start <= 4.0 for clip in silent)
    assert all(clip.id.startswith(f"{clip.path}@{clip.start:.3f}") for clip in silent)


def test_honest_has_every_clip_once_and_splits_the_noise(found):
    honest = found["honest"]
    assert not shared(honest, "source")
    assert not shared(honest, "speaker")
    assert shared(found["paper"], "source") == {("train", "valid")}
    for split in ("train", "valid"):
        number = Counter(clip.labels[0] for clip in honest[split])
        assert len(number) == 12
        assert len(set(number.values())) == 1
        assert len({(clip.path, clip.start) for clip in honest[split]}) == len(honest[split])
    assert honest["test"] == found["paper"]["test"]
    assert labels(honest["test"]) == set(TASKS["gsc"].slots[0].labels)
    unknown = next(clip for clip in honest["test"] if clip.labels == ("_unknown_",))
    assert unknown.speaker == "00ff0"


def test_faults_are_named(tmp_path: Path):
    record(tmp_path, [f"{gsc.WORDS}/yes/abc.wav", f"{gsc.TEST}/yes/a_nohash_0.wav"])
    with pytest.raises(BuildError, match=r"yes/abc.wav is not named <speaker>_nohash_<k>.wav"):
        gsc.clips(epath.Path(tmp_path))
    (tmp_path / gsc.WORDS / "yes" / "abc.wav").rename(tmp_path / gsc.WORDS / "yes" / "abc_nohash_0.wav")
    with pytest.raises(BuildError, match=r"_background_noise_ has 0 recordings"):
        gsc.clips(epath.Path(tmp_path))
    record(tmp_path, [f"{gsc.WORDS}/_background_noise_/a.wav"], contents=b"no audio")
    with pytest.raises(BuildError, match=r"_background_noise_/a.wav is not a readable recording"):
        gsc.clips(epath.Path(tmp_path))
