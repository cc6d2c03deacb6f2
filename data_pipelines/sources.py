"""The one place that decides how `spjax.main` makes unit records that are absent.

A config may make them itself: `synthesis` (the demo) and `speech` (the corpus that tiny was pretrained on). Otherwise a
flag says what they come from: `--units` (units as text), `--raw` (a data set that spjax knows), `--folders` or
`--manifest` (recordings of your own).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from data_pipelines.source import OWN, Source
from spjax.config import CompareJob, Job, PretrainJob, PromptJob
from spjax.io import places

WAYS = ("units", "raw", "folders", "manifest")


def source_of(job: Job, workdir: str, given: Mapping[str, Any], overrides: Collection[str]) -> Source:
    """The source of a job's records.

    Args:
      job: its settings.
      workdir: of the job.
      given: values of `--units` and of the flags of `flag_table`, by name; None or False where they are not given.
      overrides: settings that the command line gives by `--config.NAME`.

    Raises:
      ValueError: flags that do not go together, or with these settings.
      OSError: what a flag names is not there.
    """
    flags = {name: value for name, value in given.items() if value not in (None, False)}
    ways = [name for name in WAYS if name in flags]
    prompting = job.common if isinstance(job, CompareJob) else job
    synthesis = isinstance(prompting, PromptJob) and prompting.synthesis is not None
    made = "synthesis" if synthesis else "speech" if isinstance(job, PretrainJob) and job.speech is not None else ""
    if made and flags:
        raise ValueError(
            f"--{next(iter(flags))}: this config makes its own records (config.{made}): leave the flag out"
        )
    if isinstance(job, PromptJob | CompareJob) and synthesis:
        from data_pipelines import demo

        return demo.source(job, workdir)
    if isinstance(job, PretrainJob) and made:
        from data_pipelines import foundation

        return foundation.source(job, workdir)
    if len(ways) > 1 and ways != ["raw", "manifest"]:  # --raw may be the root of a CSV's paths
        raise ValueError(f"--{ways[0]} and --{ways[1]} both say where the units come from: give one of them")
    of_recordings = bool(ways) and ways != ["units"]
    if flags.keys() - set(WAYS) and not of_recordings:
        name = next(name for name in flags if name not in WAYS)
        raise ValueError(f"--{name} is for recordings: give --folders, --manifest or --raw too, or leave it out")
    if of_recordings:
        from data_pipelines import recordings

        way = "--" + next(name for name in ("folders", "manifest", "raw") if name in flags)
        if not isinstance(job, PromptJob) or len(job.tasks) > 1:
            raise ValueError(
                f"{way} is for a config of one task, such as configs/fsc.py or configs/own.py: for this one make the "
                "unit records of each task by python -m data_pipelines.extract"
            )
        return recordings.source(job, workdir, flags, overrides)
    if isinstance(job, PromptJob) and job.task == OWN:
        raise ValueError(
            "this config is for recordings of your own: give --folders=DIR, a folder a class, or --manifest=CSV"
        )
    if not ways:
        return Source(job, lambda task, directory: _absent(job, task, directory))
    units = flags["units"]
    if not places.at(units).is_dir():
        raise ValueError(f"--units={units} is no folder: give the one that holds TASK/train.txt and so on")
    from data_pipelines.import_frames import import_from

    return Source(job, lambda task, directory: import_from(units, task, directory))


def _absent(job: Job, task: str, directory: str) -> NoReturn:
    """Say what to type where there are no records and nothing to make them of, the easiest first."""
    from data_pipelines.builders import CLIPS

    what = f"no unit records of {task} at {directory}, and nothing to make them of"
    if isinstance(job, PromptJob) and task not in job.tasks:
        raise FileNotFoundError(
            f"{what}, which the LM {job.lm} is to be pretrained on: give --config.lm=DIR of one that is there, "
            f"--units=DIR, where the units of {task} are too, or by --config.pretraining.tasks the tasks to pretrain on"
        )
    ways = ["  --units=DIR                units as text (docs/unit_text.md)"]
    if not isinstance(job, PretrainJob | CompareJob) and job.task in CLIPS:
        ways = [
            f"  --raw=DIR --encoder=tiny   the data set {task}, unpacked in DIR; nothing is downloaded",
            "  --raw=DIR                  the same with the published HuBERT and its LM, which are fetched first",
            *ways,
        ]
    else:
        ways.append("  --config.data=DIR          records that are there, or made by python -m data_pipelines.extract")
    lines = [
        what,
        "Add one of these to the command:",
        *ways,
        "Or try spjax on other data:",
        "  python -m spjax.main --config=configs/demo.py                speech made on the spot",
        "  python -m spjax.main --config=configs/own.py --folders=DIR   your recordings, a folder a class",
    ]
    raise FileNotFoundError("\n".join(lines))
