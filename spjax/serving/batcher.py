"""Dynamic batching: requests queue up while a batch is computed, and the next batch takes all that wait."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from spjax.encoders.audio import MIN_SAMPLES, SAMPLE_RATE, Audio, AudioError
from spjax.serving.limits import Limits, TooLargeError
from spjax.serving.predictor import GROUP_SECONDS, SpeechPrompt
from spjax.serving.uploads import read_upload
from spjax.types import Encoded

MOST_ROWS = 256  # of a batch, an utterance and a task each: bounds how long the next requests wait
DECODERS = 2  # threads, so that one slow upload does not block the others
WARM_STEPS = 12  # recording lengths per octave at warm-up: HuBERT pads to 8 per octave, the closest 1/15 apart

_log = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """The prediction for an utterance.

    Attributes:
      encoded: its units and durations.
      answers: labels and probabilities of each requested task, as `SpeechPrompt.predict_units` returns them.
    """

    encoded: Encoded
    answers: dict[str, Any]


class QueueFullError(Exception):
    """The queue is full, or the server accepts no more requests; the message says which."""


class Stats(NamedTuple):
    """Counters of a batcher.

    Attributes:
      open: whether requests are accepted: it is not closing, and its worker thread is alive.
      waiting: utterances that are queued.
      working: utterances in the batch being computed.
      answered: utterances answered so far.
      failed: batches so far that failed and were retried one utterance at a time.
      rows: number of batches so far by their rows (an utterance and a task each).
      utterances: number of batches so far by their utterances.
    """

    open: bool
    waiting: int
    working: int
    answered: int
    failed: int
    rows: dict[int, int]
    utterances: dict[int, int]


@dataclasses.dataclass(eq=False)
class _Request:
    tasks: tuple[str, ...]
    audio: Any  # the upload; Audio once it is decoded
    future: Future[Prediction] = dataclasses.field(default_factory=Future)
    taken: bool = False  # whether it is in a batch


class Batcher:
    """A request queue in front of a predictor; leaving the context manager answers the requests that are queued.

    A small thread pool decodes uploads, so that bad audio never reaches a batch. One worker thread computes: it takes
    all queued requests, up to `most_rows` rows, in one call of the predictor; requests that arrive meanwhile form the
    next batch. A request whose future is cancelled is dropped. If a batch fails, its requests are retried one by one,
    so that a bad request fails alone.

    Attributes:
      predictor: computes the predictions.
      limits: on requests.
      most_rows: the most rows of a batch; a single utterance with more tasks is split.
    """

    def __init__(self, predictor: SpeechPrompt, limits: Limits, most_rows: int = MOST_ROWS) -> None:
        if predictor.encoder is None:
            raise ValueError("serving speech needs an encoder, and the predictor has none: load it with one")
        if most_rows < 1:
            raise ValueError(f"most_rows is {most_rows}, must be 1 or more")
        self.predictor, self.limits, self.most_rows = predictor, limits, most_rows
        self._ready: collections.deque[_Request] = collections.deque()
        self._changed = threading.Condition()  # guards everything below, and the queue above
        self._open, self._pending, self._working, self._answered, self._failed = True, 0, 0, 0, 0
        self._rows: collections.Counter[int] = collections.Counter()
        self._utterances: collections.Counter[int] = collections.Counter()
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self._worker = threading.Thread(target=self._work, name="batches", daemon=True)
        self._worker.start()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def refuse(self) -> None:
        """Accept no more requests; those that are queued will be answered."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def close(self) -> None:
        """Accept no more requests, and answer those that are queued."""
        self.refuse()
        self._worker.join()
        self._decoders.shutdown()

    def check_open(self) -> None:
        """Raise QueueFullError if the batcher is closing or its worker thread has died."""
        if not self._open:
            raise QueueFullError("the server is stopping: try another one, or later")
        if not self._worker.is_alive():
            raise QueueFullError("the server is broken and must be restarted: try another one, or later")

    def stats(self) -> Stats:
        """The current counters."""
        with self._changed:
            return Stats(
                open=self._open and self._worker.is_alive(), waiting=self._pending - self._working,
                working=self._working, answered=self._answered, failed=self._failed,
                rows=dict(self._rows), utterances=dict(self._utterances),
            )  # fmt: skip

    def submit(
        self, audio: Audio | str | os.PathLike[str] | bytes, tasks: Sequence[str] | None = None
    ) -> Future[Prediction]:
        """Queue an utterance.

        Args:
          audio: the bytes of an audio file, its path, or samples as `read_audio` and `prepare` return them.
          tasks: task names; None for all.

        Returns:
          A future of the prediction. Its exception is AudioError or TooLargeError for bad audio. Cancel it when the
          prediction is no longer needed.

        Raises:
          QueueFullError: the queue is full, or the batcher accepts no more requests.
          ValueError: an unknown task, or none; TooLargeError (a subclass): samples that are too long.
        """
        requested = tuple(dict.fromkeys(self.predictor.packs if tasks is None else tasks))
        unknown = [name for name in requested if name not in self.predictor.packs]
        if unknown or not requested:
            what = f"unknown task {some(unknown)}" if unknown else "no tasks are requested"
            raise ValueError(f"{what}: there are {', '.join(self.predictor.packs)}")
        if isinstance(audio, Audio):
            self.limits.check_seconds(len(audio.wave) / SAMPLE_RATE)
        request = _Request(requested, audio)
        with self._changed:
            self.check_open()
            if self._pending >= self.limits.queue:
                raise QueueFullError(f"the queue is full ({self._pending} utterances): try again later")
            self._pending += 1
            if isinstance(audio, Audio):
                self._ready.append(request)
                self._changed.notify_all()
            else:
                self._decoders.submit(self._decode, request)
        request.future.add_done_callback(functools.partial(self._settled, request))
        return request.future

    def answer(self, audio: Audio | str | os.PathLike[str] | bytes, tasks: Sequence[str] | None = None) -> Prediction:
        """Submit an utterance and wait for its prediction; arguments as for `submit`.

        Raises:
          QueueFullError: the queue is full, or the batcher accepts no more requests.
          ValueError: a bad request (AudioError and TooLargeError are subclasses).
          TimeoutError: it took longer than `limits.timeout`.
        """
        future = self.submit(audio, tasks)
        try:
            return future.result(self.limits.timeout)
        except TimeoutError:
            future.cancel()
            raise TimeoutError(timed_out(self.limits)) from None

    def warm_up(self, progress: bool = False) -> None:
        """Compile every program that predictions use, and encode recordings of every length.

        Batches of recordings that a HuBERT encodes together (on accelerators only) use further programs; these are
        compiled on first use and kept in the compilation cache, if there is one.

        Args:
          progress: show progress bars after two seconds.
        """
        self.predictor.compile_ahead(progress=progress)
        least = self.predictor.encoder.least if self.predictor.encoder else MIN_SAMPLES
        longest = max(least, int(self.limits.max_seconds * SAMPLE_RATE))
        steps = int(WARM_STEPS * np.log2(longest / least)) + 1
        sizes = sorted({longest, *(int(least * 2 ** (step / WARM_STEPS)) for step in range(steps))})
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, longest).astype(np.float32)
        for size in tqdm(sizes, desc="warm up", unit="recording", delay=2, disable=not progress, leave=False):
            self.predictor.encode([Audio(noise[:size], SAMPLE_RATE)])

    def _settled(self, request: _Request, future: Future[Prediction]) -> None:
        """Callback of a future: the request was answered, failed or was cancelled."""
        with self._changed:
            self._pending -= 1
            self._working -= request.taken
            self._answered += not future.cancelled() and future.exception() is None
            self._changed.notify_all()

    def _decode(self, request: _Request) -> None:
        if request.future.cancelled():
            return
        try:
            request.audio = read_upload(request.audio, self.limits)
        except Exception as error:  # the decoders' exception types differ
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(error if isinstance(error, ValueError) else _failed(error))
            return
        with self._changed:
            self._ready.append(request)
            self._changed.notify_all()

    def _work(self) -> None:
        while batch := self._next():
            self._compute(batch)

    def _next(self) -> list[_Request]:
        """Wait for the next batch; empty when the batcher is closed and everything is answered."""
        batch: list[_Request] = []
        rows, samples = 0, 0
        with self._changed:
            while not batch and self._changed.wait_for(lambda: self._ready or not self._open):
                if not self._ready and not self._pending:
                    break
                if not self._ready:  # closing, while an upload is still being decoded
                    self._changed.wait()
                while self._ready:
                    request = self._ready[0]
                    if not request.future.cancelled():
                        rows, samples = rows + len(request.tasks), samples + len(request.audio.wave)
                        if batch and (rows > self.most_rows or samples > GROUP_SECONDS * SAMPLE_RATE):
                            break
                        if request.future.set_running_or_notify_cancel():
                            request.taken = True
                            batch.append(request)
                    self._ready.popleft()
            if batch:
                self._working += len(batch)
                self._rows[sum(len(request.tasks) for request in batch)] += 1
                self._utterances[len(batch)] += 1
        return batch

    def _compute(self, batch: Sequence[_Request]) -> None:
        try:
            outcomes = self._outcomes(batch)
        except Exception as error:  # no error may end the worker thread
            if len(batch) == 1:
                batch[0].future.set_exception(_failed(error))
                return
            _log.exception("a batch of %d utterances failed: retrying them one by one", len(batch))
            with self._changed:
                self._failed += 1
            for request in batch:
                self._compute([request])
            return
        for request, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Prediction):
                request.future.set_result(outcome)
            else:
                request.future.set_exception(outcome)

    def _outcomes(self, batch: Sequence[_Request]) -> list[Prediction | ValueError]:
        """The prediction, or the error, of each request."""
        audios = [request.audio for request in batch]
        # On a CPU, encoding several recordings together gains little, and HuBERT compiles a program per batch size.
        groups = [[audio] for audio in audios] if jax.default_backend() == "cpu" else [audios]
        encoded = [one for group in groups for one in self.predictor.encode(group)]
        good = [(request, one) for request, one in zip(batch, encoded, strict=True) if isinstance(one, Encoded)]
        answers: list[dict[str, Any]] = [{} for _ in good]
        for first in range(0, max((len(request.tasks) for request, _ in good), default=0), self.most_rows):
            requested = [request.tasks[first : first + self.most_rows] for request, _ in good]
            part = self.predictor.predict_units([one for _, one in good], requested)
            answers = [known | more for known, more in zip(answers, part, strict=True)]
        found = iter(answers)
        # The samples are valid by now: the only other errors are a recording shorter than a frame, and too many units.
        too_long = TooLargeError(
            f"the recording has more than {self.predictor.max_units} units, the most allowed: send a shorter part"
        )
        return [
            Prediction(one, next(found))
            if isinstance(one, Encoded)
            else one
            if isinstance(one, AudioError)
            else too_long
            for one in encoded
        ]


def as_json(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON values.

    Args:
      prediction: from a `Batcher`.

    Returns:
      `{"answers", "units", "durations"}`, the last two lists of length U; "f0", of length U, for a multi-stream LM; and
      "notes", a list, if the recording was repaired.
    """
    encoded = prediction.encoded
    body = {
        "answers": prediction.answers,
        "units": encoded.units.tolist(),
        "durations": encoded.durations.tolist(),
    }
    if encoded.f0 is not None:
        body["f0"] = encoded.f0.tolist()
    return {**body, "notes": list(encoded.notes)} if encoded.notes else body


def some(names: Sequence[str]) -> str:
    """Names for a message; a client may send any number of any length, so both are capped."""
    shown = ", ".join(repr(name[:60]) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def timed_out(limits: Limits) -> str:
    """The message of a timeout."""
    return f"no answer within {limits.timeout:g} s: try again when the server is less busy"


def _failed(error: Exception) -> RuntimeError:
    """The message of an internal error, which is logged in full."""
    _log.error("a request failed", exc_info=error)
    return RuntimeError("internal error: the server log has the details")
