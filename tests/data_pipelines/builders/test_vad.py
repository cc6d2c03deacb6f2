"""Voice activity: manifests with paths of another machine, segments, sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from etils import epath

from data_pipelines.builders import vad
from data_pipelines.splits import BuildError
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, record, shared, sound, write

PARTS = {"training": 6, "validation": 2, "testing": 3}


def line(path: str, offset: float, label: str, duration: float = 0.63) -> str:
    row = {"audio_filepath": path, "duration": duration, "label": label, "text": "_", "offset": offset}
    return json.dumps(row) + "\n"


def plant(root: Path, order: int) -> None:
    names = []
    for part, number in PARTS.items():
        speech, background = "", ""
        for k in range(number):
            names += [f"google_v2/bed/{part}{k}_nohash_0.wav", f"freesound/Air brake/{part}{k}.wav"]
            speech += line(f"/home/maker/data/google_v2/bed/{part}{k}_nohash_0.wav", 0.185, "speech")
            background += line(f"/raid/freesound/Air brake/{part}{k}.wav", 0.0, "background")
            background += line(f"/raid/freesound/Air brake/{part}{k}.wav", 0.63, "background")
        background += background.splitlines()[0] + "\n"  # a duplicate, as oversampling makes
        write(root, f"balanced_speech_{part}_manifest.json", speech)
        write(root, f"balanced_background_{part}_manifest.json", background)
    record(root, names, order, sound(20_480))


def test_the_manifests_define_the_splits(tmp_path: Path):
    found = listed(vad.clips, plant, tmp_path, ("paper", "honest"))
    assert found["paper"] == found["honest"]
    splits = found["paper"]
    assert counts(splits) == (18, 6, 9)
    assert all(labels(part) == {"speech", "background"} for part in splits.values())
    assert shared(splits, "speaker") == shared(splits, "source") == set()
    clips = {clip.id: clip for clip in everything(splits)}
    clip = clips["freesound/Air brake/testing1.wav@0.63+0.63"]
    assert (clip.path, clip.start, clip.duration) == ("freesound/Air brake/testing1.wav", 0.63, 0.63)
    clip = clips["google_v2/bed/training0_nohash_0.wav@0.185+0.63"]
    assert (clip.speaker, clip.source, clip.labels) == ("training0", clip.path, ("speech",))


@pytest.mark.parametrize("prefix", ["", "/", "./", "C:\\maker\\", "/a/b/c/"])
def test_a_recording_is_found_by_a_suffix_of_its_path(tmp_path: Path, prefix: str):
    plant(tmp_path, 0)
    record(tmp_path, ["more/bed/new_nohash_1.wav", "bed/new_nohash_1.wav"])
    named = f"{prefix}more/bed/new_nohash_1.wav".replace("/", "\\" if ":" in prefix else "/")
    manifest = tmp_path / "balanced_speech_training_manifest.json"
    manifest.write_text(manifest.read_text() + line(named, 0, "speech"))
    assert "more/bed/new_nohash_1.wav@0+0.63" in {clip.id for clip in vad.clips(epath.Path(tmp_path))["train"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            line("/x/google_v2/bed/none.wav", 0, "speech"),
            r"manifest\.json, line 7 names .*none\.wav, and no suffix of that path exists",
        ),
        (line("/x/google_v2/bed/training0_nohash_0.wav", 0, "noise"), "'noise', which is not in the task"),
        (line("/x/google_v2/bed/training0_nohash_0.wav", -1, "speech"), "0.63 s from -1 s cannot be cut"),
        (line("/x/google_v2/bed/training0_nohash_0.wav", 0, "speech", 0), "0 s from 0 s cannot be cut"),
        ('{"audio_filepath": "a.wav"}\n', "line 7 is not .*write the manifest again"),
        ("a.wav\n", "line 7 is not .*write the manifest again"),
        ("[1]\n", "line 7 is not .*write the manifest again"),
    ],
)
def test_an_invalid_line_is_refused(tmp_path: Path, text: str, message: str):
    plant(tmp_path, 0)
    manifest = tmp_path / "balanced_speech_training_manifest.json"
    manifest.write_text(manifest.read_text() + text)
    with pytest.raises(BuildError, match=message):
        vad.clips(epath.Path(tmp_path))


def test_a_missing_manifest_is_named(tmp_path: Path):
    plant(tmp_path, 0)
    (tmp_path / "balanced_background_testing_manifest.json").unlink()
    with pytest.raises(BuildError, match=r"balanced_background_testing_manifest\.json is missing"):
        vad.clips(epath.Path(tmp_path))
