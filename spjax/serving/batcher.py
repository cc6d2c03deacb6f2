"""The desk: requests of many clients gather while a batch is computed, and the next batch takes all that wait."""

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

from spjax.serving.limits import Limits, TooLargeError
from spjax.serving.predictor import GROUP_SECONDS, SpeechPrompt
from spjax.serving.uploads import check_audio, read_upload
from spjax.speech2unit.audio import MIN_SAMPLES, SAMPLE_RATE, Audio
from spjax.types import Encoded

MOST_ROWS = 256  # of a batch, an utterance and a task each: bounds how long those that come meanwhile wait
DECODERS = 2  # threads: one slow upload holds up nobody
WARM_STEPS = 12  # lengths an octave that encoding is warmed up with: HuBERT pads to 8, the closest 1/15 apart

_log = logging.getLogger(__name__)


class Answered(NamedTuple):
    """What a desk answers for an utterance.

    Attributes:
      encoded: its units, and how long each lasts.
      answers: as `SpeechPrompt.predict_units` gives them: labels and probabilities of each task that was asked.
    """

    encoded: Encoded
    answers: dict[str, Any]


class Busy(Exception):  # noqa: N818  # a state of the server, no fault of the request
    """As many utterances wait as may, or the desk takes none any more; the message says which."""


class Stats(NamedTuple):
    """How a desk stands.

    Attributes:
      open: whether it takes requests: it is not closing, and what computes lives.
      waiting: utterances taken on that no batch has taken up yet.
      working: utterances in the batch that is being computed.
      answered: utterances answered so far.
      failed: batches so far that failed as a whole, and were answered one by one.
      rows: how many batches so far had so many rows, an utterance and a task each.
      utterances: how many batches so far had so many utterances.
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
    audio: Any  # an upload; from when it is decoded on, Audio
    future: Future[Answered] = dataclasses.field(default_factory=Future)
    taken: bool = False  # into a batch


class Batcher:
    """A desk in front of a predictor; a context manager, whose end answers what was taken on.

    An upload is decoded by a small pool of threads, so that what is no audio never meets a batch. One thread
    computes: it takes all requests that wait, up to `most_rows`, in one call of the predictor, and those that come
    meanwhile are the next batch. A request whose future was cancelled costs nothing from then on. If a batch fails,
    its requests are computed one by one, so that what breaks one of them breaks no other.

    Attributes:
      predictor: what answers.
      limits: on what it is asked.
      most_rows: the most rows that are computed together; one utterance's own are split where they are more.
    """

    def __init__(self, predictor: SpeechPrompt, limits: Limits, most_rows: int = MOST_ROWS) -> None:
        if predictor.encoder is None:
            raise ValueError("a desk answers speech, the predictor has no encoder: load it with one")
        if most_rows < 1:
            raise ValueError(f"most_rows is {most_rows}, must be 1 or more")
        self.predictor, self.limits, self.most_rows = predictor, limits, most_rows
        self._ready: collections.deque[_Request] = collections.deque()
        self._changed = threading.Condition()  # guards all below, and the queue above
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
        """Take no more requests; those that were taken on will be answered."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def close(self) -> None:
        """Take no more requests, and answer all that were taken on."""
        self.refuse()
        self._worker.join()
        self._decoders.shutdown()

    def check_open(self) -> None:
        """Raises Busy if no requests are taken any more: the desk is closing, or the thread that computes has died."""
        if not self._open:
            raise Busy("the server is stopping: ask another one, or later")
        if not self._worker.is_alive():
            raise Busy("the server is broken, and must be started again: ask another one, or later")

    def stats(self) -> Stats:
        """How the desk stands at this moment."""
        with self._changed:
            return Stats(
                open=self._open and self._worker.is_alive(), waiting=self._pending - self._working,
                working=self._working, answered=self._answered, failed=self._failed,
                rows=dict(self._rows), utterances=dict(self._utterances),
            )  # fmt: skip

    def submit(
        self, audio: Audio | str | os.PathLike[str] | bytes, tasks: Sequence[str] | None = None
    ) -> Future[Answered]:
        """Ask for an utterance's answers.

        Args:
          audio: the bytes of an audio file, the place of one, or samples as `read_audio` and `prepare` give them.
          tasks: names; None for all that there are.

        Returns:
          Its answers to come; or the error: AudioError or TooLargeError, which say what is wrong with the audio. Cancel
          it when nobody waits any longer.

        Raises:
          Busy: too many wait, or the desk takes none any more.
          ValueError: no such task, or none; TooLargeError, one of them.
        """
        asked = tuple(dict.fromkeys(self.predictor.packs if tasks is None else tasks))
        unknown = [name for name in asked if name not in self.predictor.packs]
        if unknown or not asked:
            told = f"no task {some(unknown)}" if unknown else "no tasks are asked for"
            raise ValueError(f"{told}: there are {', '.join(self.predictor.packs)}")
        if isinstance(audio, Audio):
            check_audio(audio, self.limits)
        request = _Request(asked, audio)
        with self._changed:
            self.check_open()
            if self._pending >= self.limits.queue:
                raise Busy(f"{self._pending} utterances wait, the most that may: ask again in a while")
            self._pending += 1
            if isinstance(audio, Audio):
                self._ready.append(request)
                self._changed.notify_all()
            else:
                self._decoders.submit(self._decode, request)
        request.future.add_done_callback(functools.partial(self._settled, request))
        return request.future

    def answer(self, audio: Audio | str | os.PathLike[str] | bytes, tasks: Sequence[str] | None = None) -> Answered:
        """An utterance's answers, waited for; arguments as `submit`'s.

        Raises:
          Busy: too many wait, or the desk takes none any more.
          ValueError: what is asked cannot be answered (AudioError and TooLargeError are such); the message says why.
          TimeoutError: it took longer than `limits.timeout`.
        """
        future = self.submit(audio, tasks)
        try:
            return future.result(self.limits.timeout)
        except TimeoutError:
            future.cancel()
            raise TimeoutError(timed_out(self.limits)) from None

    def warm_up(self, progress: bool = False) -> None:
        """Compile every program that answers may take, and run what encodes a recording of every length.

        Recordings that a HuBERT encodes together (not on a CPU), by powers of two, are programs more: those are
        compiled when they first come, and kept where there is a compilation cache.

        Args:
          progress: bars, after two seconds.
        """
        self.predictor.compile_ahead(progress=progress)
        longest = max(MIN_SAMPLES, int(self.limits.max_seconds * SAMPLE_RATE))
        steps = int(WARM_STEPS * np.log2(longest / MIN_SAMPLES)) + 1
        sizes = sorted({longest, *(int(MIN_SAMPLES * 2 ** (step / WARM_STEPS)) for step in range(steps))})
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, longest).astype(np.float32)
        for size in tqdm(sizes, desc="warm up", unit="recording", delay=2, disable=not progress):
            self.predictor.encode([Audio(noise[:size], SAMPLE_RATE)])

    def _settled(self, request: _Request, future: Future[Answered]) -> None:
        """A request has its answer or its error, or was cancelled."""
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
        except Exception as error:  # each decoder has errors of its own
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
        """The next batch, waited for; none when the desk is closed and everything is answered."""
        batch: list[_Request] = []
        rows, samples = 0, 0
        with self._changed:
            while not batch and self._changed.wait_for(lambda: self._ready or not self._open):
                if not self._ready and not self._pending:
                    break
                if not self._ready:  # closing, and something is still being decoded
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
        except Exception as error:  # whatever it is, it must not end the thread that answers all others
            if len(batch) == 1:
                batch[0].future.set_exception(_failed(error))
                return
            _log.exception("a batch of %d utterances failed: they are answered one by one", len(batch))
            with self._changed:
                self._failed += 1
            for request in batch:
                self._compute([request])
            return
        for request, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Answered):
                request.future.set_result(outcome)
            else:
                request.future.set_exception(outcome)

    def _outcomes(self, batch: Sequence[_Request]) -> list[Answered | ValueError]:
        """Of each request its answers, or what is wrong with it."""
        audios = [request.audio for request in batch]
        # A CPU gains next to nothing by encoding several at once, for which a HuBERT compiles more and more programs.
        groups = [[audio] for audio in audios] if jax.default_backend() == "cpu" else [audios]
        encoded = [one for group in groups for one in self.predictor.encode(group)]
        good = [(request, one) for request, one in zip(batch, encoded, strict=True) if isinstance(one, Encoded)]
        answers: list[dict[str, Any]] = [{} for _ in good]
        for first in range(0, max((len(request.tasks) for request, _ in good), default=0), self.most_rows):
            asked = [request.tasks[first : first + self.most_rows] for request, _ in good]
            part = self.predictor.predict_units([one for _, one in good], asked)
            answers = [known | more for known, more in zip(answers, part, strict=True)]
        found = iter(answers)
        # Of samples that were decoded already, the number of units is all that can be wrong.
        too_long = TooLargeError(
            f"the recording has more than {self.predictor.max_units} units, the most that are answered for: send a "
            "part of it"
        )
        return [Answered(one, next(found)) if isinstance(one, Encoded) else too_long for one in encoded]


def as_json(answered: Answered) -> dict[str, Any]:
    """An utterance's answers as JSON has them: answers, units, durations, and f0 where the LM is told of it.

    Args:
      answered: a desk's.

    Returns:
      `{"answers", "units", "durations"}`, the last two lists of n; "f0", a list of n, of a multi-stream LM; and
      "notes", a list, where something in the recording was put right.
    """
    encoded = answered.encoded
    told = {
        "answers": answered.answers,
        "units": encoded.units.tolist(),
        "durations": encoded.durations.tolist(),
    }
    if encoded.f0 is not None:
        told["f0"] = encoded.f0.tolist()
    return {**told, "notes": list(encoded.notes)} if encoded.notes else told


def some(names: Sequence[str]) -> str:
    """Names for a message, which a client may have made as many and as long as it liked."""
    told = ", ".join(repr(name[:60]) for name in names[:5])
    return told if len(names) <= 5 else f"{told} and {len(names) - 5} more"


def timed_out(limits: Limits) -> str:
    """What is said to those who waited for as long as they may."""
    return f"there was no answer within {limits.timeout:g} s: ask again when the server has less to do"


def _failed(error: Exception) -> RuntimeError:
    """What is said of an error that is ours; the log has it in full."""
    _log.error("a request failed", exc_info=error)
    return RuntimeError("the server failed to answer this; its log says why")
