"""Batches from units in memory: the layout of docs/design.md, vectorised, built ahead in a thread."""

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
    """Lays utterances out as a batch: for a multi-stream LM where the set has durations and f0, for a unit LM else.

    Args:
      unit_set: the split.
      ids: int [N, M], utterances of N members (rows are flattened member after member), or [B] with `prompt_id` given;
        -1 in filling rows.
      bucket: T, columns of the source; no utterance may have more units.
      prompt_id: int [B], the member of each row; by default the row of `ids`.

    Returns:
      A batch of B = N × M rows. A filling row is an empty utterance of class 0 with weight 0.

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
            "plan with these lengths, or cut what is over the limit"
        )
    column = np.arange(bucket)
    # Column 0 is the opener, column j the unit j - 1. What lies beyond the utterance is its neighbours', and masked.
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
    """Prosody a column behind its units (docs/design.md): of the source, `last` and the first separator, [B, T + 2]."""
    # Column j of the source has the segment j - 2; `last`, the segment U, has U - 1 beside it, the separator U.
    source = np.arange(bucket) - 2
    segment = np.concatenate([np.broadcast_to(source, (len(start), bucket)), length[:, None] + [[-2, -1]]], axis=1)
    real = (segment >= 0) & (segment < length[:, None])
    at = start[:, None] + segment
    duration = np.where(real, np.take(flat.duration, at, mode="clip"), 0)
    f0 = np.where(real, np.take(flat.f0, at, mode="clip"), np.where(segment == -1, F0_BOS, F0_PAD))
    return Streams(duration.astype(np.int32), f0.astype(np.float32))


def batches(unit_set: UnitSet, steps: Sequence[Step], host: int | Sequence[int] = 0, hosts: int = 1) -> Iterator[Batch]:
    """The batches of a plan: of each, the rows that this host reads, as `plan.host_slice` has it."""
    for step in steps:
        ids, prompt_id = host_slice(step, host, hosts)
        yield make_batch(unit_set, ids, step.bucket, prompt_id)


def fit_length(
    unit_set: UnitSet, max_length: int | None, overlength: Overlength = "error"
) -> tuple[UnitSet, np.ndarray, str]:
    """Applies the limit on length: what to feed, which utterances to plan (int32), and a report ("" if all fit).

    Utterances keep their numbers: those dropped are only left out of the second result. Cut ones keep their first
    `max_length` units.

    Raises:
      ValueError: as `within_limit`, or no utterance is within the limit.
    """
    ids, report = within_limit(unit_set.lengths, max_length, overlength)
    if not len(ids):
        raise ValueError(f"no utterance has at most max_length={max_length} units: raise it")
    if report and max_length is not None and overlength == "cut":
        unit_set = unit_set.cut(max_length)
    return unit_set, ids, report


def prefetch(items: Iterable[T], size: int = 2) -> Iterator[T]:
    """Yields the items, made up to `size` ahead by a thread.

    What the making raises is raised here, after the items before it. Closing this generator ends the thread.
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
        except BaseException as raised:  # whatever it is, the reader must not wait forever
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
        while thread.is_alive():  # a worker waiting for room gets it, sees `stop` and leaves
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.05)
        thread.join()
