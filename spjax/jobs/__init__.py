"""From a config to a result: the stages of a job, each found done or done now."""

from __future__ import annotations

from ml_collections import ConfigDict

from spjax.jobs import comparing, methods, pretraining, prompting
from spjax.jobs.inputs import ImportUnits, check_places
from spjax.jobs.workdirs import settings_of
from spjax.storage import places
from spjax.training import sharding
from spjax.training.agreement import agree

__all__ = ["ImportUnits", "check", "run"]

_CHECKS = {
    "prompt": prompting.check,
    "pretrain": pretraining.check,
    "compare": comparing.check,
    "methods": methods.check,
}


def check(config: ConfigDict) -> None:
    """Find what is wrong with a config, before anything is made.

    Raises:
      ValueError: a setting makes no sense.
      OSError: a bucket that it names cannot be used.
    """
    if config.get("job") not in _CHECKS:
        raise ValueError(f"config.job is {config.get('job')!r}, must be prompt, pretrain, compare or methods")
    check_places(config)
    places.check_buckets(settings_of(config.to_dict()).values())
    _CHECKS[config.job](config)
    sharding.make_mesh(config.model_parallel, config.weight_shards)


@places.translate_bucket_errors()
def run(config: ConfigDict, workdir: str, import_units: ImportUnits | None, command: str) -> None:
    """Do what `config.job` says, in `workdir`.

    Args:
      config: a file of configs/ made it.
      workdir: here or on gs://; a run found there is continued.
      import_units: how unit records that are absent are made; None: they are not.
      command: what reproduces the run, for the report.

    Raises:
      ValueError, OSError: something is wrong with the config, the data or the work directory.
      DivergedError, Interrupted: as `training.loop.fit`.
    """
    agree({**config.to_dict(), "workdir": workdir})
    check(config)
    places.check_buckets([workdir])
    if config.job == "prompt":
        pretraining.make_absent_lm(config, import_units)
    places.at(workdir).mkdir(parents=True, exist_ok=True)
    if config.job == "pretrain":
        pretraining.run_pretraining(config, workdir, import_units)
    elif config.job == "prompt":
        prompting.run_prompt_tuning(config, workdir, import_units, command)
    elif config.job == "methods":
        methods.run_methods(config, workdir, import_units, command)
    else:
        comparing.run_comparison(config, workdir, import_units, command)
