"""Throughput, memory and input wait of the updates between two log lines."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from spjax.training.speed import Cost

T = TypeVar("T")


class Throughput:
    """Counters that `read` reports and resets."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._since, self._waited, self._peak_seconds = time.monotonic(), 0.0, 0.0
        self._updates = self._utterances = self._bytes = 0

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items and measure how long the iterator takes to produce them."""
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
        self._peak_seconds += cost.seconds
        self._bytes = max(self._bytes, cost.bytes)

    def read(self) -> dict[str, float]:
        """Report the updates since the last call, and reset.

        Returns:
          utt_s: utterances per second. step_s: seconds per update. step_bytes: most device memory of an update.
          peak_share: share of the time that the matmuls would take at the devices' peak FLOP/s. input_wait: share of
          the time spent waiting for batches.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        found = {
            "utt_s": self._utterances / seconds,
            "step_s": seconds / max(self._updates, 1),
            "step_bytes": self._bytes,
            "peak_share": self._peak_seconds / seconds,
            "input_wait": self._waited / seconds,
        }
        self._start()
        return found
