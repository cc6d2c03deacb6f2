"""Choice of the best setting of a sweep, also when members diverged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from spjax.jobs import sweeping
from spjax.models.config import Compute
from spjax.models.prompts import PromptConfig
from spjax.training import train
from spjax.training.losses import LossConfig
from spjax.training.optim import OptimConfig
from spjax.training.setting import Setting
from tests import toy

RUN = train.TrainConfig(seeds=(0, 1))


def _bank(scores: list[float | None], lower_is_better: bool = False) -> tuple[list[train.TaskRun], train.Trained]:
    """Task runs with different learning rates and two seeds; None: a member that diverged in its first epoch."""
    nothing: Any = None
    setting = Setting(nothing, nothing, PromptConfig(length=3), nothing, nothing, nothing)
    task_run = train.TaskRun(setting, nothing, nothing, nothing, nothing, nothing, lower_is_better)
    task_runs = [dataclasses.replace(task_run, optimizer=OptimConfig(lr=10.0**n)) for n in range(len(scores) // 2)]
    kept = [-1 if score is None else 0 for score in scores]
    return task_runs, train.Trained({}, [{"metric": scores}], kept, [score or 0.0 for score in scores])


def test_the_grid_has_all_combinations() -> None:
    task_runs, _ = _bank([0.0, 0.0])
    setting = dataclasses.replace(
        task_runs[0].setting, config=toy.LM, compute=Compute(), loss=LossConfig(), prompt=PromptConfig(length=3, rank=2)
    )
    sweep = sweeping.SweepConfig(init=("normal", "zeros"), noise=(0.0, 0.1), alpha=(4.0, 8.0), lr=(1e-3, 1e-2))
    found = sweeping.task_runs_of(dataclasses.replace(task_runs[0], setting=setting), sweep, OptimConfig())
    assert len(found) == 16
    by_alpha = {alpha: [one for one in found if one.setting.prompt.alpha == alpha] for alpha in (4.0, 8.0)}
    for some in by_alpha.values():
        assert {(one.setting.prompt.init, one.setting.loss.noise) for one in some} == {
            ("normal", 0.0), ("normal", 0.1), ("zeros", 0.0), ("zeros", 0.1)
        }  # fmt: skip
    assert found[-1].tried == {"alpha": 8.0, "init": "zeros", "noise": 0.1, "lr": 1e-2}
    assert found[-1].optimizer == OptimConfig(lr=1e-2)


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_a_setting_with_a_diverged_seed_is_not_chosen(tmp_path: Path, lower_is_better: bool) -> None:
    task_runs, result = _bank([0.9, None, 0.2, 0.4, None, 0.1], lower_is_better)
    assert sweeping.choose(task_runs, result, RUN, range(3)) == 1
    line = sweeping.write_table(tmp_path, task_runs, result, RUN, range(3), 1, OptimConfig())
    assert line.endswith("learning rate 10 is best on valid (30.00 %)")
    rows = (tmp_path / "sweep.md").read_text().splitlines()
    assert "| 3 | 1 | diverged | 90.00 – |  |" in rows
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["valid"] for row in found] == [[0.9, None], [0.2, 0.4], [None, 0.1]]
    assert [row["taken"] for row in found] == [False, True, False]


def test_if_every_setting_diverged_the_table_has_no_best(tmp_path: Path) -> None:
    task_runs, result = _bank([0.9, None, None, None])
    assert sweeping.choose(task_runs, result, RUN, range(2)) == 0
    line = sweeping.write_table(tmp_path, task_runs, result, RUN, range(2), 0, OptimConfig())
    assert line == "of 2 settings all have a seed that diverged"
    assert "yes" not in (tmp_path / "sweep.md").read_text()
