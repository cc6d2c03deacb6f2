"""Compare variants of a job: gain of each over a baseline, paired by seed and by test utterance.

Inputs are the variants' reports (results.json and predictions/). There are two 95 % intervals: over seeds (Student-t
of the differences for each seed), for variation with the prompt seed; over utterances (paired bootstrap of the mean
over seeds, assuming independent utterances), for variation with the test set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from spjax.evaluation import metrics
from spjax.evaluation.markdown import cell, percent, table
from spjax.evaluation.outcome import Predictions, read_predictions
from spjax.io.files import write_file
from spjax.tasks import METRICS, Slot, Task
from spjax.types import Json

DRAWS = 10_000
Interval = tuple[float, float]


class Scored(NamedTuple):
    """A report read from disk.

    Attributes:
      results: content of results.json.
      answers: predictions of each member, in the order of `results["members"]`.
    """

    results: Json
    answers: Sequence[Predictions]

    @property
    def task(self) -> Task:
        """The task of the report."""
        slots = tuple(Slot(name, tuple(labels)) for name, labels in self.results["slots"].items())
        return Task(self.results["task"], slots, self.results["metric"])

    @property
    def seeds(self) -> list[int]:
        """Seeds of the members."""
        return [member["seed"] for member in self.results["members"]]


def read_scored(directory: epath.PathLike) -> Scored:
    """Read the report in a directory.

    Raises:
      ValueError: results.json or predictions are damaged (names the file).
      FileNotFoundError: a file is missing.
    """
    path = epath.Path(directory) / "results.json"
    try:
        scored = Scored(json.loads(path.read_text()), ())
        files = [path.parent / member["predictions"] for member in scored.results["members"]]
        task = scored.task
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a report ({error!r}): remove it and run the same command to make it again"
        ) from error
    return scored._replace(answers=[read_predictions(file, task) for file in files])


def check_pairs(ours: Scored, theirs: Scored) -> None:
    """Raise ValueError unless both reports have the same task, utterances and seeds."""
    for name in ("task", "metric", "split", "slots"):
        if ours.results[name] != theirs.results[name]:
            raise ValueError(f"the reports differ in {name}: {ours.results[name]!r} and {theirs.results[name]!r}")
    if ours.seeds != theirs.seeds:
        raise ValueError(f"the reports have seeds {ours.seeds} and {theirs.seeds}: train both with the same seeds")
    for seed, one, other in zip(ours.seeds, ours.answers, theirs.answers, strict=True):
        if len(one.ids) != len(other.ids):
            raise ValueError(f"seed {seed} has {len(one.ids)} utterances in one report, {len(other.ids)} in the other")
        for i, (mine, yours) in enumerate(zip(one.ids, other.ids, strict=True)):
            if mine != yours:
                raise ValueError(f"utterance {i} of seed {seed} is {mine!r} in one report, {yours!r} in the other")
            if (one.true[i] != other.true[i]).any():
                raise ValueError(f"utterance {mine!r} has different labels in the two reports")


def over_seeds(differences: Sequence[float]) -> Interval | None:
    """95 % Student-t interval of the mean of paired differences, one for each seed; None for a single seed.

    Raises:
      ValueError: no differences, or one is not finite.
    """
    mean, half = metrics.mean_interval(differences)
    return None if half is None else (mean - half, mean + half)


def over_utterances(differences: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Interval:
    """95 % percentile bootstrap interval of the mean of paired differences.

    Args:
      differences: float [n], one for each utterance.
      draws: number of bootstrap samples.
      seed: random seed.

    Raises:
      ValueError: no differences, or one is not finite.
    """
    differences = np.asarray(differences, np.float64)
    if differences.ndim != 1 or not differences.size or not np.isfinite(differences).all():
        raise ValueError(f"differences of shape {list(differences.shape)} must be [n], at least one, all finite")
    # Only the values matter, and the number of times each is drawn is multinomial.
    values, counts = np.unique(differences, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=draws)
    low, high = np.quantile(drawn @ values / counts.sum(), [0.025, 0.975])
    return float(low), float(high)


def gain(ours: Scored, baseline: Scored, draws: int = DRAWS, seed: int = 0) -> Json:
    """Gain of one report over another: differences of the task's metric, positive if `ours` is better.

    Returns:
      `mean` and `values` (one for each seed); `over_seeds` and `over_utterances`, each None or `low`, `high` and
      `excludes_zero`. `over_seeds` is None for a single seed, `over_utterances` for metrics that are not a mean over
      utterances (EER, weighted F1).

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
        "over_seeds": _as_json(over_seeds(values)),
        "over_utterances": _as_json(None if utterances is None else over_utterances(utterances, draws, seed)),
    }


def _right(scored: Scored) -> np.ndarray | None:
    """Contribution of each prediction to the metric, float64 [seeds, n]; None if it is not a mean over utterances."""
    right: np.ndarray = np.stack([np.asarray(one.true) == np.asarray(one.predicted) for one in scored.answers])
    if scored.task.metric == "exact_match":
        return np.all(right, axis=2).astype(np.float64)
    return np.mean(right, axis=2) if scored.task.metric == "accuracy" else None


def _as_json(interval: Interval | None) -> Json | None:
    if interval is None:
        return None
    low, high = interval
    return {"low": low, "high": high, "excludes_zero": low > 0 or high < 0}


def compare(reports: Mapping[str, Mapping[str, Scored]], baseline: str, draws: int = DRAWS) -> Json:
    """Compare every variant with the baseline on every task.

    Args:
      reports: by variant, then by task.
      baseline: name of the baseline variant.
      draws: number of bootstrap samples.

    Returns:
      The content of comparison.json.

    Raises:
      ValueError: reports cannot be paired, or a variant lacks a task of the baseline.
    """
    tasks: Json = {}
    for task, base in reports[baseline].items():
        ngram = base.results["baselines"].get("ngram")
        variants: Json = {}
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


def summary(comparison: Json, links: Mapping[str, str] | None = None) -> str:
    """Render a comparison.json as Markdown; `links`: path of each variant's page."""
    baseline, tasks = comparison["baseline"], comparison["tasks"]
    names = list(next(iter(tasks.values()))["variants"])
    shown = {name: f"[{cell(name)}]({links[name]})" if links else cell(name) for name in names}
    splits = sorted({result["split"] for result in tasks.values()})
    rows, gains = [], []
    for task, result in tasks.items():
        metric = METRICS[result["metric"]] + (" (lower is better)" if result["lower_is_better"] else "")
        means = [
            percent(one["mean"]) + ("" if one["half_width_95"] is None else f" ± {percent(one['half_width_95'])}")
            for one in result["variants"].values()
        ]
        rows.append([cell(task), metric, str(result["utterances"]), percent(result["ngram"]), *means])
        for name, one in result["variants"].items():
            if name != baseline:
                found = one["gain"]
                intervals = [found["over_seeds"], found["over_utterances"]]
                points = [_points(found["mean"]), *map(_range, intervals)]
                gains.append([cell(task), cell(name), *points, _verdict(*intervals)])
    seeds = max(len(result["seeds"]) for result in tasks.values())
    over = f"mean and 95 % Student-t interval over {seeds} seeds" if seeds > 1 else "one seed"
    heads = [shown[name] + (" (baseline)" if name == baseline else "") for name in names]
    lines = [
        f"# {len(names)} variants on {len(tasks)} task{'s' if len(tasks) > 1 else ''}",
        "",
        f"{' and '.join(splits)} split, %; {over}; early stopping and all choices used valid only.",
        "The n-gram baseline uses units only.",
        "",
        *table(["task", "metric", "utterances", "n-gram", *heads], rows),
        "",
        f"## Gain over {cell(baseline)}",
        "",
        "In points; positive is better. Differences are paired by seed and by test utterance.",
        f"Over seeds: Student-t. Over utterances: bootstrap of the mean over seeds, {comparison['draws']:,} draws. It",
        "assumes independent utterances; if speakers or sentences repeat, it does not cover new ones.",
        f"Intervals are not corrected for the number of comparisons ({len(gains)}).",
        "",
        *table(["task", "variant", "gain", "95 % over seeds", "95 % over utterances", "excludes zero"], gains),
        "",
        "Each variant's LM was pretrained once: the intervals do not cover variation between pretraining runs.",
        "",
        "`comparison.json` has all numbers; the reports of a variant are in its directory.",
        "",
    ]
    return "\n".join(lines)


def _points(share: float) -> str:
    return f"{round(100 * share, 2) + 0.0:+.2f}"  # + 0.0 avoids -0.00


def _range(interval: Json | None) -> str:
    return "–" if interval is None else f"{_points(interval['low'])} to {_points(interval['high'])}"


def _verdict(seeds: Json | None, utterances: Json | None) -> str:
    """Which of the available intervals exclude zero."""
    known = {name: interval for name, interval in (("seeds", seeds), ("utterances", utterances)) if interval}
    excluding = [name for name, interval in known.items() if interval["excludes_zero"]]
    if not known:
        return "–"
    return "yes" if len(excluding) == 2 else f"over {excluding[0]} only" if excluding else "no"


def write_comparison(
    workdir: epath.PathLike, reports: Mapping[str, Mapping[str, epath.PathLike]], baseline: str, draws: int = DRAWS
) -> Json:
    """Compare reports on disk and write `summary.md` and `comparison.json`.

    Args:
      workdir: local or gs://; the page of variant NAME is WORKDIR/NAME/summary.md.
      reports: directory of each report, by variant, then by task.
      baseline: name of the baseline variant.
      draws: number of bootstrap samples.

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
