"""Variants of one prompt job beside each other, each with an LM of its own, on the same records and seeds."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import jax
from ml_collections import ConfigDict

from spjax.evaluation import compare
from spjax.jobs import pretraining, prompting
from spjax.jobs.inputs import ImportUnits, backbone
from spjax.jobs.workdirs import override, refuse_another, say, settings_of, write_json
from spjax.models.config import ProsodyConfig, UnitLMConfig
from spjax.storage import places
from spjax.training.agreement import agree

# What variants must have in common to be compared, or what a comparison settles itself.
_COMMON = ("job", "task", "data", "lm", "synthesis", "baselines", "few_shot_seed", "train.seeds", "pretraining.data")
_TAKEN = ("speech", "kmeans")  # directories of the demo's speech


def check(config: ConfigDict) -> None:
    """Raise ValueError for what is wrong with a config or one of its variants, before anything is made."""
    names = list(config.variants)
    if len(names) < 2 or config.baseline not in names:
        raise ValueError(
            f"baseline is {config.baseline!r}, the variants are {', '.join(names) or 'none'}: give two variants or "
            "more, one of them the baseline"
        )
    for name in names:
        if not re.fullmatch(r"\w+", name) or name in _TAKEN:
            raise ValueError(f"variant {name!r} cannot be its directory's name: use letters, digits, _, not {_TAKEN}")
        variant_of(config, name, "")


def variant_of(config: ConfigDict, name: str, workdir: str) -> ConfigDict:
    """The prompt job of a variant: the config with the variant's overrides, its LM in WORKDIR/NAME/ulm.

    The n-gram baseline goes by units alone: it stands in the report of the variant that others are compared with.

    Raises:
      ValueError: an override of what the config does not have, or a setting that makes no sense.
    """
    one = ConfigDict(config.to_dict())
    del one.variants, one.baseline
    one.job, one.lm = "prompt", lm_place(workdir, name)
    one.baselines = config.baselines and name == config.baseline
    try:
        overrides = config.variants[name].to_dict()
        dotted = settings_of(overrides)
        if common := [key for key in dotted if any(key == c or key.startswith(f"{c}.") for c in _COMMON)]:
            raise ValueError(f"{', '.join(common)} must be the same for all variants")
        if "prosody" in overrides.get("pretraining", {}).get("lm", {}) and "prosody" not in one.pretraining.lm:
            one.pretraining.lm.prosody = ConfigDict(dataclasses.asdict(ProsodyConfig()))
        one.lock()
        override(one, overrides)
        prompting.check(one)
        pretraining.check(one.pretraining)
    except (AttributeError, ValueError) as error:  # the first: a number where settings belong
        raise ValueError(f"variants.{name}: {error}") from error
    return one


def lm_place(workdir: str, name: str) -> str:
    """Directory of the LM of a variant."""
    return os.path.join(workdir, name, "ulm", "lm")


def in_order(config: ConfigDict) -> list[str]:
    """The variants: the baseline, then those that are told more and more streams."""

    def rank(name: str) -> tuple[bool, int, str]:
        prosody = _lm_config(variant_of(config, name, "")).prosody
        return name != config.baseline, prosody.duration_input + prosody.f0_input if prosody else -1, name

    return sorted(config.variants, key=rank)


def _lm_config(job: ConfigDict) -> UnitLMConfig:
    return UnitLMConfig(**job.pretraining.lm.to_dict())


def run_comparison(
    config: ConfigDict, workdir: str, import_units: ImportUnits | None, command: str
) -> dict[str, dict[str, Any]]:
    """Run the variants one after another, each in WORKDIR/NAME, and write WORKDIR/summary.md and comparison.json.

    What is finished is kept, a variant that was stopped goes on.

    Returns:
      The content of comparison.json.

    Raises:
      ValueError: as `check`; WORKDIR holds another comparison; or a variant's directory is that of the records.
    """
    refuse_another(workdir, config, {})
    jobs = {name: variant_of(config, name, workdir) for name in in_order(config)}
    for name, job in jobs.items():
        own = os.path.join(workdir, name)
        if places.absolute(own) in map(places.absolute, (config.data, config.pretraining.data)):
            raise ValueError(
                f"variant {name!r} would be written to {own}, where the records are: call either otherwise"
            )
        refuse_another(own, job, {})
        refuse_another(os.path.join(own, "ulm"), job.pretraining, {})
    if jax.process_index() == 0:
        write_json(os.path.join(workdir, "config.json"), config.to_dict())
    for number, (name, job) in enumerate(jobs.items(), 1):
        own = os.path.join(workdir, name)
        told = f"variant {number} of {len(jobs)}, {name}: {backbone(_lm_config(job))}"
        finished = prompting.finished(job, own)
        agree({f"{own} is finished": finished})
        if finished:
            say(f"{told}: finished")
            continue
        say(told)
        pretraining.make_absent_lm(job, import_units)
        prompting.run_prompt_tuning(job, own, import_units, command)
    if jax.process_index() > 0:
        return {}
    found_at = {name: prompting.places(job, os.path.join(workdir, name)) for name, job in jobs.items()}
    reports = {name: {task: place.report for task, place in tasks.items()} for name, tasks in found_at.items()}
    found = compare.write_comparison(workdir, reports, config.baseline)
    say(f"comparison: {os.path.join(workdir, 'summary.md')}")
    return found
