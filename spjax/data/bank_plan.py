"""The plan of a bank: which members have which batches in each step of an epoch. Pure numpy, the same on every host."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from spjax.data import plan as planning


@dataclasses.dataclass(frozen=True, eq=False)
class BankPlan:
    """Tasks in turns, each learnt by a member a seed; members are numbered task after task.

    A step is of one task: of its members side by side, and those of other tasks with the same utterances (a sweep). A
    member has the batches that it has alone, in their order: they depend on its seed and its task alone.

    Attributes:
      lengths: int [n], units of the utterances of all tasks.
      ids: of each task int [m], its utterances; what several tasks share they may both name.
      seeds: of the members of each task.
      buckets: most bucket lengths of a task.
      multiple: bucket lengths are multiples of this.
      max_rows: most utterances of a member in a batch.
      max_tokens: most source columns of a member in a batch.
      passes: over its utterances that a task's own epoch has.
      sampling: how many updates a task gets beside a larger one, as `plan.updates` has it.
      shards: devices among which the rows of every step must divide. They change who fills a step up, and nothing else.

    Raises:
      ValueError: at once, rows of some bucket do not divide so; as `plan.check_rows`, `plan.rows_per_step`.
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
        """Batches of a pass of each task."""
        return [len(self._pass(task, 0, self.seeds[:1])) for task in range(len(self.ids))]

    @functools.cached_property
    def updates(self) -> list[int]:
        """Updates of each task in an epoch."""
        return planning.updates([size * self.passes for size in self.sizes], self.sampling)

    @functools.cached_property
    def groups(self) -> list[list[int]]:
        """Tasks of the same utterances, which share all of their steps."""
        found: dict[bytes, list[int]] = {}
        for task, own in enumerate(self.ids):
            found.setdefault(own.tobytes(), []).append(task)
        return list(found.values())

    @functools.cached_property
    def most(self) -> int:
        """The most steps that an epoch can have."""
        return sum(self.updates[task] for task, *_ in self.groups)

    def epoch(self, number: int, active: np.ndarray) -> list[planning.Step]:
        """The steps of an epoch.

        Args:
          number: of the epoch.
          active: bool [tasks × seeds], members that take part.
        """
        plans, own = [], np.arange(len(self.seeds))
        for task, *others in self.groups:
            members = np.concatenate([one * len(own) + own for one in (task, *others)])
            who = members[active[members]]
            if len(who):
                steps = itertools.islice(self._steps(task, number, who % len(own)), self.updates[task])
                plans.append([self._filled_up(step, who, len(members)) for step in steps])
        return planning.take_turns(plans)

    def _filled_up(self, step: planning.Step, who: np.ndarray, group: int) -> planning.Step:
        """The step of members `who`, of a group of so many, as one of the bank: few numbers of members, so programs."""
        bank, rows = len(self.ids) * len(self.seeds), step.ids.shape[1]
        if len(who) == bank:
            return step
        more = planning.width(len(who), group, self.shards // math.gcd(rows, self.shards)) - len(who)
        ids = np.pad(step.ids, ((0, more), (0, 0)), constant_values=-1)
        return step._replace(ids=ids, members=np.pad(who, (0, more), constant_values=bank).astype(np.int32))

    def _steps(self, task: int, epoch: int, who: np.ndarray) -> Iterator[planning.Step]:
        """A task's steps from the first of an epoch on: its passes go on where the epoch before left off."""
        seeds = [self.seeds[n] for n in who]
        first, inside = divmod(epoch * self.updates[task], self.sizes[task])
        passes = (self._pass(task, number, seeds) for number in itertools.count(first))
        return itertools.islice(itertools.chain.from_iterable(passes), inside, None)

    def _pass(self, task: int, number: int, seeds: Sequence[int]) -> list[planning.Step]:
        return planning.plan(
            self.lengths, seed=0, epoch=number, buckets=self.edges[task], members=seeds, ids=self.ids[task],
            max_tokens=self.max_tokens, max_rows=self.max_rows, row_multiple=math.gcd(8, self.max_rows),
        )  # fmt: skip
