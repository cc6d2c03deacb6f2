"""Pitch of synthetic sounds: values, octaves, voicing, frame positions, means of segments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from spjax.encoders import prosody
from spjax.encoders.prosody import f0_edges, log_f0, normalise, segment_f0, voiced_mean
from spjax.models.config import ProsodyConfig

CENT = np.log(2) / 1200


def voice(f0: np.ndarray | float, seconds: float = 0.6, first: int = 1, tilt: float = 1.0) -> np.ndarray:
    """Harmonics `first` to 12 of a pitch (Hz, constant or one per sample): float32 [n]."""
    f0 = np.broadcast_to(f0, np.shape(f0) or (round(seconds * 16_000),))
    phase = 2 * np.pi * np.cumsum(f0) / 16_000
    return (0.1 * sum(np.sin(k * phase) / k**tilt for k in range(first, 13))).astype(np.float32)


def hiss(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, samples).astype(np.float32)


@pytest.mark.parametrize("hop", [160, 320])
@pytest.mark.parametrize("hz", [70, 85, 120, 170, 230, 310, 400, 480])
def test_steady_pitch(hz, hop):
    found = log_f0(voice(hz), hop)
    assert (found.dtype, found.shape) == (np.float32, ((9600 - 400) // hop + 1,))
    assert np.isfinite(found).all()
    assert np.abs(found - np.log(hz)).max() < 12 * CENT


@pytest.mark.parametrize("hz", [90, 130, 210, 300])
@pytest.mark.parametrize(
    "sound",
    [
        {"first": 2},  # a missing fundamental, as on the telephone
        {"first": 3},
        {"tilt": 0.0},  # bright
        {"tilt": 3.0},  # nearly a sine
    ],
    ids=str,
)
def test_octaves(hz, sound):
    found = log_f0(voice(hz, **sound), 320)
    assert np.abs(found - np.log(hz)).max() < 20 * CENT


def test_a_voice_in_noise():
    wave = voice(140, 1.0)
    noisy = wave + hiss(len(wave)) * np.float32(wave.std() / 0.05 / 3.16)  # 10 dB
    found = log_f0(noisy, 320)
    assert np.isfinite(found).mean() > 0.95
    assert np.nanmax(np.abs(found - np.log(140))) < 50 * CENT


@pytest.mark.parametrize("hop", [160, 320])
@pytest.mark.parametrize("turn", [1, -1])
def test_glides_show_the_frame_centres(hop, turn):
    hz = np.exp(np.linspace(np.log(110), np.log(240), 32_000))[::turn]
    found = log_f0(voice(hz), hop)
    centres = np.arange(len(found)) * hop + 200
    late = (found - np.log(hz[centres])) / (turn * np.log(240 / 110) / 32_000)  # samples
    assert abs(np.mean(late[5:-5])) < 40
    assert np.abs(found - np.log(hz[centres])).max() < 15 * CENT


@pytest.mark.parametrize("level", [0.0, 0.3, -1.0])
def test_an_offset_has_no_pitch_and_changes_none(level):
    assert np.isnan(log_f0(np.full(16_000, level, np.float32), 160)).all()
    voice = 0.05 * sum(np.sin(2 * np.pi * 140 * k * np.arange(16_000) / 16_000) / k for k in range(1, 8))
    found = log_f0((voice + level).astype(np.float32), 160)
    assert np.abs(found[5:-5] - np.log(140)).max() < 0.01


def test_noise_and_silence_are_unvoiced():
    for seed in range(5):
        assert np.isnan(log_f0(hiss(16_000, seed), 320)).mean() > 0.95
    assert np.isnan(log_f0(np.zeros(8000, np.float32), 320)).all()


def test_voiced_and_unvoiced_stretches():
    wave = np.concatenate([voice(120, 0.5), hiss(8000), voice(240, 0.5), np.zeros(8000, np.float32)])
    found = log_f0(wave, 320)
    centres = np.arange(len(found)) * 320 + 200
    stretch = centres // 8000
    inside = (centres % 8000 > 900) & (centres % 8000 < 7100)
    for number, hz in ((0, 120), (2, 240)):
        assert np.nanmax(np.abs(found[inside & (stretch == number)] - np.log(hz))) < 12 * CENT
        assert np.isfinite(found[inside & (stretch == number)]).all()
    assert np.isnan(found[inside & (stretch % 2 == 1)]).all()


@pytest.mark.parametrize("hop", [40, 160, 320])
def test_pitch_is_close_to_librosa_s(hop):
    import librosa

    glide = np.exp(np.linspace(np.log(90), np.log(300), 12_000))
    parts = [voice(glide), hiss(6000), voice(180 * 2 ** (np.sin(np.arange(12_000) / 1500) / 3), first=2), voice(510.0)]
    wave = np.concatenate([*parts, np.zeros(3000, np.float32), voice(61.0)])
    wave += hiss(len(wave), 7) * np.float32(0.1)
    found = log_f0(wave, hop)
    wanted, _, _ = librosa.pyin(
        np.pad(wave, (312, 1024))[: (len(found) - 1) * hop + 1024],
        fmin=60.0,
        fmax=500.0,
        sr=16_000,
        frame_length=1024,
        hop_length=hop,
        center=False,
        no_trough_prob=0.004,
    )
    assert (np.isnan(found) == np.isnan(wanted)).mean() > 0.93  # at edges, windows of other lengths differ
    both = np.isfinite(found) & np.isfinite(wanted)
    assert both.mean() > 0.6
    assert np.quantile(np.abs(found - np.log(wanted))[both], 0.99) < 30 * CENT


@pytest.mark.parametrize("hop", [40, 160, 320])
def test_the_limited_search_finds_the_same_path(hop):
    from librosa import sequence

    rng = np.random.default_rng(hop)
    bins, frames = prosody._BINS, 60
    odds = np.zeros((frames, bins))
    for course in (100, 200, 210, 355):  # some candidates drift, one appears at random
        odds[np.arange(frames), np.clip(course + np.cumsum(rng.integers(-9, 10, frames)), 0, bins - 1)] += rng.random()
    odds[np.arange(frames), rng.integers(0, bins, frames)] += 0.3
    odds *= np.repeat([0.9, 1e-4, 0.9, 1e-4, 0.9, 0.2], 10)[:, None] / odds.sum(axis=1, keepdims=True)
    width = round(35.92 * 12 * hop / 16_000) * 10 + 1
    leaps = sequence.transition_local(bins, width, window="triangle", wrap=False)
    unvoiced = np.repeat(1 - odds.sum(axis=1, keepdims=True), bins, axis=1) / bins
    states = sequence.viterbi(
        np.concatenate([odds, unvoiced], axis=1).T, np.kron(sequence.transition_loop(2, 0.99), leaps)
    )
    found = prosody._track(odds, hop)
    assert found.tolist() == np.where(states < bins, states.astype(int), -1).tolist()
    assert 0.1 < (found < 0).mean() < 0.9


def test_a_low_voice_that_rises_fast():
    hz = np.exp(np.interp(np.arange(8000), [0, 4000, 7999], np.log([95, 80, 110])))
    wave = voice(hz) + hiss(8000) * np.float32(0.02)
    found = log_f0(wave, 160)
    centres = np.arange(len(found)) * 160 + 200
    assert np.isfinite(found).all()
    assert np.abs(found - np.log(hz[centres]))[3:-3].max() < 40 * CENT


def test_the_shortest_utterance():
    assert log_f0(voice(150, 0.025), 320).shape == (1,)
    assert log_f0(hiss(719), 320).shape == (1,)
    assert log_f0(hiss(720), 320).shape == (2,)
    assert log_f0(hiss(4000), 3600).shape == (2,)  # at such a hop, pitch may move from any bin to any


def test_long_recordings_are_tracked_in_blocks(monkeypatch):
    hz = 150 + 40 * np.sin(np.arange(64_000) / 5000)
    wave = voice(hz)
    wave[20_000:30_000] = hiss(10_000)
    whole = log_f0(wave, 160)
    monkeypatch.setattr(prosody, "_BLOCK", 64)
    monkeypatch.setattr(prosody, "_CONTEXT", 40)
    parts = log_f0(wave, 160)
    assert (np.isnan(parts) == np.isnan(whole)).mean() > 0.99
    assert np.nanmax(np.abs(parts - whole)) < 12 * CENT


@pytest.mark.parametrize(("wave", "hop"), [(hiss(399), 320), (hiss(800).reshape(2, 400), 320), (hiss(800), 0)])
def test_bad_waves_are_refused(wave, hop):
    with pytest.raises(ValueError, match="samples or more; hop"):
        log_f0(wave, hop)


def test_means_of_segments():
    nan = np.nan
    found = np.array([5.0, 5.2, nan, nan, nan, 4.8, nan, 5.0], np.float32)
    mean, voiced = segment_f0(found, np.array([2, 3, 0, 2, 1]))
    assert np.allclose(mean, [5.1, 0, 0, 4.8, 5.0])
    assert voiced.tolist() == [2, 0, 0, 1, 1]
    assert (mean.dtype, voiced.dtype) == (np.float32, np.int32)
    assert voiced_mean(mean, voiced) == pytest.approx(5.0)
    assert np.allclose(normalise(mean, voiced), [0.1, 0, 0, -0.2, 0], atol=1e-6)
    assert np.allclose(normalise(mean, voiced, 4.0), [1.1, 0, 0, 0.8, 1.0], atol=1e-6)
    assert normalise(mean, voiced).dtype == np.float32


@given(
    arrays.arrays(np.float32, st.integers(1, 30), elements=st.sampled_from([4.0, 4.5, 5.5, np.nan])),
    st.lists(st.integers(0, 8), max_size=10),
)
def test_segments_keep_the_mean_of_an_utterance(found, cuts):
    edges = np.array([0, *sorted(min(cut, len(found)) for cut in cuts), len(found)])
    mean, voiced = segment_f0(found, np.diff(edges))
    assert voiced.sum() == np.isfinite(found).sum()
    if voiced.any():
        assert voiced_mean(mean, voiced) == pytest.approx(np.nanmean(found.astype(float)), abs=1e-5)
    less = normalise(mean, voiced)
    assert np.isfinite(less).all()
    assert (less[voiced == 0] == 0).all()
    assert np.dot(less, voiced) == pytest.approx(0, abs=1e-4)


def test_an_utterance_without_voice():
    mean, voiced = segment_f0(np.full(4, np.nan, np.float32), np.array([1, 3]))
    assert voiced_mean(mean, voiced) == 0
    assert normalise(mean, voiced).tolist() == [0, 0]
    assert normalise(mean, voiced, 5.0).tolist() == [0, 0]


def test_a_speaker_s_mean_is_over_all_utterances():
    first = segment_f0(np.full(30, np.log(100), np.float32), np.array([10, 20]))
    second = segment_f0(np.full(10, np.log(200), np.float32), np.array([10]))
    together = [np.concatenate(parts) for parts in zip(first, second, strict=True)]
    assert voiced_mean(*together) == pytest.approx(np.log(100) + np.log(2) / 4)


def test_durations_of_another_hop_are_refused():
    with pytest.raises(ValueError, match="durations sum to 5, log f0 has shape \\[4\\]"):
        segment_f0(np.zeros(4, np.float32), np.array([2, 3]))


def test_bins_of_f0_hold_equally_many_voiced_segments():
    f0 = np.concatenate([np.random.default_rng(0).normal(0, 0.2, 3200), np.zeros(1000)]).astype(np.float32)
    edges = f0_edges(f0)
    assert len(edges) == 31
    assert ProsodyConfig(f0_edges=edges).symbols == (25, 36)
    assert np.bincount(np.searchsorted(edges, f0[f0 != 0]), minlength=32).tolist() == [100] * 32
    assert f0_edges(np.array([0, -1.0, 1.0, 0]), 2) == (0.0,)
    assert f0_edges(np.full(9, 0.25)) == (0.25,) * 31


@given(
    arrays.arrays(np.float32, st.integers(1, 50), elements=st.floats(-3, 3, width=32) | st.sampled_from([0.0, 0.5])),
    st.integers(2, 40),
)
def test_edges_are_valid_for_a_config(f0, bins):
    if not f0.any():
        with pytest.raises(ValueError, match="f0 bins cannot be fitted"):
            f0_edges(f0, bins)
        return
    edges = f0_edges(f0, bins)
    assert len(edges) == bins - 1
    assert all(type(edge) is float for edge in edges)
    assert ProsodyConfig(f0_edges=edges).f0_edges == edges  # finite, in ascending order
    voiced = f0[f0 != 0]
    assert voiced.min() <= edges[0]
    assert edges[-1] <= voiced.max()
    assert f0_edges(np.concatenate([f0, np.zeros(7)]), bins) == edges  # unvoiced segments are ignored


def test_edges_without_voiced_segments_are_refused():
    with pytest.raises(ValueError, match=r"none of 3 segments is voiced.*--f0"):
        f0_edges(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="f0 needs at least 2 bins, not 1"):
        f0_edges(np.ones(3), 1)
