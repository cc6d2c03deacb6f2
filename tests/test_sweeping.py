"""Which setting of a sweep is taken, where members of some have diverged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from spjax.jobs import sweeping
from spjax.models.prompts import PromptConfig
from spjax.training import train
from spjax.training.optim import OptimConfig

RUN = train.TrainConfig(seeds=(0, 1))


def _bank(scores: list[float | None], lower_is_better: bool = False) -> tuple[list[train.Lesson], train.Trained]:
    """Lessons of a learning rate each by two seeds; None: a member that diverged in its first epoch."""
    nothing: Any = None
    setting = train.Setting(nothing, nothing, PromptConfig(length=3), nothing, nothing, nothing)
    lesson = train.Lesson(setting, nothing, nothing, nothing, nothing, nothing, lower_is_better)
    lessons = [dataclasses.replace(lesson, optimizer=OptimConfig(lr=10.0**n)) for n in range(len(scores) // 2)]
    kept = [-1 if score is None else 0 for score in scores]
    return lessons, train.Trained({}, [{"metric": scores}], kept, [score or 0.0 for score in scores])


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_a_setting_of_which_a_seed_diverged_is_not_taken(tmp_path: Path, lower_is_better: bool) -> None:
    lessons, result = _bank([0.9, None, 0.2, 0.4, None, 0.1], lower_is_better)
    assert sweeping.choose(lessons, result, RUN, range(3)) == 1
    told = sweeping.write_table(tmp_path, lessons, result, RUN, range(3), 1, OptimConfig())
    assert told.endswith("learning rate 10 is best on valid (30.00 %)")
    rows = (tmp_path / "sweep.md").read_text().splitlines()
    assert "| 3 | 1 | diverged | 90.00 – |  |" in rows
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["valid"] for row in found] == [[0.9, None], [0.2, 0.4], [None, 0.1]]
    assert [row["taken"] for row in found] == [False, True, False]


def test_where_every_setting_diverged_none_is_said_to_be_best(tmp_path: Path) -> None:
    lessons, result = _bank([0.9, None, None, None])
    assert sweeping.choose(lessons, result, RUN, range(2)) == 0
    told = sweeping.write_table(tmp_path, lessons, result, RUN, range(2), 0, OptimConfig())
    assert told == "of 2 settings there is none of which no seed diverged"
    assert "yes" not in (tmp_path / "sweep.md").read_text()
