"""A sweep is a bank: every setting that is tried is a lesson, all are trained together, and one is chosen on valid."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from spjax.evaluation import metrics
from spjax.evaluation.markdown import percent, shown, table
from spjax.storage.files import write_file
from spjax.training import optim, train


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Values that are tried, each with each, by every seed, of fields of `prompt`, `loss` and `optim` by their names.

    What is empty is as those say. Members of a bank may differ in these fields and in no others.

    Attributes:
      length, rank, alpha, init, dropout, verbalizer_dropout, lora_dropout: of `PromptConfig`.
      noise, label_smoothing: of `LossConfig`.
      weight_decay, lr: of `OptimConfig`.
    """

    length: tuple[int, ...] = ()
    rank: tuple[int, ...] = ()
    alpha: tuple[float, ...] = ()
    init: tuple[str, ...] = ()
    dropout: tuple[float, ...] = ()
    verbalizer_dropout: tuple[float, ...] = ()
    lora_dropout: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()
    label_smoothing: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()
    lr: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values = tuple(getattr(self, field.name))
            object.__setattr__(self, field.name, values)
            kinds, least, must = _VALUES.get(field.name, _RATES)
            proper = all(type(value) in kinds and (type(value) is str or least < value < math.inf) for value in values)
            if not proper or len(set(values)) < len(values):
                raise ValueError(f"sweep: {field.name} {values} must be different {must}")

    @property
    def tried(self) -> list[dict[str, Any]]:
        """Every setting, by the fields' names; of an empty sweep one that says nothing."""
        every = {name: values for name, values in dataclasses.asdict(self).items() if values}
        return [dict(zip(every, values, strict=True)) for values in itertools.product(*every.values())]


_WHOLE = ((int,), 0, "numbers, whole and above 0")
_RATES = ((int, float), -1e-9, "numbers, 0 or more")
_VALUES: dict[str, tuple[tuple[type, ...], float, str]] = {
    "length": _WHOLE, "rank": _WHOLE, "init": ((str,), 0, "words"),
    **dict.fromkeys(("lr", "alpha"), ((int, float), 0, "numbers, above 0")),
}  # fmt: skip


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """A part of the settings with those of the values that are its fields.

    Raises:
      ValueError: a value that the part refuses.
    """
    return dataclasses.replace(config, **{name: value for name, value in values.items() if hasattr(config, name)})


def lessons_of(lesson: train.Lesson, sweep: SweepConfig, optimizer: optim.OptimConfig) -> list[train.Lesson]:
    """A task's lesson with every setting of the sweep."""
    setting = lesson.setting
    return [
        dataclasses.replace(
            lesson,
            setting=dataclasses.replace(
                setting, prompt=with_values(setting.prompt, tried), loss=with_values(setting.loss, tried)
            ),
            optimizer=with_values(optimizer, tried),
            tried=tried,
        )
        for tried in sweep.tried
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
    optimizer: optim.OptimConfig,
) -> str:
    """Write DIRECTORY/sweep.md and sweep.json: what each setting came to on valid, and which was taken.

    Args:
      directory: of the task's report.
      lessons, result, run, own: as of `choose`.
      chosen: what it returned.
      optimizer: of the bank.

    Returns:
      A line that says what was taken.
    """
    rows: list[list[str]] = []
    found: list[dict[str, Any]] = []
    described = [lessons[number].described(optimizer) for number in own]
    for number, values in zip(own, described, strict=True):
        lesson, scores = lessons[number], _scores(result, run, number)
        mean, half = _mean(scores)
        taken = number == chosen and mean is not None
        spread = "" if half is None else f" ± {percent(half)}"
        valid = "diverged" if mean is None else percent(mean) + spread
        rows.append([*map(shown, values.values()), valid, " ".join(map(percent, scores)), "yes" * taken])
        prompt, lr = lesson.setting.prompt, (lesson.optimizer or optimizer).lr
        known = {"valid": scores, "mean": mean, "half_width_95": half, "taken": taken}
        found.append({"length": prompt.length, "rank": prompt.rank, "lr": lr, **lesson.tried, **known})
    text = [
        "# Sweep",
        "",
        f"The task's metric on valid, in %; mean and 95 % Student-t interval over {len(run.seeds)} seeds. Only the",
        "setting that is taken, the best of them on average, was scored on test.",
        "",
        *table([*described[0], "valid", "seeds", "taken"], rows),
        "",
    ]
    path = epath.Path(directory)
    write_file(path / "sweep.md", "\n".join(text).encode())
    write_file(path / "sweep.json", (json.dumps(found, indent=1) + "\n").encode())
    best = found[chosen - own.start]
    if best["mean"] is None:
        return f"of {len(own)} settings there is none of which no seed diverged"
    setting = ", ".join(f"{name} {shown(value)}" for name, value in described[chosen - own.start].items())
    return f"of {len(own)} settings {setting} is best on valid ({percent(best['mean'])} %)"
