"""What a log line says of the time since the one before: throughput, share of the devices' peak, waiting for input."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Pace:
    """A clock that is read for each log line."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._since, self._waited, self._least, self._utterances = time.monotonic(), 0.0, 0.0, 0

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

    def done(self, utterances: int, least: float) -> None:
        """Count an update, and the seconds that it would take at the devices' peak."""
        self._utterances += utterances
        self._least += least

    def read(self) -> dict[str, float]:
        """Since the last time: utterances a second, shares of the time that the peak would take and that input took."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        found = {
            "utt_s": self._utterances / seconds,
            "peak_share": self._least / seconds,
            "input_wait": self._waited / seconds,
        }
        self._start()
        return found
