"""Serving benchmark at toy size: all sides compute equal answers, and ratios are taken within a round."""

from __future__ import annotations

import argparse

import pytest

from benchmarks import serving

TOY = {
    "dim": 64, "layers": 1, "prompt": 3, "separators": 2, "tasks": 2, "utterances": 3, "units": (5, 9), "alone": 2,
    "dtype": "float32", "out": None,
}  # fmt: skip


@pytest.mark.usefixtures("quick_compile")
def test_every_side_answers_the_same() -> None:
    args = argparse.Namespace(**TOY)
    spent = {"mixed": (1.0, 2.0), "single": (2.0, 4.0), "alone": (8.0, 8.0)}
    results = {
        side: [{**serving.runner(side, args)(), "seconds": seconds, "cpu": seconds} for seconds in spent[side]]
        for side in serving.SIDES
    }
    assert [results[side][0]["utterances"] for side in serving.SIDES] == [6, 6, 4]
    assert serving.check_answers(results, "float32") < 1e-5
    _, ratios, _ = serving.tables(results, args)
    assert "| seconds | 0.50 (0.50–0.50) | ≤ 1.05 | 9.00 (6.00–12.00) | ≥ 8.0 |" in ratios
    results["alone"][0]["answers"][0]["word_0"][0] += 0.1
    with pytest.raises(AssertionError, match=r"probabilities differ between the sides by 1\.0e-01"):
        serving.check_answers(results, "float32")
