"""Make batches from in-memory unit sets (layout: docs/design.md), with prefetching in a thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from spjax.data.plan import Overlength, Step, host_slice, within_limit
from spjax.data.unit_set import UnitSet
from spjax.types import Batch, Streams
from spjax.vocab import BOS, EOS, F0_BOS, F0_PAD, PAD, UNIT_OFFSET

T = TypeVar("T")


def make_batch(unit_set: UnitSet, ids: np.ndarray, bucket: int, prompt_id: np.ndarray | None = None) -> Batch:
    """Make a batch; with streams for a multi-stream LM if the set has durations and f0.

    Args:
      unit_set: the split.
      ids: int [N, M], utterances of N members (flattened member-major), or [B] with `prompt_id`; -1: padding row.
      bucket: T, source columns; the maximum number of units of an utterance.
      prompt_id: int [B], member of each row; by default the row of `ids`.

    Returns:
      A batch of B = N × M rows. Padding rows are empty utterances of class 0 with weight 0.

    Raises:
      ValueError: an utterance is longer than the bucket.
    """
    ids = np.asarray(ids, np.int32)
    if prompt_id is None:
        prompt_id = np.repeat(np.arange(ids.shape[0]), ids.shape[1])
    ids = ids.reshape(-1)
    real = ids >= 0
    row = np.where(real, ids, 0)
    start = unit_set.offsets[row]
    length = np.where(real, unit_set.offsets[row + 1] - start, 1)
    if (length > bucket).any():
        worst = int(length.argmax())
        raise ValueError(
            f"utterance {ids[worst]} ({unit_set.ids[ids[worst]]}) has {length[worst]} units, over bucket {bucket}: "
            "plan with the lengths of this set, or truncate its utterances"
        )
    column = np.arange(bucket)
    # Column 0 is the opening token, column j the unit j - 1. Columns beyond the utterance are masked.
    token = np.take(unit_set.units, (start - 1)[:, None] + column, mode="clip").astype(np.int32) + UNIT_OFFSET
    source = np.where(column < length[:, None], token, PAD)
    source[:, 0] = EOS if unit_set.streams is None else BOS
    last = unit_set.units[start + length - 1].astype(np.int32) + UNIT_OFFSET
    return Batch(
        source=source,
        source_length=length.astype(np.int32),
        last=np.where(real, last, EOS).astype(np.int32),
        classes=np.where(real[:, None], unit_set.classes[row], 0).astype(np.int32),
        prompt_id=np.asarray(prompt_id, np.int32),
        weight=real.astype(np.float32),
        index=ids,
        streams=None if unit_set.streams is None else _streams(unit_set.streams, start, length, bucket),
    )


def _streams(flat: Streams, start: np.ndarray, length: np.ndarray, bucket: int) -> Streams:
    """Streams of source, `last` and first separator, [B, T + 2], lagging the units by a column (docs/design.md)."""
    # Source column j has segment j - 2; `last` (segment U) has U - 1, the separator has U.
    source = np.arange(bucket) - 2
    segment = np.concatenate([np.broadcast_to(source, (len(start), bucket)), length[:, None] + [[-2, -1]]], axis=1)
    real = (segment >= 0) & (segment < length[:, None])
    at = start[:, None] + segment
    duration = np.where(real, np.take(flat.duration, at, mode="clip"), 0)
    f0 = np.where(real, np.take(flat.f0, at, mode="clip"), np.where(segment == -1, F0_BOS, F0_PAD))
    return Streams(duration.astype(np.int32), f0.astype(np.float32))


def batches(unit_set: UnitSet, steps: Sequence[Step], host: int | Sequence[int] = 0, hosts: int = 1) -> Iterator[Batch]:
    """Yield the batches of a plan, with the rows of this host only (`plan.host_slice`)."""
    for step in steps:
        ids, prompt_id = host_slice(step, host, hosts)
        yield make_batch(unit_set, ids, step.bucket, prompt_id)


def fit_length(
    unit_set: UnitSet, max_length: int | None, overlength: Overlength = "error"
) -> tuple[UnitSet, np.ndarray, str]:
    """Apply a length limit to a set.

    Returns:
      The set, with long utterances truncated if `overlength` is "cut"; the utterances to plan, int32; and a message
      ("" if none is too long). Dropped utterances stay in the set, so indices do not change.

    Raises:
      ValueError: as `within_limit`, or no utterance is within the limit.
    """
    ids, report = within_limit(unit_set.lengths, max_length, overlength)
    if not len(ids):
        raise ValueError(f"no utterance has at most max_length={max_length} units: increase it")
    if report and max_length is not None and overlength == "cut":
        unit_set = unit_set.cut(max_length)
    return unit_set, ids, report


def prefetch(items: Iterable[T], size: int = 2) -> Iterator[T]:
    """Yield the items, produced up to `size` ahead in a thread.

    Exceptions of the iterable are raised here, after the items before. Closing the generator ends the thread.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    return _prefetch(items, size)


def _prefetch(items: Iterable[T], size: int) -> Iterator[T]:
    ready: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(size)
    stop = threading.Event()

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                ready.put((item, None, False))
                if stop.is_set():
                    return
        except BaseException as raised:  # any exception, so that the reader does not wait forever
            error = raised
        ready.put((None, error, True))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error, done = ready.get()
            if error is not None:
                raise error
            if done:
                return
            yield item  # type: ignore[misc]  # None only where done or error is set
    finally:
        stop.set()
        while thread.is_alive():  # unblock a worker that waits for space in the queue
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.05)
        thread.join()
