"""Merging runs of equal units, and expanding them again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spjax.encoders.units import expand, merge


@given(st.lists(st.integers(0, 3), max_size=40))
def test_merge_is_run_lengths_and_expand_its_inverse(frames):
    units, durations = merge(np.asarray(frames, np.int64))
    runs = [(unit, len(list(run))) for unit, run in itertools.groupby(frames)]
    assert list(zip(units.tolist(), durations.tolist(), strict=True)) == runs
    assert (units.dtype, durations.dtype) == (np.int32, np.int32)
    assert expand(units, durations).tolist() == frames


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 5)), max_size=20))
def test_expand_then_merge(segments):
    merged = [(unit, sum(d for _, d in run)) for unit, run in itertools.groupby(segments, key=lambda s: s[0])]
    units, durations = merge(expand(*np.asarray(segments, int).reshape(-1, 2).T))
    assert list(zip(units.tolist(), durations.tolist(), strict=True)) == merged


def test_small_and_negative_types_do_not_wrap():
    assert merge(np.array([0, 0, 255], np.uint8))[0].tolist() == [0, 255]
    assert merge(np.array([-(2**31), 5], np.int64))[1].tolist() == [1, 1]


@pytest.mark.parametrize("units", [np.zeros((2, 3), int), np.array([0.5]), np.array(["a"]), np.int32(3)])
def test_bad_units_are_refused(units):
    with pytest.raises(ValueError, match="integers of one dimension"):
        merge(units)


def test_bad_durations_are_refused():
    for durations in ([1], [1, 2, 3], [1, -1]):
        with pytest.raises(ValueError, match="one duration of 0 or more for each unit"):
            expand(np.array([3, 4]), np.array(durations))
