"""Table of prompt initialisations: scores of their seeds."""

from __future__ import annotations

from typing import Any

from benchmarks import starts


def _results(task: str, valid: list[float], test: list[float]) -> dict[str, Any]:
    return {"task": task, "members": [{}] * len(test), "valid": {"values": valid}, "headline": {"values": test}}


def test_the_table_has_a_row_for_each_task_and_start() -> None:
    found = {
        "normal": [_results("fsc", [0.5, 0.7], [0.2, 0.4]), _results("ar", [0.5], [0.25])],
        "zeros": [_results("fsc", [0.6, 0.6], [0.3, 0.3]), _results("ar", [0.75], [1.0])],
    }
    assert starts.rows_of(found) == [
        ["ar", "normal", "1", "50.00", "–", "50.00", "50.00", "25.00", "–", "25.00", "25.00"],
        ["ar", "zeros", "1", "75.00", "–", "75.00", "75.00", "100.00", "–", "100.00", "100.00"],
        ["fsc", "normal", "2", "60.00", "14.14", "50.00", "70.00", "30.00", "14.14", "20.00", "40.00"],
        ["fsc", "zeros", "2", "60.00", "0.00", "60.00", "60.00", "30.00", "0.00", "30.00", "30.00"],
    ]
