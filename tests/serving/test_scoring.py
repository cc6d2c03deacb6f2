"""Batch planning: every row once, few shapes, bounded memory."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spjax.models.config import ProsodyConfig, UnitLMConfig
from spjax.serving import scoring
from spjax.types import Encoded
from tests.serving import world


@given(st.lists(st.integers(1, 1400), max_size=200))
def test_every_row_is_in_one_batch_of_a_known_shape(lengths: list[int]):
    rows = np.asarray(lengths, int)
    known = set(scoring.shapes(max(lengths, default=1)))
    seen = []
    for shape, indices in scoring.plan(rows):
        assert shape in known
        assert 1 <= len(indices) <= shape.rows
        assert 2 * len(indices) >= shape.rows, "less than half of a batch is padding"
        assert rows[indices].max() <= shape.columns
        seen += indices.tolist()
    assert sorted(seen) == list(range(len(lengths)))


@given(st.integers(1, 5000))
def test_a_bucket_is_the_smallest_that_holds_the_utterance(units: int):
    edge = scoring.bucket(units)
    assert edge >= units
    assert scoring.bucket(edge) == edge
    assert scoring.bucket(edge + 1) > edge
    assert scoring.bucket(max(1, units - 1)) <= edge


@pytest.mark.parametrize(("device", "rows"), [("cpu", (1, 4, 16)), ("tpu", (1, 8, 64))])
def test_shapes_are_few_and_bounded_in_memory(device: str, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jax.default_backend", lambda: device)
    shapes = scoring.shapes(1024)
    assert len(shapes) == len(set(shapes)) <= 3 * len(scoring.BUCKETS)
    for count, columns in shapes:
        assert count == 1 or count * columns**2 <= scoring.MAX_SCORES
    assert scoring.shapes(40) == [(count, columns) for columns in (32, 48) for count in rows]
    assert scoring.shapes(3000)[-2:] == [(1, 2048), (1, 4096)]


def test_packs_of_one_shape_share_a_bank():
    model = world.lm()
    banks = scoring.make_banks(model.config, model.params, "float32", world.packs(model))
    assert [list(bank.packs) for bank in banks] == [["word", "mood", "low", "both"], ["order"], ["rule"], ["shallow"]]
    assert [bank.lengths for bank in banks] == [(3, 5, 0, 1), None, None, None]
    heads, width = model.config.heads, model.config.head_dim
    assert banks[0].params["prefix"].key.shape == (1, 4, heads, 5, width), "projected once, not in every batch"
    again = scoring.make_banks(model.config, model.params, "float32", world.packs(model))
    assert all(a.programs is b.programs for a, b in zip(banks, again, strict=True)), "made once"
    for a, b in itertools.combinations(banks, 2):
        assert a.programs is not b.programs


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"durations": [1, float("nan")]}, "give durations in frames"),
        ({"durations": [1, 2.5]}, "give durations in frames"),
        ({"durations": [-1, 2]}, "integers >= 0"),
        ({"durations": [1, 2**33]}, "give durations in frames"),
        ({"f0": [0.1, float("inf")]}, "log f0 less a mean"),
        ({"f0": [0.1, float("nan")]}, "log f0 less a mean"),
        ({"f0": [1e200, 0.1]}, "between -10 and 10"),
        ({"f0": ["high", "low"]}, "give a number for each unit"),
        ({"f0": [0.1]}, r"f0 float64 \[1\]: give a number for each unit"),
        ({"f0": None}, "has no f0"),
    ],
)
def test_bad_prosody_is_refused(wrong: dict[str, Any], message: str) -> None:
    config = UnitLMConfig(24, 16, 1, 2, 16, ProsodyConfig(f0_edges=(0.0,), interpolate_f0=True))
    good = {"units": np.asarray([1, 2]), "durations": np.asarray([3, 0]), "f0": np.asarray([0.1, 0.0])}
    assert scoring.unit_set([Encoded(**good)], config).streams is not None
    with pytest.raises(ValueError, match=message):
        scoring.unit_set([Encoded(**{**good, **wrong})], config)
