"""Jobs: run a config to its result, skipping finished stages."""

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
    """Validate a config; writes nothing.

    Raises:
      ValueError: a setting is invalid.
      OSError: a bucket in a path cannot be used.
    """
    if config.get("job") not in _CHECKS:
        raise ValueError(f"config.job is {config.get('job')!r}, must be prompt, pretrain, compare or methods")
    check_places(config)
    places.check_buckets(settings_of(config.to_dict()).values())
    _CHECKS[config.job](config)
    sharding.make_mesh(config.model_parallel, config.weight_shards)


@places.translate_bucket_errors()
def run(config: ConfigDict, workdir: str, import_units: ImportUnits | None, command: str) -> None:
    """Run the job `config.job` in `workdir`.

    Args:
      config: config from a file of configs/.
      workdir: local or gs://; a run found there is resumed.
      import_units: function that makes absent unit records; None: absent records are an error.
      command: command that reproduces the run, for the report.

    Raises:
      ValueError, OSError: the config, the data or the workdir is invalid.
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
