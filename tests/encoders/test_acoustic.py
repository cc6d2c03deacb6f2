"""MFCC and log-mel: compared with librosa; frame counts, normalisation, edge cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spjax.encoders import acoustic
from spjax.encoders.acoustic import LOG_MEL, MFCC, AcousticConfig, features, frames
from tests.encoders.hubert_models import speechlike

CONFIGS = [MFCC, LOG_MEL, AcousticConfig(deltas=2), AcousticConfig("log_mel", hop=320, mels=20, deltas=1)]


def by_librosa(wave: np.ndarray, config: AcousticConfig) -> np.ndarray:
    """The same features by librosa only."""
    import librosa

    grid = {"sr": 16_000, "n_fft": config.window, "hop_length": config.hop, "center": False, "n_mels": config.mels}
    mel = librosa.feature.melspectrogram(y=wave, **grid)
    level = librosa.power_to_db(mel, amin=1e-20)
    if config.kind == "mfcc":
        level = librosa.feature.mfcc(S=level, n_mfcc=config.coefficients)
    slopes = [librosa.feature.delta(level, order=order, mode="nearest") for order in range(1, config.deltas + 1)]
    stack = np.concatenate([level, *slopes]).T
    return (stack - stack.mean(0)) / stack.std(0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_features_are_librosa_s(config):
    wave = speechlike(24_123)
    found = features(wave, config)
    assert found.dtype == np.float32
    assert found.shape == (frames(len(wave), config), config.dim)
    assert np.abs(found - by_librosa(wave, config)).max() < 1e-3


def test_sizes():
    assert (MFCC.dim, LOG_MEL.dim, AcousticConfig(deltas=2).dim) == (26, 80, 39)
    assert [frames(n, MFCC) for n in (0, 399, 400, 559, 560, 16_000)] == [0, 0, 1, 1, 2, 98]


@settings(max_examples=25)
@given(n=st.integers(400, 4000), number=st.integers(0, len(CONFIGS) - 1))
def test_frame_counts(n, number):
    config = CONFIGS[number]
    found = features(speechlike(n), config)
    assert found.shape == (frames(n, config), config.dim)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_coefficient_has_mean_0_and_variance_1(config):
    found = features(speechlike(16_000), config).astype(np.float64)
    assert np.abs(found.mean(0)).max() < 1e-4
    assert np.abs(found.std(0) - 1).max() < 1e-4


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_loudness_changes_nothing(config):
    wave = speechlike(16_000)
    assert np.allclose(features(wave, config), features(wave * np.float32(2**-7), config), atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_shortest_utterance(config):
    assert (features(speechlike(400), config) == 0).all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_constant_coefficients_are_0(config):
    steady = np.tile(np.sin(2 * np.pi * np.arange(160) / 16).astype(np.float32), 100)  # every frame is the same
    for wave in (steady, np.zeros(8000, np.float32), np.ones(8000, np.float32)):
        found = features(wave, config)
        assert np.isfinite(found).all()
        assert np.abs(found).max() < 1e-6


def test_a_silent_half_is_finite_and_differs():
    wave = speechlike(16_000)
    wave[:8000] = 0
    found = features(wave, LOG_MEL)
    assert np.isfinite(found).all()
    assert found[:45].mean() < -0.5 < 0.5 < found[55:].mean()


def test_frame_centres():
    wave = np.zeros(16_000, np.float32)
    wave[160 * 50 + 200] = 1  # the centre of frame 50
    loud = features(wave, AcousticConfig("log_mel", deltas=0)).mean(1)
    assert np.argmax(loud) == 50
    assert np.allclose(loud[49], loud[51], atol=1e-4)


def test_blocks_do_not_change_a_long_recording(monkeypatch):
    wave = speechlike(40_000)
    whole = features(wave, MFCC)
    monkeypatch.setattr(acoustic, "_BLOCK", 7)
    assert np.allclose(features(wave, MFCC), whole, atol=1e-4)


def test_the_wave_is_not_modified():
    wave = speechlike(8000)
    before = wave.copy()
    features(wave, MFCC)
    assert (wave == before).all()


@pytest.mark.parametrize("wave", [np.zeros(399, np.float32), np.zeros((2, 4000), np.float32)])
def test_bad_waves_are_refused(wave):
    with pytest.raises(ValueError, match=r"must be \[n\] of 400 samples or more"):
        features(wave, MFCC)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "plp"},
        {"hop": 0},
        {"window": 0},
        {"coefficients": 41},
        {"mels": 0},
        {"deltas": 3},
        {"delta_width": 4},
        {"delta_width": 1},
    ],
)
def test_invalid_configs(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        AcousticConfig(**wrong)
