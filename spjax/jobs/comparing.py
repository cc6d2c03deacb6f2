"""Comparison of variants of a prompt job, each with a separate LM, on the same records and seeds."""

from __future__ import annotations

import dataclasses
import os

import jax

from spjax.config import CompareJob, PromptJob, to_dict
from spjax.evaluation import compare
from spjax.io import places
from spjax.jobs import pretraining, prompting, task_data
from spjax.jobs.inputs import ImportUnits, backbone
from spjax.jobs.workdirs import refuse_another, say, write_json
from spjax.training.multihost_check import agree
from spjax.types import Json


def variant_of(job: CompareJob, name: str, workdir: str) -> PromptJob:
    """Settings of a variant's prompt job, whose LM is in WORKDIR/NAME/ulm.

    The n-gram baseline uses units only, so baselines are computed for the baseline variant only.
    """
    variant, common = job.variants[name], job.common
    return dataclasses.replace(
        variant,
        data=common.data,
        lm=lm_place(workdir, name),
        baselines=common.baselines and name == job.baseline,
        pretraining=dataclasses.replace(variant.pretraining, data=common.pretraining.data),
    )


def lm_place(workdir: str, name: str) -> str:
    """Directory of a variant's LM."""
    return os.path.join(workdir, name, "ulm", "lm")


def in_order(job: CompareJob) -> list[str]:
    """Variant names: the baseline first, then by number of input streams and name."""

    def rank(name: str) -> tuple[bool, int, str]:
        prosody = job.variants[name].pretraining.lm.prosody
        return name != job.baseline, prosody.duration_input + prosody.f0_input if prosody else -1, name

    return sorted(job.variants, key=rank)


def run_comparison(job: CompareJob, workdir: str, import_units: ImportUnits | None, command: str) -> dict[str, Json]:
    """Run the variants in WORKDIR/NAME, and write WORKDIR/summary.md and comparison.json.

    Finished variants are kept, and an interrupted one is resumed.

    Returns:
      The content of comparison.json.

    Raises:
      ValueError: WORKDIR has another comparison; or a variant's directory is that of the records.
    """
    refuse_another(workdir, to_dict(job), {})
    jobs = {name: variant_of(job, name, workdir) for name in in_order(job)}
    for name, one in jobs.items():
        directory = os.path.join(workdir, name)
        if places.absolute(directory) in map(places.absolute, (one.data, one.pretraining.data)):
            raise ValueError(
                f"variant {name!r} would be written to {directory}, the directory of the records: rename one of them"
            )
        refuse_another(directory, to_dict(one), {})
        refuse_another(os.path.join(directory, "ulm"), to_dict(one.pretraining), {})
    if jax.process_index() == 0:
        write_json(os.path.join(workdir, "config.json"), to_dict(job))
    for number, (name, one) in enumerate(jobs.items(), 1):
        directory = os.path.join(workdir, name)
        title = f"variant {number} of {len(jobs)}, {name}: {backbone(one.pretraining.lm)}"
        finished = prompting.finished(one, directory)
        agree({f"{directory} is finished": finished})
        if finished:
            say(f"{title}: finished")
            continue
        say(title)
        pretraining.make_absent_lm(one, import_units)
        prompting.run_prompt_tuning(one, directory, import_units, command)
    if jax.process_index() > 0:
        return {}
    found_at = {name: task_data.places(one, os.path.join(workdir, name)) for name, one in jobs.items()}
    reports = {name: {task: place.report for task, place in tasks.items()} for name, tasks in found_at.items()}
    found = compare.write_comparison(workdir, reports, job.baseline)
    say(f"comparison: {os.path.join(workdir, 'summary.md')}")
    return found
