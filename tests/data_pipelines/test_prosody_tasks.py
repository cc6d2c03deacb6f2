"""Tasks on prosody: one voice says the same words with every label, and only prosody predicts the label."""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from collections import Counter

import numpy as np
import pytest

from data_pipelines import espeak, spoken_tasks, synthesize
from data_pipelines.synthesize import SynthesisConfig
from spjax.encoders.prosody import log_f0

pytest.importorskip("espeakng_loader", reason="the demo's voice is optional (the extra demo)")

TASKS = ("melody", "emphasis", "style")
CONFIG = SynthesisConfig(train=120, valid=2, test=60)


@functools.cache
def made(name: str, split: str) -> tuple[tuple[str, str, str, np.ndarray], ...]:
    """Label, voice, text and waveform of each utterance."""
    number = ("train", "valid", "test").index(split)
    return tuple(
        (line.labels[0], voice, line.text, wave.astype(np.float32) / 32768)
        for line, voice, wave in synthesize._utterances(name, number, split, CONFIG)
    )


@functools.cache
def pitches(name: str, split: str) -> list[np.ndarray]:
    return [log_f0(wave, 160) for _, _, _, wave in made(name, split)]


@functools.cache
def phonemes(text: str) -> str:
    """Phonemes of a text by the engine's trace, with pauses."""
    if sys.platform != "linux":
        pytest.skip("the engine's trace goes to a file of the C library")
    c, library = ctypes.CDLL(None), espeak._engine().library
    c.tmpfile.restype = ctypes.c_void_p
    c.fread.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    library.espeak_SetPhonemeTrace.argtypes = [ctypes.c_int, ctypes.c_void_p]
    file = c.tmpfile()
    library.espeak_SetPhonemeTrace(1, file)
    espeak.say(text, "en-us", "f2")
    library.espeak_SetPhonemeTrace(0, None)
    c.rewind(ctypes.c_void_p(file))
    read = ctypes.create_string_buffer(4096)
    c.fread(read, 1, 4095, file)
    c.fclose(ctypes.c_void_p(file))
    return read.value.decode().strip()


# ---- words and voice do not predict the label


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (12, 4, 7)])
def test_every_sentence_has_every_label_once(name, sizes, tmp_path):
    synthesize.synthesize(tmp_path, SynthesisConfig(*sizes), [name])
    labels = synthesize.TASKS[name].slots[0].labels
    voices = {}
    for (split, clips), size in zip(synthesize.clips(tmp_path / name).items(), sizes, strict=True):
        assert size <= len(clips) < size + len(labels)
        assert len(clips) % len(labels) == 0
        for first in range(0, len(clips), len(labels)):
            turn = clips[first : first + len(labels)]
            assert [clip.labels[0] for clip in turn] == list(labels)
            assert len({clip.speaker for clip in turn}) == 1
        voices[split] = {clip.speaker for clip in clips}
        assert not voices[split] & espeak.REVERSED
    assert not any(one & other for one, other in itertools.combinations(voices.values(), 2))


@pytest.mark.parametrize("name", TASKS)
def test_labels_differ_in_no_word(name):
    rng = np.random.default_rng(0)
    counts = Counter()
    for _ in range(60):
        turn = spoken_tasks.lines(name, rng)
        assert len({phonemes(line.text) for line in turn}) == 1
        assert len({line._replace(labels=(), text="", rate=(), range=()) for line in turn}) == 1
        counts[phonemes(turn[0].text)] += 1
    assert len(counts) > 50


@pytest.mark.parametrize("name", TASKS)
def test_pauses_and_frame_sums_do_not_predict_the_label(name):
    """Silence is trimmed by one rule; except in the task about rate, duration does not predict the label either."""
    by_label: dict[str, list[tuple[float, float]]] = {}
    for label, _, _, wave in made(name, "train"):
        loud = np.flatnonzero(np.abs(wave) > 0.2 * np.abs(wave).max())
        by_label.setdefault(label, []).append((loud[0] / 16_000, len(wave) / 16_000))
    start, length = np.array([np.mean(some, axis=0) for some in by_label.values()]).T
    assert np.ptp(start) < 0.05
    assert np.ptp(length) < 0.15 or name == "style"


# ---- prosody does


def accuracy(name: str, features) -> float:
    """Accuracy of a linear classifier on unseen voices."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    seen, unseen = ([features(f0) for f0 in pitches(name, split)] for split in ("train", "test"))
    labels, wanted = ([label for label, *_ in made(name, split)] for split in ("train", "test"))
    return make_pipeline(StandardScaler(), LogisticRegression()).fit(seen, labels).score(unseen, wanted)


def contour(f0: np.ndarray, points: int = 12) -> np.ndarray:
    """[points]: pitch minus its mean at points of an utterance, interpolated over unvoiced frames."""
    voiced = np.flatnonzero(np.isfinite(f0))
    found = np.interp(np.linspace(0, len(f0) - 1, points), voiced, f0[voiced])
    return found - found.mean()


def ending(f0: np.ndarray) -> tuple[float, ...]:
    """Slope of the pitch in the last 0.4 s, its level there, and at the end."""
    voiced = np.flatnonzero(np.isfinite(f0))
    last, end = voiced[voiced > len(f0) - 40], contour(f0)[-2:]
    if len(last) < 5:
        return 0.0, 0.0, *end
    return np.polyfit(last / 100, f0[last], 1)[0], f0[last].mean() - f0[voiced].mean(), *end


def test_a_question_ends_higher_than_a_statement():
    assert accuracy("melody", ending) > 0.9
    pairs = np.array([contour(f0)[-1] for f0 in pitches("melody", "test")]).reshape(-1, 2)
    assert (pairs[:, 0] > pairs[:, 1]).mean() > 0.9


def test_a_word_that_is_emphasised_is_high():
    assert accuracy("emphasis", contour) > 0.85
    turns = np.array([contour(f0, 24) for f0 in pitches("emphasis", "test")]).reshape(-1, 3, 24)
    highest = (turns - turns.mean(axis=1, keepdims=True)).argmax(
        axis=2
    )  # compared with the other two labels of the same words
    assert (np.diff(highest, axis=1) > 0).mean() > 0.75


def test_style_is_rate_and_range():
    assert accuracy("style", lambda f0: (np.log(len(f0)), np.log(np.nanstd(f0)))) > 0.9


@pytest.mark.parametrize("name", ["melody", "emphasis"])
def test_absolute_pitch_and_duration_do_not_predict_the_label(name):
    chance = 1 / len(synthesize.TASKS[name].slots[0].labels)
    assert accuracy(name, lambda f0: (len(f0), np.nanmean(f0))) < chance + 0.2
