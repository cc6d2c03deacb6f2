"""Write the report of a job: results.json, predictions, summary.md and plots in the work directory.

Runs on the host only. Every file is written atomically. Shape letters: docs/design.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from spjax.evaluation import plots
from spjax.evaluation.markdown import cell, percent, shown, table
from spjax.evaluation.outcome import Member, packed_predictions
from spjax.evaluation.results import confusions, make_results
from spjax.io.files import write_file
from spjax.tasks import BASELINES, METRICS, Task
from spjax.types import Json


def write_report(
    workdir: epath.PathLike, *, task: Task, members: Sequence[Member], split: str = "test", **described: Any
) -> Json:
    """Score the members and write the report.

    Files: `results.json` (strict JSON: non-finite numbers become null), `summary.md`,
    `predictions/seed_<seed>.jsonl.gz` (for `outcome.read_predictions`), `plots/learning_curve.png` and
    `plots/confusion_<k>_<slot>.png` (summed over members).

    Args:
      workdir: local or gs://, created if absent; files of an earlier report are replaced.
      task, members, split, described: see `make_results`.

    Returns:
      The content of results.json.

    Raises:
      ValueError: as `make_results`.
    """
    results, directory = make_results(task, members, split=split, **described), epath.Path(workdir)
    for member, written in zip(members, results["members"], strict=True):
        write_file(directory / written["predictions"], packed_predictions(task, member))
    drawn = results["plots"]
    write_file(directory / drawn["learning_curve"], plots.learning_curves(task, members))
    for slot, matrix in zip(task.slots, confusions(task, members), strict=True):
        image = plots.confusion(f"{task.name}: {slot.name}, {split}", slot.labels, matrix)
        write_file(directory / drawn[slot.name], image)
    write_file(directory / "summary.md", summary(results).encode())
    # Written last: if results.json exists, the report is complete.
    text = json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False)
    write_file(directory / "results.json", (text + "\n").encode())
    return results


def write_overview(workdir: epath.PathLike, reports: Sequence[Json]) -> str:
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


def summary(results: Json) -> str:
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


def _spread(scores: Json) -> str:
    """Format the result of `_over_seeds` in per cent."""
    half = scores["half_width_95"]
    return percent(scores["mean"]) + ("" if half is None else f" ± {percent(half)}")


def _with_interval(results: Json) -> str:
    """Format the score of a single seed with its interval over utterances."""
    ends = plots.interval(results)
    return percent(results["headline"]["mean"]) + (f" ({' to '.join(map(percent, ends))})" if ends else "")


def _verdict(results: Json) -> str:
    """Format `plots.against_baselines` in points."""
    found = plots.against_baselines(results)
    return f"{100 * found[0]:+.2f} ({found[1]})" if found else "–"


def _setting(results: Json, place: str) -> str:
    """Format the hyperparameters and the size of the sweep; `place`: directory of the task's report."""
    values = ", ".join(f"{cell(name)} {cell(shown(value))}" for name, value in results["setting"].items())
    return values + (f" (of {results['tried']} tried: [sweep]({place}sweep.md))" if results["tried"] > 1 else "")
