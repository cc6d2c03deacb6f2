"""Pretraining job: train a unit LM or multi-stream LM on the unit records of some tasks."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import numpy as np

from spjax import vocab
from spjax.config import PretrainJob, PromptJob, to_dict
from spjax.data.records import CARD
from spjax.data.unit_set import UnitSet
from spjax.encoders import prosody
from spjax.io import assets, places, unit_lms
from spjax.io.packs import check_units
from spjax.jobs import task_data
from spjax.jobs.inputs import ImportUnits, backbone, made_by, read_split
from spjax.jobs.workdirs import claim, refuse_another, say, whole
from spjax.training import pretrain, sharding
from spjax.training.multihost_check import agree

_log = logging.getLogger(__name__)


def check_devices(job: PretrainJob) -> None:
    """Raise ValueError if a job cannot be divided among the devices."""
    mesh = sharding.make_mesh(job.model_parallel, job.weight_shards)
    sharding.check_lm(mesh, job.lm)
    if job.pretrain.row_length > (job.lm.max_positions or job.pretrain.row_length):
        raise ValueError(
            f"pretrain: row_length={job.pretrain.row_length} is over lm.max_positions={job.lm.max_positions}: increase "
            "the latter"
        )
    pretrain.check_rows(job.pretrain, mesh)


def run_pretraining(job: PretrainJob, workdir: str, import_units: ImportUnits | None, *, part: str = "") -> str:
    """Pretrain an LM and write it to WORKDIR/lm.

    With `job.lm.prosody` it is a multi-stream LM. For a discrete one without f0_edges, they are the quantiles of
    `job.pretrain.f0_bins` bins of the train sets' f0.

    Args:
      job: settings.
      workdir: may be absent.
      import_units: see `inputs.read_split`.
      part: prefix of settings in messages, "pretraining." if `job` is that part of another job.

    Returns:
      Directory of the LM.

    Raises:
      ValueError: the records do not fit the LM or each other, or WORKDIR has another run.
    """
    out = os.path.join(workdir, "lm")
    flag = "--config.lm" if part else "--workdir"
    refuse_another(workdir, to_dict(job), {}, flag)
    finished = whole(out, unit_lms.CONFIG_FILE)
    agree({f"{out} is there": finished})
    if finished:
        _log.info("%s already exists", out)
        return out
    trains: list[UnitSet] = []
    valids: dict[str, UnitSet] = {}
    inputs: dict[str, Any] = {}
    lm_config = job.lm
    made: dict[str, Any] = {}  # of the first task
    for task in job.tasks:
        directory = os.path.join(job.data, task)
        units, card = read_split(directory, task, "train", lm_config, import_units)
        trains.append(units)
        valids[task] = read_split(directory, task, "valid", lm_config, import_units)[0]
        inputs[task] = {"train_sha256": [shard.sha256 for shard in card.shards["train"]]}
        made = made or made_by(card)
        fix = "Pretrain on tasks with the same units."
        check_units(f"task {job.tasks[0]}", made, directory, made_by(card), fix)
        if card.vocabulary != lm_config.num_units:
            raise ValueError(
                f"{directory} has {card.vocabulary} units, but an LM of {part}lm.vocab_size={lm_config.vocab_size} "
                f"has {lm_config.num_units}: give --config.{part}lm.vocab_size={card.vocabulary + vocab.UNIT_OFFSET}"
            )
    sources = dict(inputs)
    if lm_config.prosody and lm_config.prosody.discrete and not lm_config.prosody.f0_edges:
        edges = prosody.f0_edges(np.concatenate([units.f0 for units in trains]), job.pretrain.f0_bins)
        lm_config = dataclasses.replace(lm_config, prosody=dataclasses.replace(lm_config.prosody, f0_edges=edges))
        inputs["f0_edges"] = list(edges)
    claim(workdir, to_dict(job), inputs, flag)
    _log.info("%s of %s parameters", backbone(lm_config), f"{lm_config.num_params:,}")
    params, history = pretrain.pretrain(
        lm_config,
        job.pretrain,
        job.optim,
        job.compute,
        train=trains,
        valid=valids,
        workdir=workdir,
        model_parallel=job.model_parallel,
        weight_shards=job.weight_shards,
    )
    provenance = {"source": "spjax pretraining", "config": to_dict(job), "data": sources, "units": made}
    provenance["valid"] = history[-1]
    sharding.on_process_zero("the unit LM", lambda: unit_lms.save_unit_lm(out, lm_config, params, provenance))
    say(f"{'multi-stream' if lm_config.prosody else 'unit'} LM: {out}; valid {_losses(history[-1], job.tasks)}")
    return out


def _losses(last: dict[str, Any], tasks: tuple[str, ...]) -> str:
    """Format the valid losses of the last epoch by stream and task."""
    streams = ("perplexity", "duration_loss", "f0_loss")
    found = {s: [f"{task} {last[f'{task}/{s}']:.3f}" for task in tasks if f"{task}/{s}" in last] for s in streams}
    return "; ".join(f"{stream.replace('_', ' ')} {', '.join(values)}" for stream, values in found.items() if values)


def make_absent_lm(job: PromptJob, import_units: ImportUnits | None) -> None:
    """Pretrain the LM of a prompt job if it is absent and `job.lm` ends in /lm.

    Raises:
      FileNotFoundError: the LM is absent and `job.lm` does not end in /lm, or there are no records to train it on.
      ValueError: as `run_pretraining` and `task_data.check_lengths`; or an existing LM has other streams than
        `job.pretraining`.
    """
    exists = whole(assets.find(job.lm, "lm"), unit_lms.CONFIG_FILE)
    agree({f"{job.lm} is there": exists})
    if exists:
        _check_streams(job)
        return
    workdir, leaf = os.path.split(job.lm.rstrip("/"))
    units = [os.path.join(job.pretraining.data, task) for task in job.pretraining.tasks]
    if leaf != "lm" or (import_units is None and not all(whole(place, CARD) for place in units)):
        raise FileNotFoundError(
            f"no unit LM at {job.lm}: give --config.lm=DIR of one, or tiny, which is part of spjax; convert one "
            f"with python -m spjax.convert unit_lm; or let this job pretrain one, which needs the records "
            f"{', '.join(units)} (or --units=UNIT_TEXT to import them from) and a --config.lm that ends in /lm"
        )
    check_devices(job.pretraining)
    task_data.check_lengths(job, job.pretraining.lm, import_units)
    say(f"no unit LM at {job.lm}: pretraining one first (config.pretraining)")
    places.at(workdir).mkdir(parents=True, exist_ok=True)
    run_pretraining(job.pretraining, workdir, import_units, part="pretraining.")


def _check_streams(job: PromptJob) -> None:
    """Raise ValueError if an existing LM has other streams than the settings."""
    if job.pretraining.lm.prosody is None:
        return
    wanted, found = job.pretraining.lm, unit_lms.read_unit_lm(job.lm)[0]
    if backbone(wanted) != backbone(found):
        raise ValueError(
            f"{job.lm} is a {backbone(found)}, but config.pretraining.lm.prosody describes a {backbone(wanted)}: "
            "give another --config.lm, which is pretrained if absent, or set pretraining.lm.prosody to match"
        )
