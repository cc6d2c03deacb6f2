"""Hyperparameter sweeps: all settings are trained as task runs of one bank, and one is chosen on valid."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence

from etils import epath

from spjax.evaluation import metrics
from spjax.evaluation.markdown import percent, shown, table
from spjax.io.files import write_file
from spjax.training import optim, train
from spjax.training.sweep import SweepConfig, with_values
from spjax.types import Json


def task_runs_of(task_run: train.TaskRun, sweep: SweepConfig, optimizer: optim.OptimConfig) -> list[train.TaskRun]:
    """Task runs of a task, one for each setting of the sweep."""
    setting = task_run.setting
    return [
        dataclasses.replace(
            task_run,
            setting=dataclasses.replace(
                setting, prompt=with_values(setting.prompt, tried), loss=with_values(setting.loss, tried)
            ),
            optimizer=with_values(optimizer, tried),
            tried=tried,
        )
        for tried in sweep.tried
    ]


def index_ranges(swept: Sequence[Sequence[train.TaskRun]]) -> list[range]:
    """Index range of each task's runs in the list of all task runs."""
    stops = list(itertools.accumulate(map(len, swept)))
    return [range(stop - len(task_runs), stop) for stop, task_runs in zip(stops, swept, strict=True)]


def _scores(result: train.Trained, run: train.TrainConfig, number: int) -> list[float | None]:
    """Valid metric of each seed at its best epoch; None if it diverged before there was one."""
    members = range(number * len(run.seeds), (number + 1) * len(run.seeds))
    return [float(result.history[best]["metric"][n]) if (best := result.best_epoch[n]) >= 0 else None for n in members]


def _mean(scores: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and half width of the 95 % interval; None if a seed diverged."""
    known = [score for score in scores if score is not None]
    return metrics.mean_interval(known) if len(known) == len(scores) else (None, None)


def choose(task_runs: Sequence[train.TaskRun], result: train.Trained, run: train.TrainConfig, indices: range) -> int:
    """Index of the task run with the best mean valid score over seeds; ties go to the first.

    Settings with a seed that diverged before its first evaluation are chosen only if all have one.

    Args:
      task_runs: task runs of the bank.
      result: result of training.
      run: run settings, for the seeds.
      indices: index range of the task's runs.
    """
    sign = -1 if task_runs[indices.start].lower_is_better else 1
    means = {number: _mean(_scores(result, run, number))[0] for number in indices}
    return max(indices, key=lambda number: (-math.inf if (mean := means[number]) is None else sign * mean, -number))


def write_table(
    directory: epath.PathLike,
    task_runs: Sequence[train.TaskRun],
    result: train.Trained,
    run: train.TrainConfig,
    indices: range,
    chosen: int,
    optimizer: optim.OptimConfig,
) -> str:
    """Write DIRECTORY/sweep.md and sweep.json: valid score of each setting, and the chosen one.

    Args:
      directory: directory of the task's report.
      task_runs, result, run, indices: see `choose`.
      chosen: index returned by `choose`.
      optimizer: optimizer of the bank.

    Returns:
      A line with the chosen setting.
    """
    rows: list[list[str]] = []
    found: list[Json] = []
    described = [task_runs[number].described(optimizer) for number in indices]
    for number, values in zip(indices, described, strict=True):
        task_run, scores = task_runs[number], _scores(result, run, number)
        mean, half = _mean(scores)
        taken = number == chosen and mean is not None
        spread = "" if half is None else f" ± {percent(half)}"
        valid = "diverged" if mean is None else percent(mean) + spread
        rows.append([*map(shown, values.values()), valid, " ".join(map(percent, scores)), "yes" * taken])
        prompt, lr = task_run.setting.prompt, (task_run.optimizer or optimizer).lr
        known = {"valid": scores, "mean": mean, "half_width_95": half, "taken": taken}
        found.append({"length": prompt.length, "rank": prompt.rank, "lr": lr, **task_run.tried, **known})
    text = [
        "# Sweep",
        "",
        f"The task's metric on valid, in %; mean and 95 % Student-t interval over {len(run.seeds)} seeds. Only the",
        "chosen setting, with the best mean, was scored on test.",
        "",
        *table([*described[0], "valid", "seeds", "chosen"], rows),
        "",
    ]
    path = epath.Path(directory)
    write_file(path / "sweep.md", "\n".join(text).encode())
    write_file(path / "sweep.json", (json.dumps(found, indent=1) + "\n").encode())
    best = found[chosen - indices.start]
    if best["mean"] is None:
        return f"of {len(indices)} settings all have a seed that diverged"
    setting = ", ".join(f"{name} {shown(value)}" for name, value in described[chosen - indices.start].items())
    return f"of {len(indices)} settings {setting} is best on valid ({percent(best['mean'])} %)"
