"""Plans on hundreds of simulated hosts: rows are disjoint, complete and balanced, or the plan is refused."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spjax.data.bank_plan import BankPlan
from spjax.data.loader import batches
from spjax.data.plan import Step, check_rows, host_slice, plan
from spjax.data.unit_set import UnitSet

HOSTS = 256
# Units that a host reads in an epoch relative to the mean; last batches of buckets are not balanced.
BALANCE = 1.15


def _units(lengths: np.ndarray) -> UnitSet:
    return UnitSet.of([[1, 2] * (n // 2) + [3] * (n % 2) for n in lengths.tolist()], [(0,)] * len(lengths))


def _speech_lengths(count: int, seed: int) -> np.ndarray:
    """Lengths like those of commands: 30 to 90 units, few of them long."""
    return np.clip(np.random.default_rng(seed).gamma(12.0, 4.0, count), 8, 120).astype(int)


def _read(steps: list[Step], hosts: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Utterances and members that every host reads in every step."""
    return [[host_slice(step, host, hosts) for host in range(hosts)] for step in steps]


def _assert_disjoint_and_complete(steps: list[Step], hosts: int) -> None:
    for step, parts in zip(steps, _read(steps, hosts), strict=True):
        assert {len(ids) for ids, _ in parts} == {step.ids.size // hosts}  # equal work
        members = np.concatenate([member for _, member in parts])
        found = list(zip(members.tolist(), np.concatenate([ids for ids, _ in parts]).tolist(), strict=True))
        wanted = [(n, row) for n, rows in enumerate(step.ids.tolist()) for row in rows]
        assert found == wanted
        real = [pair for pair in found if pair[1] >= 0]
        assert len(set(real)) == len(real)


def _assert_balanced(steps: list[Step], lengths: np.ndarray, hosts: int) -> None:
    units = np.zeros(hosts)
    for parts in _read(steps, hosts):
        units += [lengths[ids[ids >= 0]].sum() for ids, _ in parts]
    assert units.max() <= BALANCE * units.mean()
    assert units.min() >= units.mean() / BALANCE


@pytest.mark.parametrize("members", [1, 3])
def test_a_plan_on_256_hosts_is_disjoint_complete_and_balanced(members: int) -> None:
    lengths = _speech_lengths(23_132, seed=1)
    few = {"max_rows": 512, "max_tokens": 512 * 120, "members": range(members)}
    steps = plan(lengths, seed=0, epoch=3, buckets=(40, 56, 72, 120), **few)
    _assert_disjoint_and_complete(steps, HOSTS)
    _assert_balanced(steps, lengths, HOSTS)
    for member in range(members):
        ids = np.concatenate([step.ids[member] for step in steps])
        np.testing.assert_array_equal(np.sort(ids[ids >= 0]), np.arange(len(lengths)))


def test_a_bank_of_tasks_on_256_hosts_is_disjoint_complete_and_balanced() -> None:
    lengths = np.concatenate([_speech_lengths(9_000, seed=2), _speech_lengths(20_000, seed=3)])
    ids = [np.arange(9_000), np.arange(9_000, 29_000)]
    bank = BankPlan(lengths, ids, (0, 1, 2), 2, max_rows=256, max_tokens=256 * 120, shards=HOSTS)
    steps = bank.epoch(0, np.ones(6, bool))
    _assert_disjoint_and_complete(steps, HOSTS)
    seen = [[] for _ in range(6)]
    for step in steps:
        for n, rows in zip(range(6) if step.members is None else step.members.tolist(), step.ids.tolist(), strict=True):
            seen[n % 6] += [row for row in rows if row >= 0] if n < 6 else []
    assert [sorted(rows) for rows in seen] == [own.tolist() for own in ids for _ in range(3)]
    # Only steps of the full bank: in steps of one task, hosts with padding members read nothing.
    _assert_balanced([step for step in steps if step.members is None or (step.members < 6).all()], lengths, HOSTS)


def test_batches_of_256_hosts_make_up_the_batches_of_one() -> None:
    lengths = _speech_lengths(1_500, seed=4)
    units = _units(lengths)
    steps = plan(lengths, seed=0, epoch=0, buckets=(56, 120), max_rows=512, max_tokens=512 * 120)
    parts = [list(batches(units, steps, host, HOSTS)) for host in range(HOSTS)]
    for whole, *shares in zip(batches(units, steps), *parts, strict=True):
        for name in ("source", "source_length", "last", "classes", "prompt_id", "weight", "index"):
            np.testing.assert_array_equal(np.concatenate([getattr(one, name) for one in shares]), getattr(whole, name))


@given(
    rows=st.sampled_from([8, 16, 24]), members=st.integers(1, 4), data=st.data(), runs=st.sampled_from([2, 4, 8])
)  # fmt: skip
def test_a_host_may_read_several_shards_and_hosts_the_same(
    rows: int, members: int, data: st.DataObject, runs: int
) -> None:
    """For devices of a host that are not contiguous in the mesh, or compute together with those of another host."""
    step = Step(8, np.arange(members * rows, dtype=np.int32).reshape(members, rows))
    own = sorted(data.draw(st.sets(st.integers(0, runs - 1), min_size=1)))
    ids, member = host_slice(step, own, runs)
    apart = [host_slice(step, run, runs) for run in own]
    np.testing.assert_array_equal(ids, np.concatenate([part for part, _ in apart]))
    np.testing.assert_array_equal(member, np.concatenate([part for _, part in apart]))
    np.testing.assert_array_equal(member, ids // rows)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    seeds=st.integers(1, 4),
    shards=st.sampled_from([1, 2, 3, 8, 16, 256]),
    max_rows=st.sampled_from([2, 8, 12, 256]),
    data=st.data(),
)
def test_every_step_of_a_bank_is_divisible_or_the_bank_is_refused(
    sizes: list[int], seeds: int, shards: int, max_rows: int, data: st.DataObject
) -> None:
    """For any active members. Shards change the padding only."""
    stops = np.cumsum([0, *sizes])
    ids = [np.arange(start, stop) for start, stop in itertools.pairwise(stops)]
    lengths = np.arange(stops[-1]) % 30 + 1
    settings = (lengths, ids, tuple(range(seeds)), 2, max_rows, max_rows * 32)
    try:
        bank = BankPlan(*settings, shards=shards)
    except ValueError as error:
        (fitting,) = [int(word) for word in str(error).replace(",", "").split(" multiple of ")[1].split()[:1]]
        assert max_rows * seeds * len(sizes) % shards
        bank = BankPlan(lengths, ids, settings[2], 2, max_rows * fitting, max_rows * fitting * 32, shards=shards)
        settings = (*settings[:4], bank.max_rows, bank.max_tokens)
    active = np.asarray(data.draw(st.lists(st.booleans(), min_size=seeds * len(sizes), max_size=seeds * len(sizes))))
    for step, alone in zip(bank.epoch(1, active), BankPlan(*settings).epoch(1, active), strict=True):
        assert step.ids.size % shards == 0
        real = np.arange(active.size) if step.members is None else step.members
        there = np.arange(active.size) if alone.members is None else alone.members
        np.testing.assert_array_equal(step.ids[real < active.size], alone.ids[there < active.size])
        assert (step.ids[real == active.size] == -1).all()
        assert len(step.ids) <= active.size


def test_rows_that_are_not_divisible_are_refused_with_a_fix() -> None:
    with pytest.raises(ValueError, match=r"32 utterances for each of 3 members are not divisible by 256 devices: set "
                       r"train.max_rows to a multiple of 256, such as 256, and train.max_tokens"):  # fmt: skip
        check_rows(32, bank=3, shards=256)
    check_rows(32, bank=8, shards=256)
    bank = BankPlan(np.full(64, 100), [np.arange(64)], (0,), 1, max_rows=32, max_tokens=32 * 104, shards=32)
    with pytest.raises(ValueError, match=r"24 utterances for each of 1 members .* 32 devices"):  # limited by tokens
        dataclasses.replace(bank, max_tokens=31 * 104)
