"""Baselines of a prompt job: an n-gram model of the units and a linear probe of the frozen LM."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence

import jax
from tqdm import tqdm

from spjax import process
from spjax.config import PromptJob
from spjax.jobs.task_data import LM, TaskData, placed
from spjax.jobs.workdirs import there, write_json
from spjax.tasks import BASELINES
from spjax.training import pooling, train
from spjax.types import Json


def baselines_path(data: TaskData) -> str:
    """JSON file of a task's baselines."""
    return os.path.join(data.place.report, "baselines.json")


def make_baselines(job: PromptJob, lm: LM, tasks: Sequence[TaskData]) -> None:
    """Fit absent baselines of all tasks, in parallel on process 0."""
    missing = [data for data in tasks if not there(baselines_path(data))]
    if not missing:
        return
    cores = os.cpu_count() or 1
    # Worker processes are not worth starting for one task, which is usually small.
    parallel = len(missing) > 1 and jax.process_index() == 0
    with process.worker_pool(min(2 * len(missing), cores)) if parallel else contextlib.nullcontext() as pool:
        begin = (lambda fit: pool.submit(fit).result) if pool else (lambda fit: fit)
        fits = [(data, kind, begin(fit)) for data, kind, fit in _baseline_fits(job, lm, missing)]
        if jax.process_index() > 0:
            return
        found: dict[str, Json] = {baselines_path(data): {} for data in missing}
        for data, kind, result in tqdm(fits, desc="baselines", unit="fit", disable=not parallel, leave=False):
            found[baselines_path(data)][kind] = result()
    for path, baselines in found.items():
        write_json(path, {kind: baselines[kind] for kind in BASELINES})


def _baseline_fits(
    job: PromptJob, lm: LM, tasks: Sequence[TaskData]
) -> Iterator[tuple[TaskData, str, Callable[[], Json]]]:
    """Yield (task, kind, fit function) of every baseline; n-gram first, since the probe needs hidden states."""
    from spjax.evaluation.ngram import ngram_baseline
    from spjax.evaluation.probe import probe_baseline

    splits = [
        {
            "train": (data.task_run.train_set, data.task_run.train_ids),
            "valid": (data.task_run.valid_set, data.task_run.valid_ids),
            "test": (data.test_set, data.test_ids),
        }
        for data in tasks
    ]
    for data, parts in zip(tasks, splits, strict=True):
        units = [some.take(ids) for some, ids in parts.values()]
        yield data, "ngram", functools.partial(ngram_baseline, data.card.task, *units, progress=False)
    mesh, weights = placed(job, lm)
    for data, parts in zip(tasks, splits, strict=True):
        states, classes = {}, {}
        for split, (some, ids) in parts.items():
            plan = train.evaluation_plan(data.task_run, job.train, some, ids, mesh)
            states[split] = pooling.pooled_states(weights, lm.config, some, plan, mesh, job.compute)[:, ids]
            classes[split] = some.classes[ids]
        yield data, "probe", functools.partial(probe_baseline, data.card.task, states, classes)
