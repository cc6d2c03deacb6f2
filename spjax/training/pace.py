"""What a log line says of the updates since the one before: their time and memory, and how much of it was waiting."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from spjax.training.speed import Cost

T = TypeVar("T")


class Pace:
    """A clock that is read for each log line."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._since, self._waited, self._least = time.monotonic(), 0.0, 0.0
        self._updates = self._utterances = self._bytes = 0

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items; how long they let one wait is counted."""
        iterator = iter(items)
        while True:
            start = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waited += time.monotonic() - start
            yield item

    def done(self, utterances: int, cost: Cost) -> None:
        """Count an update."""
        self._updates += 1
        self._utterances += utterances
        self._least += cost.seconds
        self._bytes = max(self._bytes, cost.bytes)

    def read(self) -> dict[str, float]:
        """Since the last time: utterances a second, seconds and most bytes of an update, and of the time two shares.

        These are what the updates would take at the devices' peak, and what input took.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        found = {
            "utt_s": self._utterances / seconds,
            "step_s": seconds / max(self._updates, 1),
            "step_bytes": self._bytes,
            "peak_share": self._least / seconds,
            "input_wait": self._waited / seconds,
        }
        self._start()
        return found
