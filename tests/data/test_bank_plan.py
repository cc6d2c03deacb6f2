"""The plan of a bank: every member has the same batches as alone."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spjax.data.bank_plan import BankPlan
from spjax.data.plan import Step

lengths_of = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def _bank(tasks: list[list[int]], seeds: tuple[int, ...] = (3, 4), **more: float) -> BankPlan:
    stops = np.cumsum([0, *map(len, tasks)])
    ids = [np.arange(start, stop) for start, stop in itertools.pairwise(stops)]
    settings = {"buckets": 2, "max_rows": 8, "max_tokens": 512, **more}
    return BankPlan(np.concatenate(tasks), ids, seeds, **settings)


def _batches(steps: list[Step], member: int) -> list[list[int]]:
    """The batches of a member, in order."""
    found = []
    for step in steps:
        who = range(len(step.ids)) if step.members is None else step.members.tolist()
        found += [row[row >= 0].tolist() for n, row in zip(who, step.ids, strict=True) if n == member]
    return found


@settings(max_examples=40)
@given(tasks=st.lists(lengths_of, min_size=1, max_size=3), epoch=st.integers(0, 3), data=st.data())
def test_a_member_has_the_same_batches_as_alone(tasks: list[list[int]], epoch: int, data: st.DataObject) -> None:
    bank = _bank(tasks)
    active = np.asarray(data.draw(st.lists(st.booleans(), min_size=2 * len(tasks), max_size=2 * len(tasks))))
    steps = bank.epoch(epoch, active)
    assert len(steps) <= bank.most
    for member, takes_part in enumerate(active):
        task, seed = divmod(member, 2)
        alone = dataclasses.replace(bank, ids=bank.ids[task : task + 1], seeds=bank.seeds[seed : seed + 1])
        own = _batches(alone.epoch(epoch, np.ones(1, bool)), 0) if takes_part else []
        assert [batch for batch in _batches(steps, member) if batch] == own
        if takes_part:
            assert sorted(itertools.chain(*own)) == bank.ids[task].tolist()  # every utterance once
    assert all(step.bucket * step.ids.shape[1] <= bank.max_tokens for step in steps)


@given(sizes=st.lists(st.integers(1, 90), min_size=2, max_size=3), sampling=st.sampled_from([0.0, 0.5, 1.0]))
def test_passes_continue_across_epochs(sizes: list[int], sampling: float) -> None:
    """With repeated passes, the counts of two utterances differ by at most one."""
    bank = _bank([[8] * size for size in sizes], seeds=(5,), sampling=sampling)
    everyone = np.ones(len(sizes), bool)
    for member, own in enumerate(bank.ids):
        seen = [batch for epoch in range(3) for batch in _batches(bank.epoch(epoch, everyone), member)]
        assert len(seen) == 3 * bank.updates[member]
        counts = np.bincount(list(itertools.chain(*seen)), minlength=own[-1] + 1)[own]
        assert counts.max() - counts.min() <= 1
        assert sampling < 1 or (counts == 3).all()


def test_task_runs_of_a_sweep_share_all_steps_and_tasks_none() -> None:
    sweep = _bank([[5, 20, 20, 60] * 10])
    sweep = dataclasses.replace(sweep, ids=sweep.ids * 3)
    steps = sweep.epoch(0, np.ones(6, bool))
    assert len(steps) == sweep.most == sweep.updates[0]
    assert all(step.members is None for step in steps)
    apart = _bank([[8] * 40, [56] * 40])
    steps = apart.epoch(0, np.ones(4, bool))
    assert len(steps) == apart.most == sum(apart.updates)
    assert {tuple(step.members.tolist()) for step in steps} == {(0, 1), (2, 3)}
    assert [step.bucket for step in steps] == [8, 56] * 5  # interleaved


def test_tasks_share_programs_where_lengths_are_multiples_of_many_columns() -> None:
    """Tasks like the demo's: steps of equal length have equal shapes."""
    tasks = [[*range(8, 38)] * 3, [*range(20, 128)], [*range(52, 136)]]
    shapes = [
        {(step.bucket, step.ids.shape) for step in _bank(tasks, (0,), **more).epoch(0, np.ones(3, bool))}
        for more in ({"max_tokens": 4096}, {"max_tokens": 4096, "buckets": 4, "multiple": 40})
    ]
    assert shapes[1] == {(length, (1, 8)) for length in (40, 80, 120, 160)}
    assert len(shapes[0]) == 6


def test_shapes_do_not_depend_on_who_has_stopped_and_a_task_without_members_has_no_steps() -> None:
    bank = _bank([[8] * 40, [56] * 40], seeds=(1, 2, 3, 4))
    steps = bank.epoch(0, np.asarray([True, True, False, True, False, False, False, False]))
    assert {tuple(step.members.tolist()) for step in steps} == {(0, 1, 2, 3)}
    assert all((step.ids[2] == -1).all() and (step.ids[[0, 1, 3]] >= 0).all() for step in steps)
    assert {step.bucket for step in steps} == {8}
    assert bank.epoch(0, np.zeros(8, bool)) == []
    sharded = dataclasses.replace(bank, seeds=(1, 2, 3), shards=16)
    assert {tuple(step.members.tolist()) for step in sharded.epoch(0, np.ones(6, bool))} == {(0, 1, 2, 6), (3, 4, 5, 6)}
