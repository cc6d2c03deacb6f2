"""Batches: the layout against a plain loop, and prefetching."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spjax.data.loader import batches, fit_length, make_batch, prefetch
from spjax.data.plan import buckets, plan
from spjax.data.unit_set import UnitSet
from spjax.vocab import BOS, EOS, F0_BOS, F0_PAD, PAD, UNIT_OFFSET

units_of = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=20), min_size=1, max_size=12)


def _set(units: list[list[int]]) -> UnitSet:
    return UnitSet.of(units, [[i % 3, 3 + i % 2] for i in range(len(units))])


@given(units=units_of, data=st.data())
def test_layout_is_that_of_the_design(units: list[list[int]], data: st.DataObject) -> None:
    longest = max(map(len, units))
    bucket = data.draw(st.integers(longest, longest + 9))
    members, rows = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    row = st.lists(st.integers(-1, len(units) - 1), min_size=rows, max_size=rows)
    ids = np.array(data.draw(st.lists(row, min_size=members, max_size=members)), np.int32)
    batch = make_batch(_set(units), ids, bucket)
    assert batch.source.shape == (members * rows, bucket)
    assert [field.dtype.name for field in batch[:-1]] == ["int32"] * 5 + ["float32", "int32"]
    assert batch.streams is None
    for b, i in enumerate(ids.reshape(-1)):
        assert batch.prompt_id[b] == b // rows
        assert batch.index[b] == i
        utterance = [EOS, *(unit + UNIT_OFFSET for unit in units[i])] if i >= 0 else [EOS, EOS]
        source = utterance[:-1]
        assert batch.source[b].tolist() == source + [PAD] * (bucket - len(source))
        assert batch.source_length[b] == len(source)
        assert batch.last[b] == utterance[-1]
        assert batch.classes[b].tolist() == ([i % 3, 3 + i % 2] if i >= 0 else [0, 0])
        assert batch.weight[b] == float(i >= 0)


@given(units=units_of, data=st.data())
def test_prosody_lags_a_column_and_ends_with_the_first_separator(units: list[list[int]], data: st.DataObject) -> None:
    bucket = max(map(len, units)) + data.draw(st.integers(0, 5))
    ids = np.array([data.draw(st.lists(st.integers(-1, len(units) - 1), min_size=1, max_size=5))], np.int32)
    # Every segment has a different duration and f0.
    each = [[(i, j) for j in range(len(row))] for i, row in enumerate(units)]
    durations = [[1 + 100 * i + j for i, j in row] for row in each]
    f0 = [[-(1.0 + 100 * i + j) for i, j in row] for row in each]
    spoken = UnitSet.of(units, _set(units).classes, durations=durations, f0=f0)
    batch = make_batch(spoken, ids, bucket)
    assert batch.streams is not None
    assert [stream.dtype.name for stream in batch.streams] == ["int32", "float32"]
    assert batch.source[:, 0].tolist() == [BOS] * ids.size
    plain = make_batch(spoken.without_streams(), ids, bucket)
    np.testing.assert_array_equal(batch.source[:, 1:], plain.source[:, 1:])
    for b, i in enumerate(ids.reshape(-1)):
        if i < 0:
            continue  # a padding row: any finite value
        columns = [(0, F0_PAD), (0, F0_BOS), *zip(durations[i], f0[i], strict=True)]  # of <s>, u1 .. uT and a separator
        length = int(batch.source_length[b])
        found = list(zip(*(stream[b].tolist() for stream in batch.streams), strict=True))
        assert found[:length] + found[bucket:] == columns


def test_an_utterance_over_the_bucket_is_never_cut_silently() -> None:
    with pytest.raises(ValueError, match=r"utterance 1 \(1\) has 9 units, over bucket 8"):
        make_batch(_set([[1], [2] * 9]), np.array([[0, 1]]), 8)


@settings(max_examples=30)
@given(units=units_of, hosts=st.sampled_from([1, 2, 4]), members=st.integers(1, 2))
def test_batches_of_all_hosts_make_up_the_full_batch(units: list[list[int]], hosts: int, members: int) -> None:
    unit_set = _set(units)
    steps = plan(
        unit_set.lengths, seed=1, epoch=0, buckets=buckets(unit_set.lengths, 2), max_tokens=256, max_rows=4,
        row_multiple=4, members=range(members),
    )  # fmt: skip
    whole = [make_batch(unit_set, step.ids, step.bucket) for step in steps]
    parts = [list(batches(unit_set, steps, host, hosts)) for host in range(hosts)]
    assert {len(part) for part in parts} == {len(whole)}
    for step, expected in enumerate(whole):
        for name in expected._fields[:-1]:
            together = np.concatenate([getattr(part[step], name) for part in parts])
            np.testing.assert_array_equal(together, getattr(expected, name), err_msg=name)


def test_the_limit_on_length_cuts_or_drops_and_keeps_numbers() -> None:
    unit_set = _set([[1, 2, 3], [4] * 9, [5]])
    with pytest.raises(ValueError, match="1 of 3 utterances"):
        fit_length(unit_set, 4)
    same, ids, report = fit_length(unit_set, 4, "drop")
    assert same is unit_set
    assert ids.tolist() == [0, 2]
    assert "dropped" in report
    cut, ids, report = fit_length(unit_set, 4, "cut")
    assert cut.lengths.tolist() == [3, 4, 1]
    assert ids.tolist() == [0, 1, 2]
    assert "1 of 3" in report
    assert fit_length(unit_set, None)[2] == ""


def test_the_loader_is_much_faster_than_training() -> None:
    rng = np.random.default_rng(0)
    unit_set = UnitSet.of([rng.integers(0, 100, n) for n in rng.integers(20, 110, 4000)], np.zeros((4000, 3)))
    steps = plan(unit_set.lengths, seed=0, epoch=0, buckets=buckets(unit_set.lengths), max_tokens=4096, max_rows=64)

    def rate() -> float:
        begin = time.perf_counter()
        rows = sum(int(batch.weight.sum()) for batch in batches(unit_set, steps))
        return rows / (time.perf_counter() - begin)

    assert max(rate() for _ in range(5)) > 50_000  # over a million on an idle machine


# ---- prefetch


def test_prefetch_yields_all_in_order_and_ends_its_thread() -> None:
    assert list(prefetch(range(100), 3)) == list(range(100))
    assert list(prefetch([None, 1])) == [None, 1]
    assert list(prefetch([])) == []
    assert not _workers()


def test_prefetch_raises_errors_after_the_items_before() -> None:
    def failing() -> Iterator[int]:
        yield from (1, 2)
        raise KeyError("third")

    ahead = prefetch(failing(), 8)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(KeyError, match="third"):
        next(ahead)
    assert not _workers()


@pytest.mark.parametrize("taken", [1, 4])
def test_closing_prefetch_early_ends_the_thread(taken: int) -> None:
    made = []

    def endless() -> Iterator[int]:
        while True:
            made.append(len(made))
            yield made[-1]

    ahead = prefetch(endless(), 2)
    assert [next(ahead) for _ in range(taken)] == list(range(taken))
    ahead.close()  # type: ignore[attr-defined]
    assert not _workers()
    assert len(made) <= taken + 5  # bounded: items in the queue and held by both sides


def test_prefetch_builds_ahead() -> None:
    second = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        second.set()
        yield 1

    ahead = prefetch(items(), 2)
    assert next(ahead) == 0
    assert second.wait(10)  # made before it is requested
    assert list(ahead) == [1]


def test_prefetch_refuses_size_0() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        prefetch([], 0)


def _workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]
