"""From a config to a result: the stages of a job, each found done or done now."""

from __future__ import annotations

from ml_collections import ConfigDict

from spjax import paths
from spjax.jobs import comparing, pretraining, prompting
from spjax.jobs.inputs import ImportUnits
from spjax.jobs.workdirs import settings_of
from spjax.storage import places
from spjax.training import sharding
from spjax.training.agreement import agree

__all__ = ["ImportUnits", "check", "run"]

_CHECKS = {"prompt": prompting.check, "pretrain": pretraining.check, "compare": comparing.check}


def check(config: ConfigDict) -> None:
    """Find what is wrong with a config, before anything is made.

    Raises:
      ValueError: a setting makes no sense.
      OSError: a bucket that it names cannot be used.
    """
    if config.get("job") not in _CHECKS:
        raise ValueError(f"config.job is {config.get('job')!r}, must be prompt, pretrain or compare")
    _check_places(config)
    places.check_buckets(settings_of(config.to_dict()).values())
    _CHECKS[config.job](config)
    sharding.make_mesh(config.model_parallel, config.weight_shards)


def _check_places(config: ConfigDict) -> None:
    """Replace paths in a config by what `paths.given` makes of them."""
    for part, name in [(config, "data"), (config, "lm"), (config, "start_from"), (config.get("pretraining"), "data")]:
        value = part.get(name) if part else None
        if isinstance(value, str) and (value or name != "start_from"):
            try:
                part[name] = paths.given(value)
            except ValueError as error:
                raise ValueError(f"--config.{'' if part is config else 'pretraining.'}{name}: {error}") from error


@places.plainly()
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
    else:
        comparing.run_comparison(config, workdir, import_units, command)
