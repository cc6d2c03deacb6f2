"""Comparison of variants of a prompt job, each with a separate LM, on the same records and seeds."""

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

# Settings that variants may not override.
_COMMON = ("job", "task", "data", "lm", "synthesis", "baselines", "few_shot_seed", "train.seeds", "pretraining.data")
_RESERVED = ("speech", "kmeans")  # directories of the demo in the workdir


def check(config: ConfigDict) -> None:
    """Raise ValueError if a config or one of its variants is invalid; writes nothing."""
    names = list(config.variants)
    if len(names) < 2 or config.baseline not in names:
        raise ValueError(
            f"baseline is {config.baseline!r}, the variants are {', '.join(names) or 'none'}: give at least two "
            "variants, one of them the baseline"
        )
    for name in names:
        if not re.fullmatch(r"\w+", name) or name in _RESERVED:
            raise ValueError(
                f"variant {name!r} is not a valid directory name: use letters, digits and _, and none of {_RESERVED}"
            )
        variant_of(config, name, "")


def variant_of(config: ConfigDict, name: str, workdir: str) -> ConfigDict:
    """Config of a variant's prompt job: the config with the variant's overrides and its LM in WORKDIR/NAME/ulm.

    The n-gram baseline uses units only, so baselines are computed for the baseline variant only.

    Raises:
      ValueError: an override of a setting that does not exist, or an invalid value.
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
    except (AttributeError, ValueError) as error:  # AttributeError: a number where a group of settings is expected
        raise ValueError(f"variants.{name}: {error}") from error
    return one


def lm_place(workdir: str, name: str) -> str:
    """Directory of a variant's LM."""
    return os.path.join(workdir, name, "ulm", "lm")


def in_order(config: ConfigDict) -> list[str]:
    """Variant names: the baseline first, then by number of input streams and name."""

    def rank(name: str) -> tuple[bool, int, str]:
        prosody = _lm_config(variant_of(config, name, "")).prosody
        return name != config.baseline, prosody.duration_input + prosody.f0_input if prosody else -1, name

    return sorted(config.variants, key=rank)


def _lm_config(job: ConfigDict) -> UnitLMConfig:
    return UnitLMConfig(**job.pretraining.lm.to_dict())


def run_comparison(
    config: ConfigDict, workdir: str, import_units: ImportUnits | None, command: str
) -> dict[str, dict[str, Any]]:
    """Run the variants in WORKDIR/NAME, and write WORKDIR/summary.md and comparison.json.

    Finished variants are kept, and an interrupted one is resumed.

    Returns:
      The content of comparison.json.

    Raises:
      ValueError: as `check`; WORKDIR has another comparison; or a variant's directory is that of the records.
    """
    refuse_another(workdir, config, {})
    jobs = {name: variant_of(config, name, workdir) for name in in_order(config)}
    for name, job in jobs.items():
        directory = os.path.join(workdir, name)
        if places.absolute(directory) in map(places.absolute, (config.data, config.pretraining.data)):
            raise ValueError(
                f"variant {name!r} would be written to {directory}, the directory of the records: rename one of them"
            )
        refuse_another(directory, job, {})
        refuse_another(os.path.join(directory, "ulm"), job.pretraining, {})
    if jax.process_index() == 0:
        write_json(os.path.join(workdir, "config.json"), config.to_dict())
    for number, (name, job) in enumerate(jobs.items(), 1):
        directory = os.path.join(workdir, name)
        title = f"variant {number} of {len(jobs)}, {name}: {backbone(_lm_config(job))}"
        finished = prompting.finished(job, directory)
        agree({f"{directory} is finished": finished})
        if finished:
            say(f"{title}: finished")
            continue
        say(title)
        pretraining.make_absent_lm(job, import_units)
        prompting.run_prompt_tuning(job, directory, import_units, command)
    if jax.process_index() > 0:
        return {}
    found_at = {name: prompting.places(job, os.path.join(workdir, name)) for name, job in jobs.items()}
    reports = {name: {task: place.report for task, place in tasks.items()} for name, tasks in found_at.items()}
    found = compare.write_comparison(workdir, reports, config.baseline)
    say(f"comparison: {os.path.join(workdir, 'summary.md')}")
    return found
