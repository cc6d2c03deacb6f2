"""The batcher: requests are batched without changing their answers, and bad or cancelled ones affect no other."""

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
from spjax.encoders import libav
from spjax.encoders.audio import Audio, AudioError, prepare
from spjax.encoders.encoder import load_encoder
from spjax.io import KMeans, save_encoder, save_kmeans
from spjax.serving.batcher import Batcher, Prediction, QueueFullError, as_json
from spjax.serving.limits import Limits, TooLargeError
from spjax.serving.uploads import read_upload
from spjax.types import Encoded
from tests.encoders import bad_files, recordings
from tests.encoders.hubert_models import TINY, speechlike, weights
from tests.serving import world
from tests.serving.page_world import predictor as make_predictor

pytestmark = pytest.mark.usefixtures("quick_compile")
LIMITS = Limits(timeout=600.0)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> SpeechPrompt:
    return make_predictor(tmp_path_factory.mktemp("batcher"))


def audio(seed: int, samples: int = 4000) -> Audio:
    return prepare(speechlike(samples, seed), 16_000)


def upload(seed: int = 0, samples: int = 4000, **settings: Any) -> bytes:
    return bad_files.encoded(speechlike(samples, seed)[:, None].astype(float), **settings)


def assert_same(found: Prediction, predictor: SpeechPrompt, utterance: Audio, tasks: Any) -> None:
    (encoded,) = predictor.encode([utterance])
    (expected,) = predictor.predict_units([encoded], tasks)
    assert found.encoded.units.tolist() == encoded.units.tolist()
    assert list(found.answers) == list(expected)
    for name, answer in expected.items():
        assert found.answers[name]["labels"] == answer["labels"]
        assert np.abs(world.shares(found.answers[name]) - world.shares(answer)).max() < 1e-5


class Held:
    """A predictor that waits for an event before it answers, and records its calls."""

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


def test_batching_does_not_change_answers(predictor: SpeechPrompt):
    held, names = Held(predictor), list(predictor.packs)
    with Batcher(held, LIMITS) as batcher:  # type: ignore[arg-type]
        first = batcher.submit(audio(0), ["word"])
        while not batcher.stats().working:
            wait([first], 0.01)
        asked = [(audio(seed), [names[seed % 3], names[-1]]) for seed in range(5)]
        futures = [batcher.submit(utterance, tasks) for utterance, tasks in asked]
        assert (batcher.stats().waiting, batcher.stats().working) == (5, 1)
        held.go.set()
        for (utterance, tasks), future in zip(asked, futures, strict=True):
            assert_same(future.result(30), predictor, utterance, tasks)
        assert_same(first.result(30), predictor, audio(0), "word")
        stats = batcher.stats()
    assert [len(batch) for batch in held.batches] == [1, 5]
    assert (stats.waiting, stats.answered, stats.rows, stats.utterances) == (0, 6, {1: 1, 10: 1}, {1: 1, 5: 1})


@settings(max_examples=15)
@given(
    most_rows=st.integers(1, 9),
    asked=st.lists(
        st.lists(st.sampled_from(["word", "mood", "order"]), min_size=1, unique=True), min_size=1, max_size=8
    ),
)
def test_batches_are_limited_in_rows(predictor, most_rows, asked):
    held, utterance = Held(predictor), audio(1)
    with Batcher(held, LIMITS, most_rows) as batcher:
        futures = [batcher.submit(utterance, names) for names in asked]
        held.go.set()
        found = [future.result(30) for future in futures]
    assert all(sum(map(len, batch)) <= most_rows for batch in held.batches)
    assert [list(one.answers) for one in found] == asked
    assert sum(len(names) for batch in held.batches for names in batch) == sum(map(len, asked))


def test_all_tasks_by_default_and_each_once(batcher: Batcher, predictor: SpeechPrompt):
    assert_same(batcher.answer(audio(2)), predictor, audio(2), None)
    assert list(batcher.answer(audio(2), ["mood", "word", "mood"]).answers) == ["mood", "word"]


def test_uploads_are_read_as_bytes_and_from_files(batcher: Batcher, predictor: SpeechPrompt, tmp_path: Path):
    data = upload(3, kind="FLAC")
    file = tmp_path / "said.flac"
    file.write_bytes(data)
    for given_as in (data, file, str(file)):
        assert_same(batcher.answer(given_as, ["word"]), predictor, read_upload(data, LIMITS), "word")


def test_bad_uploads_affect_no_other(batcher: Batcher, predictor: SpeechPrompt):
    bad = {kind: data for kind, (_, data) in bad_files.contents().items()}
    good = [batcher.submit(audio(seed), ["word"]) for seed in range(3)]
    futures = {kind: batcher.submit(data) for kind, data in bad.items()}
    good += [batcher.submit(audio(seed), ["word"]) for seed in range(3, 6)]
    for kind, future in futures.items():
        error = future.exception(30)
        assert isinstance(error, ValueError), kind
        assert any(word in str(error) for word in ("upload", "recording")), f"{kind}: {error}"
        assert "/" not in str(error).replace("MPEG 1/2", ""), f"{kind}: {error}"  # no folder of this machine
    for seed, future in enumerate(good):
        assert_same(future.result(30), predictor, audio(seed), "word")


def test_a_missing_file_is_reported_by_name(batcher: Batcher, tmp_path: Path):
    with pytest.raises(AudioError, match=r"^gone\.wav does not exist"):
        batcher.answer(tmp_path / "gone.wav")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: bytes(1_000_001), "larger than 1 MB"),
        (lambda: upload(samples=16_000 * 4), "lasts 4 s, at most 3 s"),
        (lambda: bad_files.encoded(np.zeros((16_000 * 3600, 1)), kind="FLAC"), "lasts 3600 s, at most 3 s"),
        # the header alone, which promises hours
        (lambda: bad_files.wav(bytes(1000), rate=1000, bits=8, promised=50_000_000), "lasts|cut off"),
    ],
    ids=["bytes", "seconds", "an hour of silence", "a promise"],
)
def test_too_large_uploads_are_refused_by_their_header(predictor, data: Any, message: str):
    limits = Limits(max_bytes=1_000_000, max_seconds=3.0)
    with pytest.raises((TooLargeError, AudioError), match=message):
        read_upload(data(), limits)


def test_channels_count_towards_the_limit(predictor):
    data = bad_files.encoded(np.zeros((3 * 400_000, 8)), rate=400_000, kind="FLAC")
    with pytest.raises(AudioError, match="8 channels of 400000 samples a second"):
        read_upload(data, Limits(max_seconds=3.0))


def test_samples_in_memory_are_limited(predictor: SpeechPrompt):
    with Batcher(predictor, Limits(max_seconds=0.2)) as batcher, pytest.raises(TooLargeError, match=r"lasts 0\.25 s"):
        batcher.submit(audio(0))


def test_more_units_than_the_predictor_takes(tmp_path: Path):
    import dataclasses

    short = dataclasses.replace(make_predictor(tmp_path), max_units=4)
    with Batcher(short, LIMITS) as batcher, pytest.raises(TooLargeError, match="more than 4 units"):
        batcher.answer(audio(0), ["word"])


def test_unknown_tasks_and_none(batcher: Batcher):
    with pytest.raises(ValueError, match="unknown task 'wrod', 'x': there are word, mood"):
        batcher.submit(audio(0), ["word", "wrod", "x"])
    with pytest.raises(ValueError, match="no tasks are requested: there are word"):
        batcher.submit(audio(0), [])


def test_a_full_queue_refuses_and_recovers(predictor: SpeechPrompt):
    held = Held(predictor)
    with Batcher(held, Limits(queue=3)) as batcher:  # type: ignore[arg-type]
        futures = [batcher.submit(audio(seed), ["word"]) for seed in range(3)]
        with pytest.raises(QueueFullError, match=r"queue is full \(3 utterances\)"):
            batcher.submit(audio(3), ["word"])
        held.go.set()
        wait(futures)
        assert batcher.answer(audio(3), ["word"]).answers
        assert batcher.stats().answered == 4


def test_cancelled_requests_are_not_computed(predictor: SpeechPrompt):
    held = Held(predictor)
    with Batcher(held, Limits(queue=3)) as batcher:  # type: ignore[arg-type]
        first = batcher.submit(audio(0), ["word"])
        while not batcher.stats().working:
            wait([first], 0.01)
        left = [batcher.submit(audio(1), ["mood"]), batcher.submit(upload(2), ["mood"])]
        assert all(future.cancel() for future in left)
        stays = batcher.submit(audio(3), ["order"])  # cancelled requests leave the queue
        assert batcher.stats().waiting == 1
        held.go.set()
        assert first.result(30)
        assert stays.result(30)
    assert held.batches == [[("word",)], [("order",)]]


def test_a_failed_batch_is_retried_one_by_one(predictor: SpeechPrompt, caplog: pytest.LogCaptureFixture):
    held = Held(predictor, breaks="mood")
    with Batcher(held, LIMITS) as batcher:  # type: ignore[arg-type]
        first = batcher.submit(audio(0), ["word"])
        while not batcher.stats().working:
            wait([first], 0.01)
        futures = {name: batcher.submit(audio(1), [name]) for name in ("word", "mood", "order")}
        held.go.set()
        for name in ("word", "order"):
            assert_same(futures[name].result(30), predictor, audio(1), name)
        with pytest.raises(RuntimeError, match="the server log"):
            futures["mood"].result(30)
        assert batcher.stats().failed == 1
        assert batcher.answer(audio(2), ["word"])
    assert "out of memory" in caplog.text


def test_timeout(predictor: SpeechPrompt):
    held = Held(predictor)
    with Batcher(held, Limits(timeout=0.05)) as batcher:  # type: ignore[arg-type]
        first = batcher.submit(audio(0), ["word"])
        while not batcher.stats().working:
            wait([first], 0.01)
        with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
            batcher.answer(audio(1), ["mood"])
        held.go.set()
    assert held.batches == [[("word",)]]


def test_closing_answers_queued_requests_and_refuses_new_ones(predictor: SpeechPrompt):
    held = Held(predictor)
    batcher = Batcher(held, LIMITS)  # type: ignore[arg-type]
    futures: list[Future[Prediction]] = [batcher.submit(audio(0), ["word"]), batcher.submit(upload(1), ["mood"])]
    batcher.refuse()
    with pytest.raises(QueueFullError, match="stopping"):
        batcher.submit(audio(2))
    closing = threading.Thread(target=batcher.close)
    closing.start()
    assert not any(future.done() for future in futures)
    held.go.set()
    closing.join(30)
    assert all(future.done() and future.result() for future in futures)
    assert not batcher.stats().open
    batcher.close()  # closing twice is allowed


def test_many_threads_at_once(batcher: Batcher, predictor: SpeechPrompt):
    """Each client gets its own answer."""
    expected = {seed: predictor.predict([audio(seed, 2000)], ["word", "order"])[0] for seed in range(6)}
    wrong: list[int] = []

    def client(seed: int) -> None:
        for _ in range(3):
            found = batcher.answer(upload(seed, 2000, subtype="FLOAT"), ["word", "order"]).answers
            if any(found[name]["labels"] != expected[seed][name]["labels"] for name in found):
                wrong.append(seed)

    threads = [threading.Thread(target=client, args=(seed % 6,)) for seed in range(18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert batcher.stats().waiting == batcher.stats().working == 0


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the programs that are compiled, or read from the compilation cache, inside the block."""
    made: list[str] = []

    def record(event: str, _: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            made.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        yield made
    finally:
        jax.monitoring.unregister_event_duration_listener(record)


def test_warming_up_leaves_nothing_to_compile(tmp_path: Path):
    """With a HuBERT, which has many programs: no recording of any length compiles one, nor do several at once."""
    folder = hubert_folder(tmp_path)
    model = world.lm()
    packs = {"word": world.pack(world.TASKS["word"], model)}
    predictor = SpeechPrompt.load(model, load_encoder(folder / "h", folder / "km", layer=1), packs, max_units=40)
    longest = 12_000  # 37 frames
    held = Held(predictor)
    held.go.set()
    with Batcher(held, Limits(max_seconds=longest / 16_000)) as batcher:  # type: ignore[arg-type]
        with compilations() as made:
            batcher.warm_up()
        assert len(made) > 10
        with compilations() as late:
            for samples in [400, *range(5000, longest, 320), longest]:  # one frame more each
                batcher.answer(audio(samples, samples))
            held.go.clear()
            together = [batcher.submit(audio(n, 6000 + n)) for n in range(8)]
            held.go.set()
            assert all(one.result(60).answers for one in together)
            assert max(batcher.stats().utterances) > 1
    assert late == []


def hubert_folder(folder: Path) -> Path:
    """A tiny HuBERT `h` and a k-means `km` of its first layer."""
    save_encoder(folder / "h", TINY, weights(), "tiny")
    frames = load_encoder(folder / "h", layer=1).features([speechlike(16_000)])[0]
    save_kmeans(folder / "km", KMeans(frames[:30], {"encoder": "tiny", "layer": 1}))
    return folder


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_batcher_with_a_dead_worker_refuses_requests(predictor: SpeechPrompt):
    class Deadly(Held):
        def encode(self, audios: list[Audio]) -> Any:
            raise SystemExit  # not an Exception, so that nothing catches it

    with Batcher(Deadly(predictor), LIMITS) as batcher:  # type: ignore[arg-type]
        assert batcher.stats().open
        batcher.submit(audio(0))
        batcher._worker.join(30)
        assert not batcher.stats().open
        with pytest.raises(QueueFullError, match="is broken and must be restarted"):
            batcher.submit(audio(1))


def test_answers_as_json(predictor: SpeechPrompt):
    units, durations = np.array([3, 1], np.int32), np.array([2, 5], np.int32)
    plain = as_json(Prediction(Encoded(units, durations), {"word": {}}))
    assert plain == {"answers": {"word": {}}, "units": [3, 1], "durations": [2, 5]}
    spoken = as_json(Prediction(Encoded(units, durations, np.array([0.5, 0], np.float32)), {"word": {}}))
    assert spoken == plain | {"f0": [0.5, 0.0]}
    noted = as_json(Prediction(Encoded(units, durations, notes=("channels cancel",)), {"word": {}}))
    assert noted == plain | {"notes": ["channels cancel"]}


def test_repairs_are_noted(predictor: SpeechPrompt):
    data = bytearray(recordings.whole()["WAV"])
    data[40:44] = bytes(4)
    (encoded,) = predictor.encode([read_upload(bytes(data), LIMITS)])
    assert encoded.notes == ("its length field says 0 bytes, 64000 are there: read to the end",)


@pytest.mark.parametrize("kind", ["WebM live", "ADTS", "MP3 no Xing", "M4A"])
def test_a_recording_of_unknown_length_is_decoded_up_to_the_limit(kind: str, monkeypatch: pytest.MonkeyPatch):
    decoded = []
    original = libav.Stream._samples
    monkeypatch.setattr(libav.Stream, "_samples", lambda *a: decoded.append(original(*a)) or decoded[-1])
    with pytest.raises(TooLargeError, match=r"at most 0\.5 s"):
        read_upload(recordings.whole()[kind], Limits(max_seconds=0.5))
    assert sum(map(len, decoded)) < 0.6 * 48_000


@pytest.mark.parametrize("kind", bad_files.contents())
def test_error_messages_are_for_a_single_recording(kind: str):
    """Without the advice to leave it out, which is for data sets."""
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


def test_a_batcher_needs_an_encoder_and_rows(predictor: SpeechPrompt):
    model = world.lm()
    with pytest.raises(ValueError, match="needs an encoder"):
        Batcher(SpeechPrompt.load(model, None, world.packs(model)), LIMITS)
    with pytest.raises(ValueError, match="most_rows is 0"):
        Batcher(predictor, LIMITS, 0)


def test_an_hour_of_silence_is_refused_without_being_decoded(monkeypatch: pytest.MonkeyPatch):
    data = bad_files.encoded(np.zeros((16_000 * 3600, 1)), kind="FLAC")
    assert len(data) < 10_000_000 < 16_000 * 3600
    monkeypatch.setattr("spjax.encoders.audio._read", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(TooLargeError):
        read_upload(data, Limits())
    assert soundfile.info(io.BytesIO(data)).duration == 3600
