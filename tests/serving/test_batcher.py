"""The desk: what gathers is answered together and as it would be alone; what is bad or gone disturbs nobody."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from spjax import SpeechPrompt
from spjax.serving.batcher import Answered, Batcher, Busy, as_json
from spjax.serving.limits import Limits, TooLargeError
from spjax.serving.uploads import read_upload
from spjax.speech2unit import libav
from spjax.speech2unit.audio import Audio, AudioError, prepare
from spjax.speech2unit.encoder import load_encoder
from spjax.storage import KMeans, save_encoder, save_kmeans
from spjax.types import Encoded
from tests.serving import world
from tests.serving.page_world import predictor as make_predictor
from tests.speech2unit import bad_files, recordings
from tests.speech2unit.hubert_models import TINY, speechlike, weights

pytestmark = pytest.mark.usefixtures("quick_compile")
LIMITS = Limits(timeout=600.0)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> SpeechPrompt:
    return make_predictor(tmp_path_factory.mktemp("desk"))


@pytest.fixture(scope="module")
def desk(predictor: SpeechPrompt) -> Iterator[Batcher]:
    with Batcher(predictor, LIMITS) as desk:
        yield desk


def audio(seed: int, samples: int = 4000) -> Audio:
    return prepare(speechlike(samples, seed), 16_000)


def upload(seed: int = 0, samples: int = 4000, **settings: Any) -> bytes:
    return bad_files.encoded(speechlike(samples, seed)[:, None].astype(float), **settings)


def assert_same(found: Answered, predictor: SpeechPrompt, said: Audio, tasks: Any) -> None:
    (encoded,) = predictor.encode([said])
    (expected,) = predictor.predict_units([encoded], tasks)
    assert found.encoded.units.tolist() == encoded.units.tolist()
    assert list(found.answers) == list(expected)
    for name, answer in expected.items():
        assert found.answers[name]["labels"] == answer["labels"]
        assert np.abs(world.shares(found.answers[name]) - world.shares(answer)).max() < 1e-5


class Held:
    """A predictor that waits for a sign before it answers; it remembers what it was asked together."""

    def __init__(self, predictor: SpeechPrompt, breaks: Any = None) -> None:
        self.predictor, self.breaks = predictor, breaks
        self.go, self.batches = threading.Event(), []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.predictor, name)

    def encode(self, audios: list[Audio]) -> Any:
        assert self.go.wait(30)
        return self.predictor.encode(audios)

    def predict_units(self, units: Any, asked: Any) -> Any:
        self.batches.append([tuple(names) for names in asked])
        if self.breaks is not None and any(self.breaks in names for names in asked):
            raise RuntimeError("out of memory")
        return self.predictor.predict_units(units, asked)


def test_many_clients_are_answered_together_and_as_if_alone(predictor: SpeechPrompt):
    held, names = Held(predictor), list(predictor.packs)
    with Batcher(held, LIMITS) as desk:  # type: ignore[arg-type]
        first = desk.submit(audio(0), ["word"])
        while not desk.stats().working:
            wait([first], 0.01)
        asked = [(audio(seed), [names[seed % 3], names[-1]]) for seed in range(5)]
        futures = [desk.submit(said, tasks) for said, tasks in asked]
        assert (desk.stats().waiting, desk.stats().working) == (5, 1)
        held.go.set()
        for (said, tasks), future in zip(asked, futures, strict=True):
            assert_same(future.result(30), predictor, said, tasks)
        assert_same(first.result(30), predictor, audio(0), "word")
        stats = desk.stats()
    assert [len(batch) for batch in held.batches] == [1, 5]
    assert (stats.waiting, stats.answered, stats.rows, stats.utterances) == (0, 6, {1: 1, 10: 1}, {1: 1, 5: 1})


@settings(max_examples=15)
@given(
    most_rows=st.integers(1, 9),
    asked=st.lists(
        st.lists(st.sampled_from(["word", "mood", "order"]), min_size=1, unique=True), min_size=1, max_size=8
    ),
)
def test_no_batch_has_more_rows_than_may_be_unless_it_is_one_utterance(predictor, most_rows, asked):
    held, said = Held(predictor), audio(1)
    with Batcher(held, LIMITS, most_rows) as desk:
        futures = [desk.submit(said, names) for names in asked]
        held.go.set()
        found = [future.result(30) for future in futures]
    assert all(sum(map(len, batch)) <= most_rows for batch in held.batches)
    assert [list(one.answers) for one in found] == asked
    assert sum(len(names) for batch in held.batches for names in batch) == sum(map(len, asked))


def test_all_tasks_are_answered_when_none_are_named_and_each_once(desk: Batcher, predictor: SpeechPrompt):
    assert_same(desk.answer(audio(2)), predictor, audio(2), None)
    assert list(desk.answer(audio(2), ["mood", "word", "mood"]).answers) == ["mood", "word"]


def test_uploads_are_read_as_bytes_and_from_files(desk: Batcher, predictor: SpeechPrompt, tmp_path: Path):
    data = upload(3, kind="FLAC")
    file = tmp_path / "said.flac"
    file.write_bytes(data)
    for given_as in (data, file, str(file)):
        assert_same(desk.answer(given_as, ["word"]), predictor, read_upload(data, LIMITS), "word")


def test_what_is_bad_is_told_and_disturbs_nobody(desk: Batcher, predictor: SpeechPrompt):
    bad = {kind: data for kind, (_, data) in bad_files.contents().items()}
    good = [desk.submit(audio(seed), ["word"]) for seed in range(3)]
    told = {kind: desk.submit(data) for kind, data in bad.items()}
    good += [desk.submit(audio(seed), ["word"]) for seed in range(3, 6)]
    for kind, future in told.items():
        error = future.exception(30)
        assert isinstance(error, ValueError), kind
        assert any(word in str(error) for word in ("upload", "recording")), f"{kind}: {error}"
        assert "/" not in str(error).replace("MPEG 1/2", ""), f"{kind}: {error}"  # of a folder of this machine
    for seed, future in enumerate(good):
        assert_same(future.result(30), predictor, audio(seed), "word")


def test_a_missing_file_is_told_by_its_name(desk: Batcher, tmp_path: Path):
    with pytest.raises(AudioError, match=r"^gone\.wav is no file that is there"):
        desk.answer(tmp_path / "gone.wav")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (lambda: bytes(1_000_001), "larger than 1 MB"),
        (lambda: upload(samples=16_000 * 4), "lasts 4 s, 3 s are the most"),
        (lambda: bad_files.encoded(np.zeros((16_000 * 3600, 1)), kind="FLAC"), "lasts 3600 s, 3 s are the most"),
        # header alone: a promise of hours
        (lambda: bad_files.wav(bytes(1000), rate=1000, bits=8, promised=50_000_000), "lasts|cut off"),
    ],
    ids=["bytes", "seconds", "an hour of silence", "a promise"],
)
def test_what_is_too_large_is_refused_by_its_header(predictor, data: Any, told: str):
    limits = Limits(max_bytes=1_000_000, max_seconds=3.0)
    with pytest.raises((TooLargeError, AudioError), match=told):
        read_upload(data(), limits)


def test_channels_count_as_sound(predictor):
    data = bad_files.encoded(np.zeros((3 * 400_000, 8)), rate=400_000, kind="FLAC")
    with pytest.raises(AudioError, match="8 channels of 400000 samples a second"):
        read_upload(data, Limits(max_seconds=3.0))


def test_samples_in_memory_are_held_to_the_limit(predictor: SpeechPrompt):
    with Batcher(predictor, Limits(max_seconds=0.2)) as desk, pytest.raises(TooLargeError, match=r"lasts 0\.25 s"):
        desk.submit(audio(0))


def test_more_units_than_the_predictor_takes(tmp_path: Path):
    import dataclasses

    short = dataclasses.replace(make_predictor(tmp_path), max_units=4)
    with Batcher(short, LIMITS) as desk, pytest.raises(TooLargeError, match="more than 4 units"):
        desk.answer(audio(0), ["word"])


def test_unknown_tasks_and_none(desk: Batcher):
    with pytest.raises(ValueError, match="no task 'wrod', 'x': there are word, mood"):
        desk.submit(audio(0), ["word", "wrod", "x"])
    with pytest.raises(ValueError, match="no tasks are asked for: there are word"):
        desk.submit(audio(0), [])


def test_a_full_queue_sends_away_and_takes_again(predictor: SpeechPrompt):
    held = Held(predictor)
    with Batcher(held, Limits(queue=3)) as desk:  # type: ignore[arg-type]
        futures = [desk.submit(audio(seed), ["word"]) for seed in range(3)]
        with pytest.raises(Busy, match="3 utterances wait, the most that may"):
            desk.submit(audio(3), ["word"])
        held.go.set()
        wait(futures)
        assert desk.answer(audio(3), ["word"]).answers
        assert desk.stats().answered == 4


def test_who_left_costs_nothing(predictor: SpeechPrompt):
    held = Held(predictor)
    with Batcher(held, Limits(queue=3)) as desk:  # type: ignore[arg-type]
        first = desk.submit(audio(0), ["word"])
        while not desk.stats().working:
            wait([first], 0.01)
        left = [desk.submit(audio(1), ["mood"]), desk.submit(upload(2), ["mood"])]
        assert all(future.cancel() for future in left)
        stays = desk.submit(audio(3), ["order"])  # their places are free again
        assert desk.stats().waiting == 1
        held.go.set()
        assert first.result(30)
        assert stays.result(30)
    assert held.batches == [[("word",)], [("order",)]]


def test_a_batch_that_fails_is_answered_one_by_one(predictor: SpeechPrompt, caplog: pytest.LogCaptureFixture):
    held = Held(predictor, breaks="mood")
    with Batcher(held, LIMITS) as desk:  # type: ignore[arg-type]
        first = desk.submit(audio(0), ["word"])
        while not desk.stats().working:
            wait([first], 0.01)
        futures = {name: desk.submit(audio(1), [name]) for name in ("word", "mood", "order")}
        held.go.set()
        for name in ("word", "order"):
            assert_same(futures[name].result(30), predictor, audio(1), name)
        with pytest.raises(RuntimeError, match="its log says why"):
            futures["mood"].result(30)
        assert desk.stats().failed == 1
        assert desk.answer(audio(2), ["word"])
    assert "out of memory" in caplog.text


def test_an_answer_that_takes_too_long_is_given_up(predictor: SpeechPrompt):
    held = Held(predictor)
    with Batcher(held, Limits(timeout=0.05)) as desk:  # type: ignore[arg-type]
        first = desk.submit(audio(0), ["word"])
        while not desk.stats().working:
            wait([first], 0.01)
        with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
            desk.answer(audio(1), ["mood"])
        held.go.set()
    assert held.batches == [[("word",)]]


def test_closing_answers_what_was_taken_on_and_takes_nothing_new(predictor: SpeechPrompt):
    held = Held(predictor)
    desk = Batcher(held, LIMITS)  # type: ignore[arg-type]
    futures: list[Future[Answered]] = [desk.submit(audio(0), ["word"]), desk.submit(upload(1), ["mood"])]
    desk.refuse()
    with pytest.raises(Busy, match="stopping"):
        desk.submit(audio(2))
    closing = threading.Thread(target=desk.close)
    closing.start()
    assert not any(future.done() for future in futures)
    held.go.set()
    closing.join(30)
    assert all(future.done() and future.result() for future in futures)
    assert not desk.stats().open
    desk.close()  # again: nothing to do


def test_many_threads_at_once(desk: Batcher, predictor: SpeechPrompt):
    """Each client gets its own answer, whoever else asks."""
    expected = {seed: predictor.predict([audio(seed, 2000)], ["word", "order"])[0] for seed in range(6)}
    wrong: list[int] = []

    def client(seed: int) -> None:
        for _ in range(3):
            found = desk.answer(upload(seed, 2000, subtype="FLOAT"), ["word", "order"]).answers
            if any(found[name]["labels"] != expected[seed][name]["labels"] for name in found):
                wrong.append(seed)

    threads = [threading.Thread(target=client, args=(seed % 6,)) for seed in range(18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert desk.stats().waiting == desk.stats().working == 0


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of what is compiled, or read from the compilation cache, meanwhile."""
    made: list[str] = []

    def heard(event: str, _: float, **told: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            made.append(str(told.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield made
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


def test_warming_up_leaves_nothing_to_compile(tmp_path: Path):
    """Of a HuBERT, whose programs are many: no recording of any length compiles one, nor do several at once."""
    folder = hubert_folder(tmp_path)
    model = world.lm()
    packs = {"word": world.pack(world.TASKS["word"], model)}
    predictor = SpeechPrompt.load(model, load_encoder(folder / "h", folder / "km", layer=1), packs, max_units=40)
    longest = 12_000  # 37 frames
    held = Held(predictor)
    held.go.set()
    with Batcher(held, Limits(max_seconds=longest / 16_000)) as desk:  # type: ignore[arg-type]
        with compilations() as made:
            desk.warm_up()
        assert len(made) > 10
        with compilations() as late:
            for samples in [400, *range(5000, longest, 320), longest]:  # a frame more each
                desk.answer(audio(samples, samples))
            held.go.clear()
            together = [desk.submit(audio(n, 6000 + n)) for n in range(8)]
            held.go.set()
            assert all(one.result(60).answers for one in together)
            assert max(desk.stats().utterances) > 1
    assert late == []


def hubert_folder(folder: Path) -> Path:
    """A tiny HuBERT `h` and a k-means `km` of its first layer."""
    save_encoder(folder / "h", TINY, weights(), "tiny")
    frames = load_encoder(folder / "h", layer=1).features([speechlike(16_000)])[0]
    save_kmeans(folder / "km", KMeans(frames[:30], {"encoder": "tiny", "layer": 1}))
    return folder


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_desk_whose_thread_died_takes_nothing(predictor: SpeechPrompt):
    class Deadly(Held):
        def encode(self, audios: list[Audio]) -> Any:
            raise SystemExit  # no Exception: nothing catches it

    with Batcher(Deadly(predictor), LIMITS) as desk:  # type: ignore[arg-type]
        assert desk.stats().open
        desk.submit(audio(0))
        desk._worker.join(30)
        assert not desk.stats().open
        with pytest.raises(Busy, match="is broken, and must be started again"):
            desk.submit(audio(1))


def test_answers_as_json(predictor: SpeechPrompt):
    units, durations = np.array([3, 1], np.int32), np.array([2, 5], np.int32)
    plain = as_json(Answered(Encoded(units, durations), {"word": {}}))
    assert plain == {"answers": {"word": {}}, "units": [3, 1], "durations": [2, 5]}
    spoken = as_json(Answered(Encoded(units, durations, np.array([0.5, 0], np.float32)), {"word": {}}))
    assert spoken == plain | {"f0": [0.5, 0.0]}
    noted = as_json(Answered(Encoded(units, durations, notes=("channels cancel",)), {"word": {}}))
    assert noted == plain | {"notes": ["channels cancel"]}


def test_what_was_put_right_is_noted(predictor: SpeechPrompt):
    data = bytearray(recordings.whole()["WAV"])
    data[40:44] = bytes(4)
    (encoded,) = predictor.encode([read_upload(bytes(data), LIMITS)])
    assert encoded.notes == ("its length field says 0 bytes, 64000 are there: read to the end",)


@pytest.mark.parametrize("kind", ["WebM live", "ADTS", "MP3 no Xing", "M4A"])
def test_a_recording_that_does_not_say_how_long_it_is_is_decoded_up_to_the_limit(
    kind: str, monkeypatch: pytest.MonkeyPatch
):
    decoded = []
    original = libav.Stream._samples
    monkeypatch.setattr(libav.Stream, "_samples", lambda *a: decoded.append(original(*a)) or decoded[-1])
    with pytest.raises(TooLargeError, match=r"0\.5 s are the most"):
        read_upload(recordings.whole()[kind], Limits(max_seconds=0.5))
    assert sum(map(len, decoded)) < 0.6 * 48_000


@pytest.mark.parametrize("kind", bad_files.contents())
def test_what_is_wrong_is_told_to_who_has_one_recording(kind: str):
    """Not to who makes a data set, and might leave one out."""
    with pytest.raises((AudioError, TooLargeError)) as caught:
        read_upload(bad_files.contents()[kind][1], LIMITS)
    assert not re.search("leave it out|source", str(caught.value), re.IGNORECASE)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_bytes": 0},
        {"max_bytes": 1.5},
        {"max_seconds": 0},
        {"queue": 0},
        {"timeout": float("nan")},
        {"queue": True},
    ],
)
def test_limits_are_numbers_above_zero(wrong: dict[str, Any]):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is .*: give"):
        Limits(**wrong)


def test_a_desk_wants_an_encoder_and_rows(predictor: SpeechPrompt):
    model = world.lm()
    with pytest.raises(ValueError, match="no encoder"):
        Batcher(SpeechPrompt.load(model, None, world.packs(model)), LIMITS)
    with pytest.raises(ValueError, match="most_rows is 0"):
        Batcher(predictor, LIMITS, 0)


def test_an_hour_of_silence_is_refused_without_being_decoded(monkeypatch: pytest.MonkeyPatch):
    data = bad_files.encoded(np.zeros((16_000 * 3600, 1)), kind="FLAC")
    assert len(data) < 10_000_000 < 16_000 * 3600
    monkeypatch.setattr("spjax.speech2unit.audio._read", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(TooLargeError):
        read_upload(data, Limits())
    assert soundfile.info(io.BytesIO(data)).duration == 3600
