"""Plan the batches of a bank: members and their utterances in each step. Pure numpy, the same on every host."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np

from spjax.data import plan as planning

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class BankPlan:
    """Plan of a bank with a member for each task and seed (numbered task by task); steps of tasks are interleaved.

    A step has the members of one task, and of other tasks with the same utterances (a sweep); members that have
    stopped have padding rows in it. The batches of a member and their order depend only on its seed and task.

    Attributes:
      lengths: int [n], units of the utterances of all tasks.
      ids: for each task int [m], its utterances; tasks may share utterances.
      seeds: seeds of the members of each task.
      buckets: maximum number of bucket lengths of a task.
      max_rows: maximum utterances of a member in a batch.
      max_tokens: maximum source columns of a member in a batch.
      multiple: bucket lengths are multiples of this.
      passes: passes over the utterances in an epoch, with `sampling` 1.
      sampling: balance of updates between tasks of different size, see `plan.updates`.
      shards: batch shards of the mesh; affects padding only.

    Raises:
      ValueError: the rows of a bucket are not divisible by `shards`, or do not fit the limits.
    """

    lengths: np.ndarray
    ids: Sequence[np.ndarray]
    seeds: Sequence[int]
    buckets: int
    max_rows: int
    max_tokens: int
    multiple: int = 8
    passes: int = 1
    sampling: float = 1.0
    shards: int = 1

    def __post_init__(self) -> None:
        for bucket in sorted({edge for edges in self.edges for edge in edges}):
            planning.check_rows(self._rows(bucket), len(self.ids) * len(self.seeds), self.shards)

    def _rows(self, bucket: int) -> int:
        return planning.rows_per_step(bucket, self.max_tokens, self.max_rows, math.gcd(8, self.max_rows))

    @functools.cached_property
    def edges(self) -> list[tuple[int, ...]]:
        """Bucket lengths of each task."""
        return [planning.buckets(self.lengths[own], self.buckets, self.multiple) for own in self.ids]

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Batches of one pass over each task."""
        return [len(self._pass(task, 0, self.seeds[:1])) for task in range(len(self.ids))]

    @functools.cached_property
    def updates(self) -> list[int]:
        """Updates of each task in an epoch."""
        return planning.updates([size * self.passes for size in self.sizes], self.sampling)

    @functools.cached_property
    def groups(self) -> list[list[int]]:
        """Groups of tasks with the same utterances, which share all steps."""
        found: dict[bytes, list[int]] = {}
        for task, own in enumerate(self.ids):
            found.setdefault(own.tobytes(), []).append(task)
        return list(found.values())

    @functools.cached_property
    def most(self) -> int:
        """Maximum number of steps of an epoch."""
        return sum(self.updates[task] for task, *_ in self.groups)

    @functools.cached_property
    def _shapes(self) -> set[tuple[int, ...]]:
        """Shapes of the steps of all epochs so far; each is compiled once."""
        return set()

    def epoch(self, number: int, active: np.ndarray) -> list[planning.Step]:
        """Steps of an epoch; shapes that no earlier epoch had are logged.

        Args:
          number: index of the epoch.
          active: bool [tasks × seeds], members to train.
        """
        plans, seeds = [], np.arange(len(self.seeds))
        for task, *others in self.groups:
            members = np.concatenate([one * len(seeds) + seeds for one in (task, *others)])
            if active[members].any():
                own = itertools.islice(self._steps(task, number, 1 + len(others)), self.updates[task])
                plans.append([self._of(step, members, active) for step in own])
        steps = planning.interleave(plans)
        new = {(step.bucket, *step.ids.shape) for step in steps} - self._shapes
        self._shapes.update(new)
        if new:
            shapes = ", ".join(f"{n} × {rows} × {bucket}" for bucket, n, rows in sorted(new))
            _log.info("epoch %d: compiling programs for members × utterances × columns %s", number + 1, shapes)
        return steps

    def _of(self, step: planning.Step, members: np.ndarray, active: np.ndarray) -> planning.Step:
        """The step of these members: padding rows for inactive ones, and padding members up to a multiple of shards."""
        ids, bank = np.where(active[members, None], step.ids, -1), len(active)
        if len(members) == bank:
            return step._replace(ids=ids)
        more = -len(members) % (self.shards // math.gcd(ids.shape[1], self.shards))
        ids = np.pad(ids, ((0, more), (0, 0)), constant_values=-1)
        return step._replace(ids=ids, members=np.pad(members, (0, more), constant_values=bank).astype(np.int32))

    def _steps(self, task: int, epoch: int, times: int) -> Iterator[planning.Step]:
        """Yield a task's steps of all seeds, `times` over, from an epoch on; passes continue across epochs."""
        seeds = [*self.seeds] * times
        first, inside = divmod(epoch * self.updates[task], self.sizes[task])
        passes = (self._pass(task, number, seeds) for number in itertools.count(first))
        return itertools.islice(itertools.chain.from_iterable(passes), inside, None)

    def _pass(self, task: int, number: int, seeds: Sequence[int]) -> list[planning.Step]:
        return planning.plan(
            self.lengths, seed=0, epoch=number, buckets=self.edges[task], members=seeds, ids=self.ids[task],
            max_tokens=self.max_tokens, max_rows=self.max_rows, row_multiple=math.gcd(8, self.max_rows),
        )  # fmt: skip
