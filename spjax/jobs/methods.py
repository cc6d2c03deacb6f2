"""Comparison of methods: a prompt job for each method, task and seed, and one table of the results."""

from __future__ import annotations

import os
import re

import jax
from ml_collections import ConfigDict

from spjax.evaluation import method_table
from spjax.jobs import pretraining, prompting
from spjax.jobs.inputs import ImportUnits, check_places, import_absent
from spjax.jobs.workdirs import override, read_json, refuse_another, say, write_json
from spjax.storage import unit_lms
from spjax.training.agreement import agree

RESULTS = "results.json"


def check(config: ConfigDict) -> None:
    """Raise ValueError if a config or one of its runs is invalid; writes nothing."""
    for chosen, there_are in (("task", "tasks"), ("method", "methods")):
        names = config[chosen].split(",")
        unknown = [name for name in names if name not in config[there_are]]
        if unknown or len(set(names)) < len(names):
            raise ValueError(
                f"{chosen} is {config[chosen]!r}, must be one or more of {', '.join(config[there_are])}, each once, "
                "with commas and no spaces"
            )
        for name in config[there_are]:
            if not re.fullmatch(r"\w+", name):
                raise ValueError(f"{there_are}.{name} is not a valid directory name: use letters, digits and _")
    for task in config.task.split(","):
        for method in config.method.split(","):
            run_of(config, task, method, config.train.seeds[0])


def run_of(config: ConfigDict, task: str, method: str, seed: int) -> ConfigDict:
    """Config of a run's prompt job: the config with the settings of the task, then of the method, and one seed.

    Raises:
      ValueError: a setting does not exist or is invalid.
    """
    one = ConfigDict(config.to_dict())
    del one.tasks, one.methods, one.method
    one.job, one.task = "prompt", task
    one.lock()
    for part, name in (("tasks", task), ("methods", method)):
        try:
            override(one, config[part][name].to_dict())
        except ValueError as error:
            raise ValueError(f"{part}.{name}: {error}") from error
    one.train.seeds = (seed,)
    try:
        check_places(one)
        prompting.check(one)
        pretraining.check(one.pretraining)
    except ValueError as error:
        raise ValueError(f"{method} on {task}: {error}") from error
    return one


def run_methods(config: ConfigDict, workdir: str, import_units: ImportUnits | None, command: str) -> None:
    """Run the chosen methods on the chosen tasks, and write WORKDIR/summary.md and methods.json.

    The run of a seed is in WORKDIR/TASK/METHOD/seed_SEED. Finished runs are kept and interrupted ones resumed. The
    table has all runs found there, including those of earlier calls with other tasks, methods or seeds. Tasks without
    records or LM are listed as missing. The first run of a task computes its baselines.

    Raises:
      ValueError: as `check`; WORKDIR has another job; or runs of a task have different LMs or test sets.
      FileNotFoundError: none of the chosen tasks can be run.
    """
    refuse_another(workdir, ConfigDict({"job": config.job}), {})
    if jax.process_index() == 0:
        write_json(os.path.join(workdir, "config.json"), config.to_dict())
    missing: dict[str, str] = {}
    for task in config.task.split(","):
        missing[task] = _missing(run_of(config, task, config.method.split(",")[0], config.train.seeds[0]), import_units)
        _write(config, workdir, missing)
        if missing[task]:
            continue
        for method in config.method.split(","):
            for seed in config.train.seeds:
                _run(config, workdir, (task, method, seed), import_units, command)
                _write(config, workdir, missing)
    table = os.path.join(workdir, "summary.md")
    if all(missing.values()):
        raise FileNotFoundError(
            f"nothing was run: {config.task} all lack units or an LM (see {table}); docs/adapters.md describes where "
            "they are expected"
        )
    say(f"table: {table}")


def _run(
    config: ConfigDict, workdir: str, which: tuple[str, str, int], import_units: ImportUnits | None, command: str
) -> None:
    task, method, seed = which
    job, place = run_of(config, *which), _place(workdir, *which)
    others = [run for runs in _runs(config, workdir, task).values() for run in runs if run != place]
    job.baselines &= not any(read_json(os.path.join(run, RESULTS))["baselines"] for run in others)
    done = prompting.finished(job, place)
    agree({f"{place} is finished": done})
    say(f"{task}, {method}, seed {seed}" + (": finished" if done else ""))
    if not done:
        prompting.run_prompt_tuning(job, place, import_units, command)


def _missing(job: ConfigDict, import_units: ImportUnits | None) -> str:
    """What a task lacks, or '' if it can be run. Imports absent records and pretrains an absent LM if possible."""
    lacks = "unit records"
    try:
        import_absent(job.data, job.task, import_units)
        lacks = "unit LM"
        pretraining.make_absent_lm(job, import_units)
    except FileNotFoundError as error:
        say(f"{job.task} is skipped: {str(error).splitlines()[0]}")  # the other lines apply to jobs of one task
        return lacks
    prompting.check_lengths(job, unit_lms.read_unit_lm(job.lm)[0], import_units)
    return ""


def _place(workdir: str, task: str, method: str, seed: int) -> str:
    return os.path.join(workdir, task, method, f"seed_{seed}")


def _runs(config: ConfigDict, workdir: str, task: str) -> dict[str, list[str]]:
    """Directories of the finished runs of a task, by method."""
    return {method: method_table.finished_runs(os.path.join(workdir, task, method)) for method in config.methods}


def _write(config: ConfigDict, workdir: str, missing: dict[str, str]) -> None:
    if jax.process_index() == 0:
        runs = {task: _runs(config, workdir, task) for task in config.tasks}
        method_table.write(workdir, runs, missing)
