"""Table of methods: parameters, cost and score of each method on each task, from the reports and logs of the runs."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from spjax.evaluation import metrics
from spjax.evaluation.markdown import cell, percent, shown, table
from spjax.io.files import write_file
from spjax.tasks import BASELINES, METRICS
from spjax.types import Json

_HEADER = (
    "task", "method", "setting", "trained parameters", "stored", "s a step", "memory of a step", "test, %",
    "95 % over utterances", "seeds", "epochs",
)  # fmt: skip
_NOTES = """\
- **test**: mean over seeds, with its 95 % Student-t interval if there are several; **over utterances**: Wilson interval
  of that mean, for variation with the test set. Early stopping used valid only.
- **stored**: bytes of a prompt pack. Fine-tuning produces a full LM, counted as 4 bytes per parameter.
- **s a step**: median seconds of an update of one seed, from the run's log, without its first epoch (or, for a single
  epoch, its first line), in which programs are compiled. **Memory of a step**: device memory of the largest compiled
  update by XLA's memory analysis: arguments (LM, adapters, optimizer state, batch), results and temporaries. Other load
  on the machine affects the time, not the memory.
- **epochs**: passes over train, and the maximum if training stopped early.
- The n-gram model and the linear probe are fitted once, without steps; their settings are chosen on valid.
"""


def finished_runs(directory: epath.PathLike) -> list[str]:
    """Directories of the finished runs in a directory, sorted by seed; [] if it is absent."""
    found = epath.Path(directory).glob("seed_*/results.json") if epath.Path(directory).exists() else ()
    seeds = sorted(int(path.parent.name.removeprefix("seed_")) for path in found)
    return [os.path.join(directory, f"seed_{seed}") for seed in seeds]


def write(
    workdir: epath.PathLike, runs: Mapping[str, Mapping[str, Sequence[str]]], missing: Mapping[str, str]
) -> list[Json]:
    """Write `summary.md` and `methods.json`.

    Args:
      workdir: local or gs://.
      runs: directories of finished runs by task, then by method.
      missing: what each task lacks to be run; '' for nothing.

    Returns:
      The rows of methods.json.

    Raises:
      ValueError: a report is damaged, or runs of a task have different LMs or test sets.
    """
    rows = [row for task, methods in runs.items() for row in _rows(task, methods, missing.get(task, ""))]
    directory = epath.Path(workdir)
    text = {"format": "spjax-methods", "version": 1, "rows": rows}
    write_file(directory / "methods.json", (json.dumps(text, indent=1, allow_nan=False) + "\n").encode())
    lines = [*table(_HEADER, [_cells(row) for row in rows]), "", *_tasks(rows), "", _NOTES]
    write_file(directory / "summary.md", "\n".join(lines).encode())
    return rows


def _rows(task: str, methods: Mapping[str, Sequence[str]], missing: str) -> Iterator[Json]:
    """Yield a row per method and baseline, or one row for a task without runs; "absent" has the reason for no score."""
    found = {method: [(place, _read(place)) for place in places] for method, places in methods.items()}
    every = [one for some in found.values() for one in some]
    for place, results in every:
        for what, value in _common(results).items():
            if value != _common(every[0][1])[what]:
                raise ValueError(f"{place} has another {what} than {every[0][0]}: remove one, or use another --workdir")
    absent = f"missing: no {missing}" if missing else "not run"
    if not every:
        yield {"task": task, "method": "all", "absent": absent}
        return
    for method, some in found.items():
        row = _row([place for place, _ in some], [results for _, results in some]) if some else {"absent": absent}
        yield {"task": task, "method": method, **row}
    baselines = next((results for _, results in every if results["baselines"]), None)
    for kind, name in BASELINES.items():
        if baselines and kind in baselines["baselines"]:
            yield {"task": task, "method": name, **_baseline(baselines, kind)}
        else:
            yield {"task": task, "method": name, "absent": absent}


def _read(place: str) -> Any:
    path = epath.Path(place) / "results.json"
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and run the same command to make it again") from error


def _common(results: Json) -> Json:
    """Values that all runs of a task in the table must share."""
    return {
        "metric": results["metric"],
        "number of test utterances": results["members"][0]["utterances"],
        "LM": results["provenance"]["lm_hash"],
    }


def _row(places: Sequence[str], results: Sequence[Json]) -> Json:
    """Summarise the runs of a method, one for each seed."""
    mean, half = metrics.mean_interval([one["headline"]["mean"] for one in results])
    logs = [_log(place) for place in places]
    trained = results[0]["parameters"]["trained"]
    packs = [size for place in places for size in _pack_sizes(place)]
    most = sorted({one["config"]["train"]["epochs"] for one in results})
    return {
        **_common(results[0]),
        "setting": sorted({_setting(one["setting"]) for one in results}),
        "trained": trained,
        "stored_bytes": max(packs) if packs else 4 * trained,
        "whole_lm": not packs,
        "step_seconds": statistics.median([second for seconds, _ in logs for second in seconds] or [0.0]) or None,
        "step_bytes": max(size for _, size in logs) or None,
        "test": mean,
        "half_width_95": half,
        "over_utterances": _over_utterances(results[0], mean),
        "seeds": [member["seed"] for one in results for member in one["members"]],
        "epochs": [len(one["members"][0]["curve"]) for one in results],
        "most_epochs": most,
    }


def _baseline(results: Json, kind: str) -> Json:
    found = results["baselines"][kind]
    variant = found["variants"][found["chosen"]]
    setting = {**({"layer": found["layer"]} if "layer" in found else {}), "C": variant["strength"]}
    return {
        **_common(results),
        "setting": [f"{found['chosen'].replace('_', ' ')}, {_setting(setting)}"],
        "trained": variant.get("parameters"),
        "test": found[results["split"]],
        "half_width_95": None,
        "over_utterances": _over_utterances(results, found[results["split"]]),
    }


def _setting(setting: Json) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in setting.items())


def _over_utterances(results: Json, score: float) -> tuple[float, float] | None:
    """Wilson interval of a score; None if the metric is not a proportion of utterances."""
    if results["members"][0]["interval_95"] is None:
        return None
    count = results["members"][0]["utterances"]
    return metrics.wilson_interval(round(score * count), count)


def _log(place: str) -> tuple[list[float], int]:
    """Seconds per update of the log lines without compilation, and maximum memory of an update in bytes."""
    lines = [json.loads(line) for line in (epath.Path(place) / "log.jsonl").read_text().splitlines()]
    first = next((n for n, line in enumerate(lines) if "valid/metric" in line), 0)
    seconds = [[line["step_s"] for line in some if "step_s" in line] for some in (lines[first:], lines[1:], lines)]
    return next(filter(None, seconds), []), max((line.get("step_bytes", 0) for line in lines), default=0)


def _pack_sizes(place: str) -> list[int]:
    packs = epath.Path(place) / "packs"
    found = packs.iterdir() if packs.exists() else ()
    return [sum(file.stat().length for file in pack.iterdir()) for pack in found]


def _cells(row: Json) -> list[str]:
    names = [cell(row["task"]), cell(row["method"])]
    if "absent" in row:
        return [*names, *["–"] * 5, row["absent"], *["–"] * 3]
    half, ends = row["half_width_95"], row["over_utterances"]
    costs, runs = ["–"] * 3, ["–"] * 2
    if "seeds" in row:
        seconds, memory = row["step_seconds"], row["step_bytes"]
        costs = [
            ("an LM: " if row["whole_lm"] else "") + _bytes(row["stored_bytes"]),
            "–" if seconds is None else f"{seconds:.3g}",
            "–" if memory is None else _bytes(memory),
        ]
        done, most = (" to ".join(map(str, sorted({min(n), max(n)}))) for n in (row["epochs"], row["most_epochs"]))
        runs = [", ".join(map(str, row["seeds"])), done if done == most else f"{done} of {most}"]
    return [
        *names,
        cell("; ".join(row["setting"])),
        "–" if row["trained"] is None else f"{row['trained']:,}",
        *costs,
        percent(row["test"]) + ("" if half is None else f" ± {percent(half)}"),
        "–" if ends is None else " to ".join(map(percent, ends)),
        *runs,
    ]


def _bytes(count: int) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _tasks(rows: Sequence[Json]) -> list[str]:
    """Lines with metric, number of test utterances and LM of each task with a score."""
    found = {row["task"]: row for row in reversed(rows) if "seeds" in row}
    return [
        f"- **{cell(task)}**: {METRICS[row['metric']]} on {row['number of test utterances']:,} test utterances; LM "
        f"`{row['LM'][:12]}`"
        for task, row in reversed(found.items())
    ]
