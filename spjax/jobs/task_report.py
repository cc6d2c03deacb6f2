"""Report and packs of a task of a prompt job."""

from __future__ import annotations

import os
import re

import jax
import numpy as np

from spjax.config import PromptJob, to_dict
from spjax.evaluation import outcome, report
from spjax.evaluation.published import published
from spjax.io import pack_card, packs
from spjax.jobs.baselines import baselines_path
from spjax.jobs.inputs import backbone
from spjax.jobs.task_data import LM, Place, TaskData
from spjax.jobs.workdirs import read_json, say
from spjax.models import decode
from spjax.models.config import UnitLMConfig
from spjax.models.prompts import member
from spjax.tasks import BASELINES, Task
from spjax.training import masks, sharding, train
from spjax.types import Json, Params


def pack_place(place: Place, seed: int) -> str:
    """Directory of the prompt pack of a seed."""
    return os.path.join(place.report, "packs", f"seed_{seed}")


def kept_seeds(job: PromptJob, lm: UnitLMConfig) -> tuple[int, ...]:
    """Seeds whose packs are saved: none if the LM is random or trained, since packs need the original LM."""
    trains_lm = any(re.fullmatch(job.train.trainable, f"lm/{path}") for path in lm.shapes)
    return () if job.random_lm or trains_lm else tuple(job.train.seeds)


def report_task(
    job: PromptJob,
    lm: LM,
    data: TaskData,
    params: Params,
    result: train.Trained,
    rows: slice,
    counts: dict[str, int],
    tried: int,
    command: str,
) -> Json:
    """Evaluate a task's members on test; write its report and packs.

    Args:
      job, lm: settings and LM.
      data: the task.
      params: {"lm", "prompt"} of its members.
      result: result of training.
      rows: range of its members in the bank.
      counts: number of parameters.
      tried: number of settings among which this one was chosen.
      command: that reproduces the job.

    Returns:
      The content of results.json; {} on processes other than 0.
    """
    task_run, task, test_ids = data.task_run, data.card.task, data.test_ids
    mesh = sharding.make_mesh(job.model_parallel, job.weight_shards)
    flat = sharding.place_frozen(mesh, masks.flatten(params), task_run.setting.compute.operand)
    evaluator = train.evaluator_for(task_run, job.train, data.test_set, test_ids, mesh)
    log_probs = evaluator.log_probs(flat)[:, test_ids]
    if jax.process_index() > 0:
        return {}
    several = len(job.train.seeds) > 1
    results = report.write_report(
        data.place.report, task=task, members=_members(data, job.train, result, rows, log_probs),
        baselines=read_json(baselines_path(data)) if job.baselines else None,
        ensemble=_predictions(data, _together(log_probs)) if several else None,
        parameters=counts, config=to_dict(job), setting=task_run.described(job.optim), tried=tried,
        provenance={
            "backbone": backbone(lm.config), "lm": job.lm, "lm_hash": lm.hash, "data": data.place.data,
            "notes": [*data.card.notes, *data.notes],
        },
        comparisons=published(task.name), command=command,
    )  # fmt: skip
    for n, seed in enumerate(kept_seeds(job, lm.config)):
        card = _pack_card(job, lm, data, results, n)
        packs.save_pack(pack_place(data.place, seed), member(params["prompt"], n), card)
    _print_headline(task, results, data.place.report)
    return results


def _members(
    data: TaskData, run: train.TrainConfig, result: train.Trained, rows: slice, log_probs: np.ndarray
) -> list[outcome.Member]:
    """Results of the members, which are `rows` of the bank; log probabilities [N, n, M] on test."""
    return [
        outcome.Member(
            seed=seed,
            best_epoch=result.best_epoch[row] + 1,
            best_valid=float(result.history[result.best_epoch[row]]["metric"][row]),
            curve=[
                outcome.CurvePoint(line["epoch"] + 1, line["train_loss"][row], line["metric"][row])
                for line in result.history
                if line["metric"][row] is not None  # None: it had stopped
            ],
            predictions=_predictions(data, log_probs[n]),
        )
        for n, (seed, row) in enumerate(zip(run.seeds, range(rows.start, rows.stop), strict=True))
    ]


def _predictions(data: TaskData, log_probs: np.ndarray) -> outcome.Predictions:
    """Predictions on test from log probabilities [n, M]."""
    tree, test_set, ids = data.task_run.setting.tree, data.test_set, data.test_ids
    return outcome.Predictions(
        ids=[test_set.ids[i] for i in ids],
        true=test_set.classes[ids],
        predicted=tree.combinations[log_probs.argmax(axis=1)],
        probabilities=decode.slot_probabilities(log_probs, tree, data.card.task.slot_offsets),
    )


def _pack_card(job: PromptJob, lm: LM, data: TaskData, results: Json, n: int) -> pack_card.PackCard:
    """Card of the pack of member `n`."""
    setting, card, ours = data.task_run.setting, data.card, results["members"][n]
    scored = {
        "valid": {"headline": ours["best_valid"]},
        "test": {**ours["metrics"], "interval_95": ours["interval_95"]},
        "baselines": {
            kind: {split: baseline[split] for split in ("valid", "test")}
            for kind, baseline in results["baselines"].items()
        },
    }
    labels = setting.verbalizer
    return pack_card.make_card(
        card.task, kind=labels.kind, codes=labels.codes, feeds=labels.fed_back, outputs=labels.outputs,
        config=lm.config, lm_hash=lm.hash, encoder=card.encoder, layer=card.layer, kmeans=card.kmeans,
        merged=card.merged, combinations=data.combinations, results=scored,
        provenance={"seed": ours["seed"], "reference": bool(job.reference)}, lora=setting.prompt.lora,
    )  # fmt: skip


def _together(log_probs: np.ndarray) -> np.ndarray:
    """Log probabilities [n, M] of the ensemble: mean over members [N, n, M], renormalised."""
    mean = log_probs.mean(axis=0, dtype=np.float64)
    normalised: np.ndarray = mean - np.logaddexp.reduce(mean, axis=1, keepdims=True)
    return normalised


def _print_headline(task: Task, results: Json, workdir: str) -> None:
    head = results["headline"]
    spread = "" if head["half_width_95"] is None else f" ± {100 * head['half_width_95']:.2f} (95 % over seeds)"
    say(
        f"{task.name}: test {task.metric}: {100 * head['mean']:.2f} %{spread}; seeds "
        + " ".join(f"{100 * v:.2f}" for v in head["values"])
    )
    for kind, baseline in results["baselines"].items():
        say(f"{task.name}: {BASELINES[kind]}: {100 * baseline['test']:.2f} %")
    say(f"{task.name}: report: {os.path.join(workdir, 'summary.md')}")
