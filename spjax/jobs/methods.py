"""Comparison of methods: a prompt job for each method, task and seed, and one table of the results."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from spjax.config import MethodsJob, PromptJob, flat, to_dict
from spjax.evaluation import method_table
from spjax.io import unit_lms
from spjax.jobs import pretraining, prompting, task_data
from spjax.jobs.inputs import ImportUnits, import_absent
from spjax.jobs.workdirs import read_json, refuse_another, say, write_json
from spjax.training.multihost_check import agree

RESULTS = "results.json"


def chosen(job: MethodsJob) -> list[PromptJob]:
    """Settings of the runs that are chosen now, each with all seeds."""
    return [job.runs[task][method] for task in job.task.split(",") for method in job.method.split(",")]


def run_of(job: MethodsJob, task: str, method: str, seed: int) -> PromptJob:
    """Settings of a run's prompt job."""
    one = job.runs[task][method]
    return dataclasses.replace(one, train=dataclasses.replace(one.train, seeds=(seed,)))


def refuse_overrides_without_effect(config: ConfigDict, overrides: Iterable[str]) -> None:
    """Refuse settings of the command line that change no chosen run.

    Common settings are replaced by those of a task, and both by those of a method.

    Args:
      config: of a methods job, with the overrides.
      overrides: names of settings that the command line gives by `--config.NAME`.

    Raises:
      ValueError: a setting without effect; the message names the flag that has one.
    """
    layers = {part: {name: flat(one.to_dict()) for name, one in config[part].items()} for part in ("tasks", "methods")}
    chosen = {"tasks": config.task.split(","), "methods": config.method.split(",")}
    for name in overrides:
        part, _, rest = name.partition(".")
        one, _, setting = rest.partition(".") if part in layers else ("", "", name)
        if one and one not in chosen[part]:
            listed = ",".join([*chosen[part], one])
            raise ValueError(f"--config.{name} has no effect: choose {one} too by --config.{part[:-1]}={listed}")
        for above in {"tasks": ("methods",), "methods": ()}.get(part, ("methods", "tasks")):
            if all(_sets(layers[above][each], setting) for each in chosen[above]):
                named = [
                    f"--config.{above}.{each}.{setting}" for each in chosen[above] if setting in layers[above][each]
                ]
                fix = f"give {' and '.join(named)}" if named else "leave it out"
                raise ValueError(
                    f"--config.{name} has no effect, as all chosen {above} have their own {setting}: {fix}"
                )


def _sets(layer: Mapping[str, Any], setting: str) -> bool:
    """Whether settings of a task or method replace one; the published settings (`reference`) replace whole groups."""
    return setting in layer or (layer.get("reference", False) and setting.split(".")[0] in ("prompt", "loss", "optim"))


def run_methods(job: MethodsJob, workdir: str, import_units: ImportUnits | None, command: str) -> None:
    """Run the chosen methods on the chosen tasks, and write WORKDIR/summary.md and methods.json.

    The run of a seed is in WORKDIR/TASK/METHOD/seed_SEED. Finished runs are kept and interrupted ones resumed. The
    table has all runs found there, including those of earlier calls with other tasks, methods or seeds. Tasks without
    records or LM are listed as missing. The first run of a task computes its baselines.

    Raises:
      ValueError: WORKDIR has another job; or runs of a task have different LMs or test sets.
      FileNotFoundError: none of the chosen tasks can be run.
    """
    refuse_another(workdir, {"job": "methods"}, {})
    if jax.process_index() == 0:
        write_json(os.path.join(workdir, "config.json"), to_dict(job))
    missing: dict[str, str] = {}
    for task in job.task.split(","):
        missing[task] = _missing(run_of(job, task, job.method.split(",")[0], job.seeds[0]), import_units)
        _write(job, workdir, missing)
        if missing[task]:
            continue
        for method in job.method.split(","):
            for seed in job.seeds:
                _run(job, workdir, (task, method, seed), import_units, command)
                _write(job, workdir, missing)
    table = os.path.join(workdir, "summary.md")
    if all(missing.values()):
        raise FileNotFoundError(
            f"nothing was run: {job.task} all lack units or an LM (see {table}); docs/adapters.md describes where "
            "they are expected"
        )
    say(f"table: {table}")


def _run(
    job: MethodsJob, workdir: str, which: tuple[str, str, int], import_units: ImportUnits | None, command: str
) -> None:
    task, method, seed = which
    one, place = run_of(job, *which), _place(workdir, *which)
    others = [run for runs in _runs(job, workdir, task).values() for run in runs if run != place]
    known = any(read_json(os.path.join(run, RESULTS))["baselines"] for run in others)
    one = dataclasses.replace(one, baselines=one.baselines and not known)
    done = prompting.finished(one, place)
    agree({f"{place} is finished": done})
    say(f"{task}, {method}, seed {seed}" + (": finished" if done else ""))
    if not done:
        prompting.run_prompt_tuning(one, place, import_units, command)


def _missing(job: PromptJob, import_units: ImportUnits | None) -> str:
    """What a task lacks, or '' if it can be run. Imports absent records and pretrains an absent LM if possible."""
    lacks = "unit records"
    try:
        import_absent(job.data, job.task, import_units)
        lacks = "unit LM"
        pretraining.make_absent_lm(job, import_units)
    except FileNotFoundError as error:
        say(f"{job.task} is skipped: {str(error).splitlines()[0]}")  # the other lines apply to jobs of one task
        return lacks
    task_data.check_lengths(job, unit_lms.read_unit_lm(job.lm)[0], import_units)
    return ""


def _place(workdir: str, task: str, method: str, seed: int) -> str:
    return os.path.join(workdir, task, method, f"seed_{seed}")


def _runs(job: MethodsJob, workdir: str, task: str) -> dict[str, list[str]]:
    """Directories of the finished runs of a task, by method."""
    return {method: method_table.finished_runs(os.path.join(workdir, task, method)) for method in job.methods}


def _write(job: MethodsJob, workdir: str, missing: dict[str, str]) -> None:
    if jax.process_index() == 0:
        runs = {task: _runs(job, workdir, task) for task in job.tasks}
        method_table.write(workdir, runs, missing)
