"""Extraction of f0 in edge cases: unvoiced audio, one segment, one frame, one recording of a speaker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipelines.clips import Clip
from data_pipelines.extract import extract
from spjax.data.records import read_unit_records
from spjax.encoders.acoustic import MFCC, features
from spjax.io import KMeans, save_kmeans
from tests.data_pipelines.corpus import TASK


def voice(hz: float, seconds: float) -> np.ndarray:
    time = np.arange(round(seconds * 16_000)) / 16_000
    return 0.1 * sum(np.sin(2 * np.pi * k * hz * time) / k for k in range(1, 10))


def hiss(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, round(seconds * 16_000))


SOUNDS = {
    "a1": ("ann", np.concatenate([voice(100, 0.3), hiss(0.3, 0), voice(200, 0.3)])),
    "a2": ("ann", hiss(0.4, 1)),  # unvoiced
    "a3": ("ann", voice(100, 0.5)),  # one segment
    "b1": ("bob", voice(150, 0.4)),  # bob's only recording, in one segment
    "c1": ("cid", hiss(0.4, 2)),  # cid's only recording, unvoiced
    "d1": ("dan", np.concatenate([voice(100, 0.3), hiss(0.2, 3), voice(200, 0.3)])),  # dan's only recording
    "e1": ("", voice(150, 0.5)),  # unknown speakers: each clip is normalised alone
    "e2": ("", voice(300, 0.5)),
    "f1": ("eve", voice(120, 0.025)),  # one frame
}


def records(folder: Path, centres: list[slice]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Durations and f0 of every sound, with units whose centres are means of frames of "a1"."""
    frames = features(np.asarray(SOUNDS["a1"][1], np.float32), MFCC)
    centroids = np.stack([frames[where].mean(axis=0) for where in centres]).astype(np.float32)
    save_kmeans(folder / "km", KMeans(centroids, {"encoder": "mfcc", "layer": None}))
    clips = []
    for name, (speaker, wave) in SOUNDS.items():
        soundfile.write(folder / f"{name}.wav", wave, 16_000)
        clips.append(Clip(name, f"{name}.wav", ("low", "none"), speaker))
    splits = {"train": clips[::2], "test": clips[1::2]}
    extract(TASK, splits, folder, folder / "units", encoder="mfcc", kmeans=folder / "km", f0=True, workers=0)
    made = {}
    for split in splits:
        units, _ = read_unit_records(folder / "units", split)
        for row, name in enumerate(units.ids):
            where = slice(units.offsets[row], units.offsets[row + 1])
            made[name] = units.durations[where], units.f0[where]
    return made


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Records with two units, voice and noise."""
    return records(tmp_path_factory.mktemp("f0"), [slice(25), slice(35, 55)])


def test_every_segment_has_a_duration_and_an_f0(found):
    for name, (_, wave) in SOUNDS.items():
        durations, f0 = found[name]
        assert durations.sum() == (len(wave) - 400) // 160 + 1
        assert durations.min() >= 1
        assert f0.shape == durations.shape
        assert np.isfinite(f0).all()


def test_unvoiced_segments_and_utterances_are_zero(found):
    assert (found["a2"][1] == 0).all()
    assert (found["c1"][1] == 0).all()
    durations, f0 = found["a1"]
    quiet = np.cumsum(durations) - durations / 2
    assert (f0[(quiet > 36) & (quiet < 54)] == 0).all()


def test_a_speakers_mean_is_over_voiced_frames_of_all_splits(found):
    """Ann: 0.8 s at 100 Hz, 0.3 s at 200 Hz, in three recordings of two splits, one of them unvoiced."""
    f0 = found["a1"][1]
    assert f0[-1] - f0[0] == pytest.approx(np.log(2), abs=0.1)
    longest = found["a3"][1][found["a3"][0].argmax()]
    assert longest == pytest.approx(-np.log(2) * 0.3 / 1.1, abs=0.06)


def test_a_speaker_with_one_recording_is_normalised_by_it(found):
    _, f0 = found["d1"]
    assert f0[0] == pytest.approx(-np.log(2) / 2, abs=0.06)
    assert f0[-1] == pytest.approx(np.log(2) / 2, abs=0.06)
    # One voiced pitch minus its mean is zero, whatever the pitch
    for name in ("b1", "e1", "e2"):
        assert np.abs(found[name][1]).max() < 0.05


def test_an_utterance_of_one_segment(tmp_path):
    found = records(tmp_path, [slice(1)])
    assert {name: len(durations) for name, (durations, _) in found.items()} == dict.fromkeys(SOUNDS, 1)
    assert found["a2"][1].item() == found["c1"][1].item() == 0  # unvoiced
    assert np.abs([found[name][1][0] for name in ("b1", "d1", "e1", "e2", "f1")]).max() < 1e-6  # equal to the mean
    low, high = found["a3"][1][0], found["a1"][1][0]
    assert low < -0.1 < 0.1 < high
    assert low * 0.5 + high * 0.6 == pytest.approx(0, abs=0.02)  # weighted by voiced frames
