"""Prompt job: train prompts or adapters on unit records with a frozen LM, evaluate them, write reports and packs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterable, Sequence

import jax

from spjax.config import PromptJob, to_dict
from spjax.data import plan as planning
from spjax.data.records import CARD, Card, load_card
from spjax.evaluation import report
from spjax.io import assets, unit_lms
from spjax.jobs import sweeping
from spjax.jobs.baselines import make_baselines
from spjax.jobs.inputs import ImportUnits
from spjax.jobs.task_data import LM, load_task, placed, places, read_lm
from spjax.jobs.task_report import kept_seeds, pack_place, report_task
from spjax.jobs.workdirs import claim, refuse_another, say, there
from spjax.models import prompts
from spjax.models.prompts import REAL_STARTS
from spjax.training import loop, masks, sharding, starts, train
from spjax.training.setting import first_params
from spjax.types import Json, Params


def check_devices(job: PromptJob) -> None:
    """Raise ValueError if a job cannot be divided among the devices."""
    mesh = sharding.make_mesh(job.model_parallel, job.weight_shards)
    members = len(job.tasks) * len(job.sweep.tried) * len(job.train.seeds)
    shards, most = sharding.batch_shards(mesh), job.train.max_rows
    multiple = math.gcd(8, most)
    if all(rows * members % shards for rows in range(multiple, most + 1, multiple)):
        planning.check_rows(most, members, shards)


def inputs_of(lm_hash: str, cards: Iterable[Card]) -> Json:
    """Identity of the LM and the records, for the config.json of a prompt job."""
    shards = [shard.sha256 for card in cards for shard in itertools.chain(*card.shards.values())]
    return {"lm_hash": lm_hash, "units": shards}


def finished(job: PromptJob, workdir: str) -> bool:
    """Whether a job has all reports and packs.

    Raises:
      ValueError: they are from other records or another LM.
    """
    tasks = places(job, workdir).values()
    needed = [assets.find(job.lm, "lm"), os.path.join(workdir, "summary.md")]
    needed += [os.path.join(place.data, CARD) for place in tasks]
    needed += [os.path.join(place.report, "results.json") for place in tasks]
    if not all(map(there, needed)):
        return False
    lm, _, info = unit_lms.read_unit_lm(job.lm)
    if not all(there(pack_place(place, seed)) for place in tasks for seed in kept_seeds(job, lm)):
        return False
    cards = [load_card(place.data) for place in tasks]
    if not job.random_lm:
        refuse_another(workdir, to_dict(job), inputs_of(info["hash"], cards))
    return True


def run_prompt_tuning(job: PromptJob, workdir: str, import_units: ImportUnits | None, command: str) -> dict[str, Json]:
    """Train a bank of prompts, evaluate the best epochs on test, and write reports and packs.

    Reports of one task are written to WORKDIR; of several, which share a bank, to WORKDIR/TASK, with an overview in
    WORKDIR/summary.md.

    Returns:
      The content of every task's results.json.
    """
    run = job.train
    if job.reference:
        say("reference=True: prompt, loss, optim and train settings of the config are replaced by the published ones")
    lm = read_lm(job)
    where = places(job, workdir)
    names = list(where)
    pairs = [load_task(job, lm, name, place, import_units) for name, place in where.items()]
    tasks = [data for data, _ in pairs]
    kinds = {data.task_run.setting.verbalizer.kind for data in tasks}
    if len(kinds) > 1:
        raise ValueError(
            f"start_from={job.start_from} gives the tasks {' and '.join(kinds)} verbalizers: train them separately"
        )
    job = dataclasses.replace(job, verbalizer=kinds.pop())
    swept = [sweeping.task_runs_of(data.task_run, job.sweep, job.optim) for data in tasks]
    banks = _first_banks(job, lm, swept, [start for _, start in pairs])
    params = {"lm": lm.params, "prompt": prompts.join([bank["prompt"] for bank in banks])}
    counts = [_counts(bank, run) for bank in banks]
    trained = ", ".join(dict.fromkeys(f"{count['trained']:,}" for count in counts))
    frozen = counts[0]["frozen"]
    say(f"{trained} trained, {frozen:,} frozen parameters; seeds {', '.join(map(str, run.seeds))}")

    claim(workdir, to_dict(job), inputs_of(lm.hash, [data.card for data in tasks]))
    task_runs = list(itertools.chain(*swept))
    result = train.train(
        params, task_runs, run, job.optim, workdir=workdir,
        model_parallel=job.model_parallel, weight_shards=job.weight_shards,
    )  # fmt: skip
    if job.baselines:
        make_baselines(job, lm, tasks)
    found, diverged = {}, []
    for name, data, indices in zip(names, tasks, sweeping.index_ranges(swept), strict=True):
        chosen = sweeping.choose(task_runs, result, run, indices)
        if len(indices) > 1 and jax.process_index() == 0:
            line = sweeping.write_table(data.place.report, task_runs, result, run, indices, chosen, job.optim)
            say(f"{name}: {line}")
        members = slice(chosen * len(run.seeds), (chosen + 1) * len(run.seeds))
        lost = [seed for seed, best in zip(run.seeds, result.best_epoch[members], strict=True) if best < 0]
        if lost:
            diverged.append(f"{name} (seeds {', '.join(map(str, lost))})")
            continue
        params = train.task_run_params(result.params, task_runs, run, chosen)
        best = data._replace(task_run=task_runs[chosen])
        found[name] = report_task(
            job, lm, best, params, result, members, counts[chosen], len(indices), command
        )  # fmt: skip
    if jax.process_index() == 0 and len(names) > 1 and found:
        path = report.write_overview(workdir, list(found.values()))
        say(f"report: {path}")
    if diverged:
        raise loop.DivergedError(
            f"training diverged before the first evaluation, with every setting: {'; '.join(diverged)}. There is no "
            "report of these tasks. Lower the learning rate, increase the warm-up or leave these seeds out, and use "
            "another --workdir"
        )
    return found


def _first_banks(
    job: PromptJob, lm: LM, swept: Sequence[Sequence[train.TaskRun]], given: Sequence[Params | None]
) -> list[Params]:
    """Initial {"lm", "prompt"} of every task run, task by task; `given`: start prompt of each task, or None."""
    on_devices = functools.cache(lambda: placed(job, lm))
    banks = []
    for task_runs, start in zip(swept, given, strict=True):
        made: dict[tuple[str, int], list[Params]] = {}  # task runs of a sweep may share an init
        for task_run in task_runs:
            prompt = task_run.setting.prompt
            key = (prompt.init, prompt.length)
            if start is None and prompt.init in REAL_STARTS and prompt.length and key not in made:
                mesh, weights = on_devices()
                made[key] = starts.from_utterances(weights, task_run, job.train, mesh)
            banks.append(first_params(lm.params, task_run.setting, job.train.seeds, start, made.get(key)))
    return banks


def _counts(params: Params, run: train.TrainConfig) -> dict[str, int]:
    """Number of trained and frozen parameters of one member."""
    trained, frozen = masks.split(masks.flatten(params), run.trainable)
    size_of = lambda path, leaf: leaf.size // (len(run.seeds) if path.startswith("prompt/") else 1)  # noqa: E731
    return {
        "trained": int(sum(size_of(path, leaf) for path, leaf in trained.items())),
        "frozen": int(sum(size_of(path, leaf) for path, leaf in frozen.items())),
    }
