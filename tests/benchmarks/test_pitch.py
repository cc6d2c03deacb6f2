"""The errors that the race of pitch trackers counts, and the alignment of every installed tracker."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import pitch


def test_errors_of_a_tracker() -> None:
    truth = np.where(np.arange(16_000) < 8000, 200.0, np.nan)
    at_frames = truth[np.arange(98) * pitch.HOP + 200]
    material = [(np.zeros(16_000, np.float32), truth)]
    assert pitch.errors(lambda _: at_frames, material) == {"voicing": 0, "gross": 0, "cents": 0}
    sharp = pitch.errors(lambda _: at_frames * 2 ** (20 / 1200), material)
    assert (sharp["voicing"], sharp["gross"], round(sharp["cents"])) == (0, 0, 20)
    octave = pitch.errors(lambda _: at_frames / 2, material)
    assert octave["gross"] == pytest.approx(50, abs=3)
    assert pitch.errors(lambda _: np.full(98, np.nan), material)["voicing"] == pytest.approx(50, abs=3)


@pytest.mark.parametrize("name", ["ours", "librosa.pyin"])
def test_trackers_have_the_same_frames(name: str) -> None:
    material = pitch.sounds(1, seconds=0.5)
    found = pitch.errors(pitch.trackers()[name], material["glide"])  # a frame off is about 40 cents here
    assert found["voicing"] == found["gross"] == 0
    assert found["cents"] < 15
