"""Write the report of a job: results.json, predictions, summary.md and plots in the work directory.

Runs on the host only. Every file is written atomically. Shape letters: docs/design.md.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from spjax.evaluation import metrics, plots
from spjax.evaluation.markdown import cell, percent, shown, table
from spjax.evaluation.outcome import Member, Predictions
from spjax.io.files import write_file
from spjax.tasks import BASELINES, LOWER_IS_BETTER, METRICS, Task


def write_report(
    workdir: epath.PathLike,
    *,
    task: Task,
    members: Sequence[Member],
    split: str = "test",
    baselines: Mapping[str, Mapping[str, Any]] | None = None,
    ensemble: Predictions | None = None,
    parameters: Mapping[str, int] | None = None,
    setting: Mapping[str, Any] | None = None,
    tried: int = 1,
    config: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    comparisons: Sequence[tuple[str, float]] = (),
    command: str | None = None,
) -> dict[str, Any]:
    """Score the members and write the report.

    Files: `results.json` (strict JSON: non-finite numbers become null), `summary.md`,
    `predictions/seed_<seed>.jsonl.gz` (for `read_predictions`), `plots/learning_curve.png` and
    `plots/confusion_<k>_<slot>.png` (summed over members).

    Args:
      workdir: local or gs://, created if absent; files of an earlier report are replaced.
      task: slots, labels, metric.
      members: one or more, with different seeds.
      split: split of the predictions.
      baselines: results of `linear.fit_linear` by their key in `tasks.BASELINES`.
      ensemble: predictions from the mean log probabilities of all members.
      parameters: counts of one member by name, e.g. {"trained": 126816, "frozen": 151263232}.
      setting: hyperparameters by name, e.g. {"prompt length": 48, "learning rate": 0.01}.
      tried: number of settings among which this one was chosen on valid.
      config: the job's config.
      provenance: information about data and LM (card fields, hashes).
      comparisons: (name, value of the task's metric) of other systems.
      command: command that reproduces the run.

    Returns:
      The content of results.json.

    Raises:
      ValueError: no members, duplicate seeds, or predictions that do not fit the task.
    """
    seeds = [member.seed for member in members]
    if not seeds:
        raise ValueError("a report needs at least one member")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"members share a seed: {seeds}")
    scores = [_score(task, member) for member in members]
    counts = _confusions(task, members)
    files = {seed: f"predictions/seed_{seed}.jsonl.gz" for seed in seeds}
    drawn = {"learning_curve": "plots/learning_curve.png"}
    drawn |= {slot.name: f"plots/confusion_{k}_{_file_name(slot.name)}.png" for k, slot in enumerate(task.slots)}

    results = _plain(
        {
            "format": "spjax-results",
            "version": 1,
            "task": task.name,
            "metric": task.metric,
            "lower_is_better": task.metric in LOWER_IS_BETTER,
            "split": split,
            "slots": {slot.name: slot.labels for slot in task.slots},
            "setting": setting or {},
            "tried": tried,
            "headline": _over_seeds([s["headline"] for s in scores]),
            "valid": _over_seeds([member.best_valid for member in members]),
            "metrics": {name: _over_seeds([s[name] for s in scores]) for name in scores[0] if name != "headline"},
            "members": [
                {
                    "seed": member.seed,
                    "best_epoch": member.best_epoch,
                    "best_valid": member.best_valid,
                    "utterances": len(member.predictions.ids),
                    "metrics": values,
                    "interval_95": _single_run_interval(task, member),
                    "notes": member.notes,
                    "predictions": files[member.seed],
                    "curve": [dataclasses.asdict(point) for point in member.curve],
                }
                for member, values in zip(members, scores, strict=True)
            ],
            "confusions": {
                slot.name: [
                    {"true": slot.labels[t], "predicted": slot.labels[p], "count": c, "share_of_true": share}
                    for t, p, c, share in metrics.top_confusions(matrix, plots.TOP_CONFUSIONS)
                ]
                for slot, matrix in zip(task.slots, counts, strict=True)
            },
            "baselines": baselines or {},
            "ensemble": None if ensemble is None else metrics.score(task, *_scored(ensemble)),
            "comparisons": [{"name": name, "value": value} for name, value in comparisons],
            "parameters": parameters or {},
            "provenance": provenance or {},
            "config": config or {},
            "command": command,
            "plots": drawn,
        }
    )

    workdir = epath.Path(workdir)
    for member in members:
        write_file(workdir / files[member.seed], _packed_predictions(task, member))
    write_file(workdir / drawn["learning_curve"], plots.learning_curves(task, members))
    for slot, matrix in zip(task.slots, counts, strict=True):
        write_file(
            workdir / drawn[slot.name], plots.confusion(f"{task.name}: {slot.name}, {split}", slot.labels, matrix)
        )
    write_file(workdir / "summary.md", summary(results).encode())
    # Written last: if results.json exists, the report is complete.
    text = json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False)
    write_file(workdir / "results.json", (text + "\n").encode())
    return results


def write_overview(workdir: epath.PathLike, reports: Sequence[Mapping[str, Any]]) -> str:
    """Write `summary.md` and `overview.png` of a bank of several tasks, whose reports are in WORKDIR/TASK.

    The table has a row for each task: setting chosen on valid, trained parameters, valid and test scores, baselines.

    Args:
      workdir: local or gs://.
      reports: content of each task's results.json.

    Returns:
      Path of summary.md.
    """
    directory = epath.Path(workdir)
    rows = []
    for results in reports:
        head, baselines = results["headline"], results["baselines"]
        trained = results["parameters"].get("trained")
        rows.append(
            [
                f"[{cell(results['task'])}]({results['task']}/summary.md)",
                METRICS[results["metric"]] + (" (lower is better)" if results["lower_is_better"] else ""),
                _setting(results, f"{results['task']}/") or "–",
                "–" if trained is None else f"{trained:,}",
                _spread(results["valid"]),
                _spread(head) if head["half_width_95"] is not None else _with_interval(results),
                str(results["members"][0]["utterances"]),
                *(percent(baselines[name][results["split"]]) if name in baselines else "–" for name in BASELINES),
                _verdict(results),
            ]
        )
    split, seeds = reports[0]["split"], len(reports[0]["members"])
    over = (
        f"mean and 95 % Student-t interval over {seeds} seeds"
        if seeds > 1
        else "one seed, 95 % interval over utterances"
    )
    lines = [
        f"# {len(reports)} tasks, one frozen LM, one bank of prompts",
        "",
        f"In %, {over}. Early stopping and all choices used valid, so its scores are biased; {split} was scored once.",
        "",
        *table(
            [
                "task",
                "metric",
                "setting",
                "trained numbers",
                "valid",
                f"**{split}**",
                f"{split} utterances",
                *(f"{name}, {split}" for name in BASELINES.values()),
                "against the better baseline",
            ],
            rows,
        ),
        "",
        "![ours and the baselines](overview.png)",
        "",
    ]
    write_file(directory / "overview.png", plots.overview(reports))
    write_file(directory / "summary.md", "\n".join(lines).encode())
    return os.fspath(directory / "summary.md")


def read_predictions(path: epath.PathLike, task: Task) -> Predictions:
    """Read a `predictions/seed_<seed>.jsonl.gz`.

    Raises:
      ValueError: a line is not a prediction of this task (names file and line).
    """
    offsets = task.slot_offsets
    numbers = [{label: offsets[k] + i for i, label in enumerate(slot.labels)} for k, slot in enumerate(task.slots)]
    ids, true, predicted, probabilities = [], [], [], []
    with epath.Path(path).open("rb") as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        for n, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                ids.append(row["id"])
                true.append([numbers[k][row["true"][slot.name]] for k, slot in enumerate(task.slots)])
                predicted.append([numbers[k][row["predicted"][slot.name]] for k, slot in enumerate(task.slots)])
                probabilities.append([row["probabilities"][slot.name] for slot in task.slots])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {n}: not a prediction of task {task.name!r} ({error!r})") from error
    return Predictions(
        ids,
        np.asarray(true, np.int32).reshape(len(ids), len(task.slots)),
        np.asarray(predicted, np.int32).reshape(len(ids), len(task.slots)),
        [
            np.asarray([row[k] for row in probabilities], np.float64).reshape(len(ids), len(slot.labels))
            for k, slot in enumerate(task.slots)
        ],
    )


def summary(results: Mapping[str, Any]) -> str:
    """Render a results.json as Markdown."""
    metric = METRICS[results["metric"]]
    head = results["headline"]
    members = results["members"]
    slots = list(results["slots"])
    spread = (
        f"± {percent(head['half_width_95'])} (mean of {len(members)} seeds, 95 % Student-t interval over seeds)"
        if head["half_width_95"] is not None
        else "(one seed, so no interval over seeds)"
    )
    direction = "Lower" if results["lower_is_better"] else "Higher"
    lines = [
        f"# {cell(results['task'])}: {metric} {percent(head['mean'])} %",
        "",
        f"**{percent(head['mean'])} % {spread}**, {results['split']} split, {members[0]['utterances']} utterances.",
        f"{direction} is better; early stopping and all choices used valid only.",
        "",
    ]
    if setting := _setting(results, ""):
        lines += [f"{setting[0].upper()}{setting[1:]}.", ""]

    rows = [[f"**ours** ({len(members)} seed{'s' if len(members) > 1 else ''})", f"**{percent(head['mean'])}**"]]
    if results["ensemble"]:
        rows += [[f"ensemble of the {len(members)} seeds", percent(results["ensemble"]["headline"])]]
    for kind, baseline in results["baselines"].items():
        layer = f" of layer {baseline['layer']}" if "layer" in baseline else ""
        rows += [
            [
                f"{BASELINES[kind]}{layer}, {name.replace('_', ' ')}"
                + (" (chosen on valid)" if name == baseline["chosen"] else ""),
                percent(value),
            ]
            for name, variant in baseline["variants"].items()
            if (value := variant.get(results["split"], {}).get("headline")) is not None
        ]
    rows += [[cell(entry["name"]), percent(entry["value"])] for entry in results["comparisons"]]
    lines += [*table([results["split"], f"{metric}, %"], rows), ""]

    lines += ["## Seeds", ""]
    several = len(slots) > 1
    header = ["seed", "best epoch", f"valid {metric}", f"{results['split']} {metric}", "95 % of the run (Wilson)"]
    header += [f"{cell(slot)} accuracy" for slot in slots] if several else ["macro F1", "weighted F1"]
    rows = []
    for member in members:
        values, interval = member["metrics"], member["interval_95"]
        row = [str(member["seed"]), f"{member['best_epoch']:g}", percent(member["best_valid"])]
        row += [percent(values["headline"]), " to ".join(map(percent, interval)) if interval else "–"]
        names = [f"accuracy/{slot}" for slot in slots] if several else ["macro_f1", "weighted_f1"]
        rows.append(row + [percent(values[name]) for name in names])
    lines += [*table(header, rows), ""]
    noted = [member for member in members if member["notes"]]
    lines += [f"- seed {m['seed']}: " + ", ".join(f"{k} {cell(v)}" for k, v in m["notes"].items()) for m in noted]
    lines += [""] if noted else []
    lines += ["![learning curve](plots/learning_curve.png)", ""]

    lines += ["## Most frequent confusions (all seeds)", ""]
    for slot in slots:
        top = results["confusions"][slot][:5]
        lines += [f"{cell(slot)}:" + ("" if top else " none")]
        lines += [
            f"- {cell(c['true'])} predicted as {cell(c['predicted'])}: {c['count']} "
            f"({percent(c['share_of_true'])} % of that label)"
            for c in top
        ]
        lines += ["", f"![confusion of {cell(slot)}]({results['plots'][slot]})", ""]

    if results["parameters"]:
        lines += ["## Parameters", ""]
        lines += [f"- {cell(name)}: {count:,}" for name, count in results["parameters"].items()]
        lines += [""]
    if results["provenance"]:
        lines += ["## Data and model", ""]
        lines += [f"- {cell(name)}: {cell(value)}" for name, value in results["provenance"].items() if value != []]
        lines += [""]
    lines += ["## Reproduce", ""]
    lines += ["```", results["command"], "```", ""] if results["command"] else []
    lines += ["`results.json` holds seeds and configuration, `predictions/` the probability of every label.", ""]
    return "\n".join(lines)


def _scored(answers: Predictions) -> tuple[np.ndarray, np.ndarray, Sequence[np.ndarray]]:
    return answers.true, answers.predicted, answers.probabilities


def _score(task: Task, member: Member) -> dict[str, float]:
    answers = member.predictions
    try:
        scores = metrics.score(task, *_scored(answers))
    except ValueError as error:
        raise ValueError(f"member of seed {member.seed}: {error}") from error
    if len(answers.ids) != len(answers.true):
        raise ValueError(f"member of seed {member.seed}: {len(answers.ids)} ids for {len(answers.true)} predictions")
    return scores


def _spread(scores: Mapping[str, Any]) -> str:
    """Format the result of `_over_seeds` in per cent."""
    half = scores["half_width_95"]
    return percent(scores["mean"]) + ("" if half is None else f" ± {percent(half)}")


def _with_interval(results: Mapping[str, Any]) -> str:
    """Format the score of a single seed with its interval over utterances."""
    ends = plots.interval(results)
    return percent(results["headline"]["mean"]) + (f" ({' to '.join(map(percent, ends))})" if ends else "")


def _verdict(results: Mapping[str, Any]) -> str:
    """Format `plots.against_baselines` in points."""
    found = plots.against_baselines(results)
    return f"{100 * found[0]:+.2f} ({found[1]})" if found else "–"


def _setting(results: Mapping[str, Any], place: str) -> str:
    """Format the hyperparameters and the size of the sweep; `place`: directory of the task's report."""
    values = ", ".join(f"{cell(name)} {cell(shown(value))}" for name, value in results["setting"].items())
    return values + (f" (of {results['tried']} tried: [sweep]({place}sweep.md))" if results["tried"] > 1 else "")


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    mean, half_width = metrics.mean_interval(values)
    return {"mean": mean, "half_width_95": half_width, "values": values}


def _single_run_interval(task: Task, member: Member) -> tuple[float, float] | None:
    """Wilson interval of the headline metric; None if it is not a proportion of utterances."""
    if task.metric not in ("accuracy", "exact_match") or (task.metric == "accuracy" and len(task.slots) > 1):
        return None
    right = (np.asarray(member.predictions.true) == np.asarray(member.predictions.predicted)).all(1)
    return metrics.wilson_interval(int(right.sum()), len(right))


def _confusions(task: Task, members: Sequence[Member]) -> list[np.ndarray]:
    """Confusion matrix of each slot, [C_k, C_k], summed over members."""
    from sklearn.metrics import confusion_matrix

    true = np.concatenate([metrics.slot_classes(task, member.predictions.true) for member in members])
    predicted = np.concatenate([metrics.slot_classes(task, member.predictions.predicted) for member in members])
    return [
        confusion_matrix(true[:, k], predicted[:, k], labels=np.arange(len(slot.labels)))
        for k, slot in enumerate(task.slots)
    ]


def _packed_predictions(task: Task, member: Member) -> bytes:
    answers = member.predictions
    true, predicted = metrics.slot_classes(task, answers.true), metrics.slot_classes(task, answers.predicted)
    packed = io.BytesIO()
    # No date and no name in the gzip header, so that the output is deterministic.
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6, mtime=0, filename="") as file:
        for i, name in enumerate(tqdm(answers.ids, f"predictions of seed {member.seed}", delay=2, leave=False)):
            row = {
                "id": str(name),
                "true": {slot.name: slot.labels[true[i, k]] for k, slot in enumerate(task.slots)},
                "predicted": {slot.name: slot.labels[predicted[i, k]] for k, slot in enumerate(task.slots)},
                "probabilities": {
                    slot.name: [float(f"{p:.6g}") for p in np.asarray(answers.probabilities[k][i]).tolist()]
                    for k, slot in enumerate(task.slots)
                },
            }
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    return packed.getvalue()


def _plain(value: Any) -> Any:
    """Convert to strict JSON types: numpy to Python, tuples to lists, non-finite to None, other types to str."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
