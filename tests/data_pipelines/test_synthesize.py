"""Synthesised speech: texts, voices, and reproducibility of a corpus."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipelines import espeak, spoken_tasks, synthesize
from data_pipelines.splits import checked
from data_pipelines.synthesize import SynthesisConfig

pytest.importorskip("espeakng_loader", reason="the demo's voice is optional (the extra demo)")

CONFIG = SynthesisConfig(train=30, valid=8, test=12)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("speech")
    synthesize.synthesize(out, CONFIG)
    return out


def test_voices_are_human_and_of_both_genders() -> None:
    voices = espeak.voices()
    assert set(voices) == {"male", "female"}
    assert min(map(len, voices.values())) >= 10
    assert not any("robo" in name.lower() or "whisper" in name for names in voices.values() for name in names)


def test_duration_depends_on_text_and_rate() -> None:
    short, long = (len(espeak.say(text, "en-us", "m1")) for text in ("stop", "stop the music in the kitchen right now"))
    assert long > 1.5 * short
    slow, fast = (len(espeak.say("one two three four", "en-us", "f1", espeak.Manner(rate))) for rate in (120, 240))
    assert slow > 1.5 * fast


def test_an_unknown_voice_or_language_is_refused() -> None:
    with pytest.raises(espeak.SpeechError, match="no voice 'm1' of language 'xx-nowhere'"):
        espeak.say("hello", "xx-nowhere", "m1")
    with pytest.raises(espeak.SpeechError, match="returns silence for ' '"):
        espeak.say(" ", "en-us", "m1")


def test_data_on_a_long_path_is_copied_to_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import espeakng_loader

    long = tmp_path / ("d" * 120) / "espeak-ng-data"
    (long / "voices").mkdir(parents=True)
    (long / "voices" / "one").write_text("x")
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(long))
    monkeypatch.setattr(espeak.tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    for _ in range(2):
        found = espeak.data_path()
        assert found.name == "espeak-ng-data"
        assert found.parent.parent == tmp_path / "t"
        assert (found / "voices" / "one").read_text() == "x"


@pytest.mark.parametrize("name", synthesize.TASKS)
def test_clips_match_their_metadata(corpora: Path, name: str) -> None:
    splits = checked(synthesize.clips(corpora / name), synthesize.TASKS[name])  # checks labels and unique ids
    turn = {"melody": 2, "emphasis": 3, "style": 4}.get(name, 1)  # utterances of a sentence, which stay together
    sizes = {split: -(-asked // turn) * turn for split, asked in {"train": 30, "valid": 8, "test": 12}.items()}
    assert {split: len(clips) for split, clips in splits.items()} == sizes
    for clips in splits.values():
        for clip in clips:
            wave, rate = soundfile.read(corpora / name / clip.path, dtype="int16")
            assert rate == 16_000
            assert 0.1 * rate < len(wave) < 8 * rate
            assert 2000 < np.abs(wave.astype(int)).max() < 32768


def test_no_voice_speaks_in_two_splits(corpora: Path) -> None:
    speakers: dict[str, set[str]] = {"train": set(), "valid": set(), "test": set()}
    for name in synthesize.TASKS:
        for split, clips in synthesize.clips(corpora / name).items():
            speakers[split] |= {clip.speaker for clip in clips if clip.speaker}
    assert all(len(some) >= 4 for some in speakers.values())
    assert sum(map(len, speakers.values())) == len(set.union(*speakers.values()))


def test_gender_is_the_voices(corpora: Path) -> None:
    for clips in synthesize.clips(corpora / "gender").values():
        assert all(clip.speaker in espeak.voices()[clip.labels[0]] for clip in clips)


def test_the_same_request_gives_the_same_samples(corpora: Path, tmp_path: Path) -> None:
    """Independent of the other tasks: each is made in a separate process."""
    synthesize.synthesize(tmp_path, CONFIG, ["intents"])
    hashes = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (place / "intents" / "test").iterdir()}
        for place in (corpora, tmp_path)
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0].values())) == 12


def test_existing_corpora_are_kept_and_missing_ones_made(corpora: Path) -> None:
    kept = (corpora / "gender" / "clips.jsonl").stat().st_mtime_ns
    shutil.rmtree(corpora / "voice_activity")
    synthesize.synthesize(corpora, CONFIG)
    assert (corpora / "gender" / "clips.jsonl").stat().st_mtime_ns == kept
    assert (corpora / "voice_activity" / "clips.jsonl").exists()
    with pytest.raises(ValueError, match=r"was made with .*'train': 30.*remove it, or use another directory"):
        synthesize.synthesize(corpora, SynthesisConfig(train=31))


def test_no_partial_corpus_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthesize, "utterance", full)
    with pytest.raises(OSError, match="No space"):
        synthesize._make_task("gender", str(tmp_path), CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_noise_alone_differs_from_speech_and_from_itself() -> None:
    rng = np.random.default_rng(0)
    noises = [synthesize._noise(rng, 16_000) for _ in range(20)]
    assert all(noise.std() == pytest.approx(1) for noise in noises)
    assert np.abs(np.corrcoef(noises) - np.eye(20)).max() < 0.5


def test_every_label_is_drawn() -> None:
    for name, task in spoken_tasks.TASKS.items():
        seen: Counter[tuple[int, str]] = Counter()
        rng = np.random.default_rng(1)
        for _ in range(2000):
            for line in spoken_tasks.lines(name, rng):
                seen.update(enumerate(line.labels))
        for slot, row in enumerate(task.slots):
            assert {label for number, label in seen if number == slot} == set(row.labels), name


def test_corpora_do_not_change_between_releases() -> None:
    """Corpora of older releases and of this one are equal."""
    digest = hashlib.sha256()
    for name in ("commands", "intents", "language", "gender", "accent", "voice_activity"):
        rng = np.random.default_rng(5)
        for _ in range(100):
            (line,) = spoken_tasks.lines(name, rng)
            assert (line.rate, line.range) == ((140, 200), (35, 66))
            digest.update("|".join([*line.labels, line.text, line.language, line.gender, str(line.snr)]).encode())
    assert digest.hexdigest() == "8e9044336c2969ce72f22e399587c9295a31f6941854aba239e65fa17369df03"


def test_plain_text_is_not_parsed_as_markup() -> None:
    plain, marked = (espeak.say(text, "en-us", "m1") for text in ("a < b", "<speak>a < b</speak>"))
    assert len(plain) != len(marked)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--train=2", "--valid=1", "--test=1"]
    synthesize.main([f"--out={tmp_path}", "--tasks=voice_activity", *sizes])
    lines = (tmp_path / "voice_activity" / "clips.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["config"] == {"train": 2, "valid": 1, "test": 1, "seed": 0}
    assert len(lines) == 5
    with pytest.raises(SystemExit, match="error: task 'singing' is not synthesised: choose commands, intents"):
        synthesize.main([f"--out={tmp_path}", "--tasks=singing"])
    with pytest.raises(SystemExit, match="synthesis: train is 0, must be at least 1"):
        synthesize.main([f"--out={tmp_path}", "--train=0"])


def test_an_interrupted_utterance_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors in the engine's callback are raised by `say`, not lost in the library."""
    espeak.say("hello", "en-us", "m1")
    calls = iter([False, True, False, False])

    def copied(wave: object, shape: tuple[int]) -> np.ndarray:
        if next(calls, False):
            raise KeyboardInterrupt
        return np.ones(shape, np.int16)

    with monkeypatch.context() as patched:
        patched.setattr(espeak.np.ctypeslib, "as_array", copied)
        with pytest.raises(KeyboardInterrupt):
            espeak.say("turn on the lights in the kitchen and the bedroom", "en-us", "m1")
    assert len(espeak.say("stop", "en-us", "m1")) > 1000


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".gender.0123.tmp").mkdir()
    synthesize.synthesize(tmp_path, SynthesisConfig(train=1, valid=1, test=1), ["gender"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gender"]
