"""Jobs: run parsed settings to their result, skipping finished stages."""

from __future__ import annotations

from spjax.config import Job, MethodsJob, PretrainJob, PromptJob, to_dict
from spjax.io import places
from spjax.jobs import comparing, methods, pretraining, prompting
from spjax.jobs.inputs import ImportUnits
from spjax.jobs.workdirs import settings_of
from spjax.training.multihost_check import agree

__all__ = ["ImportUnits", "run"]


@places.translate_bucket_errors()
def run(job: Job, workdir: str, import_units: ImportUnits | None, command: str) -> None:
    """Run a job in `workdir`.

    Args:
      job: its settings, from `config.parse`.
      workdir: local or gs://; a run found there is resumed.
      import_units: function that makes absent unit records; None: absent records are an error.
      command: command that reproduces the run, for the report.

    Raises:
      ValueError, OSError: the settings do not suit the data or the devices, or the workdir is invalid.
      DivergedError, Interrupted: as `training.loop.fit`.
    """
    settings = to_dict(job)
    agree({**settings, "workdir": workdir})
    places.check_buckets([workdir, *settings_of(settings).values()])
    check_devices(job)
    if isinstance(job, PromptJob):
        pretraining.make_absent_lm(job, import_units)
    places.at(workdir).mkdir(parents=True, exist_ok=True)
    if isinstance(job, PretrainJob):
        pretraining.run_pretraining(job, workdir, import_units)
    elif isinstance(job, PromptJob):
        prompting.run_prompt_tuning(job, workdir, import_units, command)
    elif isinstance(job, MethodsJob):
        methods.run_methods(job, workdir, import_units, command)
    else:
        comparing.run_comparison(job, workdir, import_units, command)


def check_devices(job: Job) -> None:
    """Raise ValueError if a job cannot be divided among the devices."""
    if isinstance(job, PretrainJob):
        pretraining.check_devices(job)
    elif isinstance(job, PromptJob):
        prompting.check_devices(job)
    else:
        chosen = methods.chosen(job) if isinstance(job, MethodsJob) else list(job.variants.values())
        for one in chosen:
            prompting.check_devices(one)
            pretraining.check_devices(one.pretraining)
