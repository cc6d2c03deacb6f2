"""A sweep is a bank: every learning rate, prompt length and rank a lesson, trained together, chosen on valid."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from spjax.evaluation import metrics
from spjax.evaluation.markdown import percent, table
from spjax.storage.files import write_file
from spjax.training import train


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """What is tried, each with each, by every seed; what is empty is as the other settings say.

    Attributes:
      lr: peak learning rates, instead of `optim.lr`.
      length: prompt lengths, instead of `prompt.length`.
      rank: ranks of low-rank adapters, instead of `prompt.rank`; alpha is the same for all.
    """

    lr: tuple[float, ...] = ()
    length: tuple[int, ...] = ()
    rank: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        kinds_of = {"lr": (int, float), "length": (int,), "rank": (int,)}
        for name, kinds in kinds_of.items():
            told = "above 0" if float in kinds else "whole and above 0"
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            proper = all(type(value) in kinds and 0 < value < math.inf for value in values)
            if not proper or len(set(values)) < len(values):
                raise ValueError(f"sweep: {name} {values} must be different numbers, {told}")


def lessons_of(lesson: train.Lesson, sweep: SweepConfig) -> list[train.Lesson]:
    """A task's lesson with every prompt length, rank and learning rate of the sweep."""
    own = lesson.setting.prompt
    shapes = itertools.product(sweep.length or (own.length,), sweep.rank or (own.rank,))
    prompts = [dataclasses.replace(own, length=length, rank=rank) for length, rank in shapes]
    # Lessons that differ in the learning rate alone share a setting, and so the programs that answer.
    settings = [dataclasses.replace(lesson.setting, prompt=prompt) for prompt in prompts]
    return [
        dataclasses.replace(lesson, setting=setting, lr=lr)
        for setting, lr in itertools.product(settings, sweep.lr or (lesson.lr,))
    ]


def runs_of(swept: Sequence[Sequence[train.Lesson]]) -> list[range]:
    """Numbers of each task's lessons among all."""
    stops = list(itertools.accumulate(map(len, swept)))
    return [range(stop - len(lessons), stop) for stop, lessons in zip(stops, swept, strict=True)]


def _scores(result: train.Trained, run: train.TrainConfig, number: int) -> list[float | None]:
    """Of each seed the task's metric on valid, at the epoch that was kept; None where none is, since it diverged."""
    members = range(number * len(run.seeds), (number + 1) * len(run.seeds))
    return [float(result.history[best]["metric"][n]) if (best := result.best_epoch[n]) >= 0 else None for n in members]


def _mean(scores: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and half the 95 % interval; None where a seed diverged."""
    known = [score for score in scores if score is not None]
    return metrics.mean_interval(known) if len(known) == len(scores) else (None, None)


def choose(lessons: Sequence[train.Lesson], result: train.Trained, run: train.TrainConfig, own: range) -> int:
    """The lesson of a task whose seeds are best on valid, on average; of equal ones the first.

    One of which a seed diverged before its first evaluation is chosen only where there is no other.

    Args:
      lessons: of the whole bank.
      result: what came of it.
      run: its seeds.
      own: numbers of the task's lessons.
    """
    sign = -1 if lessons[own.start].lower_is_better else 1
    means = {number: _mean(_scores(result, run, number))[0] for number in own}
    return max(own, key=lambda number: (-math.inf if (mean := means[number]) is None else sign * mean, -number))


def write_table(
    directory: epath.PathLike,
    lessons: Sequence[train.Lesson],
    result: train.Trained,
    run: train.TrainConfig,
    own: range,
    chosen: int,
) -> str:
    """Write DIRECTORY/sweep.md and sweep.json: what each setting came to on valid, and which was taken.

    Returns:
      A line that says what was taken.
    """
    rows: list[list[str]] = []
    found: list[dict[str, Any]] = []
    ranks = ["LoRA rank"] if any(lessons[number].setting.prompt.rank for number in own) else []
    for number in own:
        lesson, scores = lessons[number], _scores(result, run, number)
        mean, half = _mean(scores)
        prompt, lr, taken = lesson.setting.prompt, lesson.lr, number == chosen and mean is not None
        spread = "" if half is None else f" ± {percent(half)}"
        shown = "as optim.lr" if lr is None else f"{lr:g}"
        valid = "diverged" if mean is None else percent(mean) + spread
        shape = [str(prompt.length), *([str(prompt.rank)] if ranks else [])]
        rows.append([*shape, shown, valid, " ".join(map(percent, scores)), "yes" * taken])
        known = {"valid": scores, "mean": mean, "half_width_95": half, "taken": taken}
        found.append({"length": prompt.length, "rank": prompt.rank, "lr": lr, **known})
    text = [
        "# Sweep",
        "",
        f"The task's metric on valid, in %; mean and 95 % Student-t interval over {len(run.seeds)} seeds. Only the",
        "setting that is taken, the best of them on average, was scored on test.",
        "",
        *table(["prompt length", *ranks, "learning rate", "valid", "seeds", "taken"], rows),
        "",
    ]
    path = epath.Path(directory)
    write_file(path / "sweep.md", "\n".join(text).encode())
    write_file(path / "sweep.json", (json.dumps(found, indent=1) + "\n").encode())
    best = found[chosen - own.start]
    if best["mean"] is None:
        return f"of {len(own)} settings there is none of which no seed diverged"
    told = "" if best["lr"] is None else f", learning rate {best['lr']:g}"
    told = (f", LoRA rank {best['rank']}" if ranks else "") + told
    return f"of {len(own)} settings prompt length {best['length']}{told} is best on valid ({percent(best['mean'])} %)"
