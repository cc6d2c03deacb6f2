"""Variants of a job beside each other: what each gains on a baseline, paired over seeds and over test utterances.

Everything is read from the reports that the variants wrote (results.json and predictions/). Two 95 % intervals answer
two questions: over seeds, how far the gain would move with other seeds of the prompts (Student-t of the differences
seed by seed); over utterances, how far with other test utterances of the same kind and number (paired bootstrap of the
mean over seeds, which takes utterances for independent).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from spjax.evaluation import metrics
from spjax.evaluation.markdown import cell, percent, table
from spjax.evaluation.outcome import Predictions
from spjax.evaluation.report import read_predictions
from spjax.storage.files import write_file
from spjax.tasks import METRICS, Slot, Task

DRAWS = 10_000
Interval = tuple[float, float]


class Scored(NamedTuple):
    """A report as it was written.

    Attributes:
      results: content of results.json.
      answers: predictions of each member, in the order of `results["members"]`.
    """

    results: Mapping[str, Any]
    answers: Sequence[Predictions]

    @property
    def task(self) -> Task:
        """What was scored."""
        slots = tuple(Slot(name, tuple(labels)) for name, labels in self.results["slots"].items())
        return Task(self.results["task"], slots, self.results["metric"])

    @property
    def seeds(self) -> list[int]:
        """Of the members."""
        return [member["seed"] for member in self.results["members"]]


def read_scored(directory: epath.PathLike) -> Scored:
    """Read the report in a directory.

    Raises:
      ValueError: results.json or predictions are damaged; names the file.
      FileNotFoundError: they are absent.
    """
    path = epath.Path(directory) / "results.json"
    try:
        scored = Scored(json.loads(path.read_text()), ())
        files = [path.parent / member["predictions"] for member in scored.results["members"]]
        task = scored.task
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no report ({error!r}): remove it, and the same command makes it again") from error
    return scored._replace(answers=[read_predictions(file, task) for file in files])


def check_pairs(ours: Scored, theirs: Scored) -> None:
    """Raise ValueError unless both have answered the same utterances of the same task, with the same seeds."""
    for name in ("task", "metric", "split", "slots"):
        if ours.results[name] != theirs.results[name]:
            raise ValueError(f"one is a report of {name} {ours.results[name]!r}, one of {theirs.results[name]!r}")
    if ours.seeds != theirs.seeds:
        raise ValueError(f"one is of the seeds {ours.seeds}, one of {theirs.seeds}: train both with the same")
    for seed, one, other in zip(ours.seeds, ours.answers, theirs.answers, strict=True):
        if len(one.ids) != len(other.ids):
            raise ValueError(f"seed {seed} answered {len(one.ids)} utterances in one, {len(other.ids)} in the other")
        for i, (mine, yours) in enumerate(zip(one.ids, other.ids, strict=True)):
            if mine != yours:
                raise ValueError(f"utterance {i} of seed {seed} is {mine!r} in one, {yours!r} in the other")
            if (one.true[i] != other.true[i]).any():
                raise ValueError(f"utterance {mine!r} has other labels in one than in the other")


def over_seeds(differences: Sequence[float]) -> Interval | None:
    """95 % Student-t interval of the mean of paired differences, one a seed; None of a single seed.

    Raises:
      ValueError: no differences, or one that is not finite.
    """
    mean, half = metrics.mean_interval(differences)
    return None if half is None else (mean - half, mean + half)


def over_utterances(differences: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Interval:
    """95 % percentile interval of the mean of paired differences, by bootstrap.

    Args:
      differences: float [n], one an utterance.
      draws: test sets that are drawn.
      seed: of the draws.

    Raises:
      ValueError: no differences, or one that is not finite.
    """
    differences = np.asarray(differences, np.float64)
    if differences.ndim != 1 or not differences.size or not np.isfinite(differences).all():
        raise ValueError(f"differences of shape {list(differences.shape)} must be [n], at least one, all finite")
    # Which utterance has a difference is all one: how often each value is drawn is multinomial.
    values, counts = np.unique(differences, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=draws)
    low, high = np.quantile(drawn @ values / counts.sum(), [0.025, 0.975])
    return float(low), float(high)


def gain(ours: Scored, baseline: Scored, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """What one report gains on another: differences of the task's metric, positive where ours is better.

    Returns:
      `mean` and `values` (one a seed); `over_seeds` and `over_utterances`, each None or `low`, `high` and
      `excludes_zero`. There is none over seeds of a single seed, and none over utterances of a metric that is no mean
      over them (EER, weighted F1).

    Raises:
      ValueError: the reports cannot be paired (`check_pairs`).
    """
    check_pairs(ours, baseline)
    sign = -1 if ours.results["lower_is_better"] else 1
    values = [
        sign * (one["metrics"]["headline"] - other["metrics"]["headline"])
        for one, other in zip(ours.results["members"], baseline.results["members"], strict=True)
    ]
    mine, theirs = _right(ours), _right(baseline)
    utterances = None if mine is None or theirs is None else np.mean(mine - theirs, axis=0)
    return {
        "mean": float(np.mean(values)),
        "values": values,
        "over_seeds": _told(over_seeds(values)),
        "over_utterances": _told(None if utterances is None else over_utterances(utterances, draws, seed)),
    }


def _right(scored: Scored) -> np.ndarray | None:
    """What each answer adds to the metric, float64 [seeds, n]; None where that is no mean over utterances."""
    right: np.ndarray = np.stack([np.asarray(one.true) == np.asarray(one.predicted) for one in scored.answers])
    if scored.task.metric == "exact_match":
        return np.all(right, axis=2).astype(np.float64)
    return np.mean(right, axis=2) if scored.task.metric == "accuracy" else None


def _told(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    low, high = interval
    return {"low": low, "high": high, "excludes_zero": low > 0 or high < 0}


def compare(reports: Mapping[str, Mapping[str, Scored]], baseline: str, draws: int = DRAWS) -> dict[str, Any]:
    """Every variant on every task, and what it gains on the baseline.

    Args:
      reports: by variant, then by task.
      baseline: one of the variants.
      draws: of the bootstrap.

    Returns:
      The content of comparison.json.

    Raises:
      ValueError: reports that cannot be paired, or a variant without a task that the baseline has.
    """
    tasks: dict[str, Any] = {}
    for task, base in reports[baseline].items():
        ngram = base.results["baselines"].get("ngram")
        variants: dict[str, Any] = {}
        for name, scored in reports.items():
            if task not in scored:
                raise ValueError(f"variant {name!r} has no report of {task!r}, which {baseline!r} has")
            variants[name] = dict(scored[task].results["headline"])
            if name != baseline:
                try:
                    variants[name]["gain"] = gain(scored[task], base, draws)
                except ValueError as error:
                    raise ValueError(f"{task}, {name} against {baseline}: {error}") from error
        tasks[task] = {
            "metric": base.results["metric"],
            "lower_is_better": base.results["lower_is_better"],
            "split": base.results["split"],
            "utterances": len(base.answers[0].ids),
            "seeds": base.seeds,
            "ngram": ngram and ngram[base.results["split"]],
            "variants": variants,
        }
    return {"format": "spjax-comparison", "version": 1, "baseline": baseline, "draws": draws, "tasks": tasks}


def summary(comparison: Mapping[str, Any], links: Mapping[str, str] | None = None) -> str:
    """The Markdown page of a comparison.json; `links`: path of the page of each variant."""
    baseline, tasks = comparison["baseline"], comparison["tasks"]
    names = list(next(iter(tasks.values()))["variants"])
    shown = {name: f"[{cell(name)}]({links[name]})" if links else cell(name) for name in names}
    splits = sorted({told["split"] for told in tasks.values()})
    rows, gains = [], []
    for task, told in tasks.items():
        metric = METRICS[told["metric"]] + (" (lower is better)" if told["lower_is_better"] else "")
        means = [
            percent(one["mean"]) + ("" if one["half_width_95"] is None else f" ± {percent(one['half_width_95'])}")
            for one in told["variants"].values()
        ]
        rows.append([cell(task), metric, str(told["utterances"]), percent(told["ngram"]), *means])
        for name, one in told["variants"].items():
            if name != baseline:
                found = one["gain"]
                intervals = [found["over_seeds"], found["over_utterances"]]
                points = [_points(found["mean"]), *map(_range, intervals)]
                gains.append([cell(task), cell(name), *points, _verdict(*intervals)])
    seeds = max(len(told["seeds"]) for told in tasks.values())
    over = f"mean and 95 % Student-t interval over {seeds} seeds" if seeds > 1 else "one seed"
    heads = [shown[name] + (" (baseline)" if name == baseline else "") for name in names]
    lines = [
        f"# {len(names)} variants on {len(tasks)} task{'s' if len(tasks) > 1 else ''}",
        "",
        f"{' and '.join(splits)} split, %; {over}; stopping and every choice on valid only.",
        "The n-gram baseline goes by units alone.",
        "",
        *table(["task", "metric", "utterances", "n-gram", *heads], rows),
        "",
        f"## Gain over {cell(baseline)}",
        "",
        "In points; positive is better. Differences are paired: the same seed, the same test utterances.",
        f"Over seeds: Student-t. Over utterances: bootstrap of the mean over seeds, {comparison['draws']:,} draws, of",
        "utterances taken for independent: where speakers or sentences recur, it says nothing of others.",
        f"No interval is corrected for there being {len(gains)} of them.",
        "",
        *table(["task", "variant", "gain", "95 % over seeds", "95 % over utterances", "excludes zero"], gains),
        "",
        "Each variant's LM was pretrained once: no interval says how far the gain would move with another pretraining.",
        "",
        "`comparison.json` holds the numbers in full, each variant's directory its own reports.",
        "",
    ]
    return "\n".join(lines)


def _points(share: float) -> str:
    return f"{round(100 * share, 2) + 0.0:+.2f}"  # there is no -0.00


def _range(interval: Mapping[str, Any] | None) -> str:
    return "–" if interval is None else f"{_points(interval['low'])} to {_points(interval['high'])}"


def _verdict(seeds: Mapping[str, Any] | None, utterances: Mapping[str, Any] | None) -> str:
    """Which of the intervals that there are exclude zero."""
    there = {name: told for name, told in (("seeds", seeds), ("utterances", utterances)) if told}
    excluding = [name for name, told in there.items() if told["excludes_zero"]]
    if not there:
        return "–"
    return "yes" if len(excluding) == 2 else f"over {excluding[0]} only" if excluding else "no"


def write_comparison(
    workdir: epath.PathLike, reports: Mapping[str, Mapping[str, epath.PathLike]], baseline: str, draws: int = DRAWS
) -> dict[str, Any]:
    """Compare reports on disk and write `summary.md` and `comparison.json`.

    Args:
      workdir: local or gs://; the variant NAME's own page is WORKDIR/NAME/summary.md.
      reports: directory of each report, by variant, then by task.
      baseline: one of the variants.
      draws: of the bootstrap.

    Returns:
      The content of comparison.json.

    Raises:
      ValueError: as `read_scored` and `compare`.
    """
    scored = {name: {task: read_scored(place) for task, place in tasks.items()} for name, tasks in reports.items()}
    found = compare(scored, baseline, draws)
    directory = epath.Path(workdir)
    links = {name: os.path.join(name, "summary.md") for name in reports}
    write_file(directory / "summary.md", summary(found, links).encode())
    write_file(directory / "comparison.json", (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    return found
