"""In-memory unit sets with prosody."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from spjax.data.unit_set import UnitSet

pitch = st.one_of(st.just(0.0), st.integers(1, 99).map(lambda i: i / 100), st.integers(1, 99).map(lambda i: -i / 100))
spoken = st.lists(st.lists(pitch, min_size=1, max_size=9), min_size=1, max_size=5)


def _set(f0: list[list[float]]) -> UnitSet:
    return UnitSet.of([range(len(row)) for row in f0], [[0]] * len(f0), durations=[[1] * len(row) for row in f0], f0=f0)


def test_f0_between_voiced_segments_is_interpolated() -> None:
    """In Hz, for any speaker mean; before the first, after the last and around a single voiced segment it stays 0."""
    hz = [[0, 100, 0, 0, 160, 120, 0], [0, 0], [0, 140, 0]]
    expected = [[0, 100, 120, 140, 160, 120, 0], [0, 0], [0, 140, 0]]
    for mean in (90.0, 250.0):
        log = [[float(np.log(x / mean)) if x else 0.0 for x in row] for row in hz]
        found = _set(log).with_interpolated_f0()
        wanted = [np.log(x / mean) if x else 0.0 for row in expected for x in row]
        np.testing.assert_allclose(found.f0, wanted, atol=1e-6)


@given(f0=spoken)
def test_interpolation_keeps_voiced_segments_and_other_utterances(f0: list[list[float]]) -> None:
    units = _set(f0)
    found = units.with_interpolated_f0()
    np.testing.assert_array_equal(found.f0[units.f0 != 0], units.f0[units.f0 != 0])
    for i, row in enumerate(f0):
        alone = _set([row]).with_interpolated_f0().f0
        np.testing.assert_array_equal(found.f0[found.offsets[i] : found.offsets[i + 1]], alone)
        assert min(row) - 1e-5 <= alone.min()
        assert alone.max() <= max(row) + 1e-5


def test_a_set_has_streams_if_it_has_both() -> None:
    units = _set([[0.1, 0.2], [0.3]])
    assert units.streams is not None
    assert units.streams.duration.tolist() == [1, 1, 1]
    assert units.without_streams().streams is None
    assert units.without_streams().with_interpolated_f0().f0 is None
    assert units.take(np.asarray([1])).streams.f0.tolist() == np.asarray([0.3], np.float32).tolist()
