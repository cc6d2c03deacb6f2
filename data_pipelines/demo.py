"""Synthesises speech, makes its unit records, and shows predictions of trained prompts or adapters for recordings.

Data source of jobs whose config has `synthesis` (configs/demo.py, demo_prosody.py).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from data_pipelines import synthesize
from data_pipelines.extract import Wanted, extract_all
from data_pipelines.source import Source, best_pack
from spjax.config import CompareJob, PromptJob, checked
from spjax.encoders.encoder import encode, load_encoder
from spjax.io import assets, places
from spjax.jobs import comparing
from spjax.serving import scoring
from spjax.serving.load import load_prompt, load_unit_lm

ENCODER = "tiny"


def source(job: PromptJob | CompareJob, workdir: str) -> Source:
    """Makes the source of a job, and resolves the paths in its settings against WORKDIR.

    Raises:
      ValueError: a workdir in a bucket, or a workdir with speech of another config.
    """
    if places.is_remote(workdir):
        raise ValueError(f"--workdir={workdir} is in a bucket, but speech is synthesised locally: give a local one")
    one = job.common if isinstance(job, CompareJob) else job
    given = checked(synthesize.SynthesisConfig, one.synthesis or {}, "synthesis.")
    synthesis = synthesize.SynthesisConfig(**given)
    tasks = one.tasks
    data = os.path.join(workdir, one.data, *(tasks if len(tasks) == 1 else ()))
    if one.lm not in assets.NAMES:
        tasks = list(dict.fromkeys((*one.pretraining.tasks, *tasks)))
        lm, units = (os.path.join(workdir, path) for path in (one.lm, one.pretraining.data))
        one = dataclasses.replace(one, lm=lm, pretraining=dataclasses.replace(one.pretraining, data=units))
    synthesize.check(os.path.join(workdir, "speech"), synthesis, tasks)
    one = dataclasses.replace(one, data=data)
    f0 = isinstance(job, CompareJob) or one.pretraining.lm.prosody is not None
    made = dataclasses.replace(job, common=one) if isinstance(job, CompareJob) else one
    return Source(
        made,
        lambda _, directory: records(workdir, os.path.dirname(directory), tasks, synthesis, f0=f0),
        lambda: _show_job(made, workdir),
    )


def _show_job(job: PromptJob | CompareJob, workdir: str) -> None:
    """Prints the predictions of a finished job's prompts for some recordings; in the first process only."""
    if jax.process_index() > 0:
        return
    one = job.common if isinstance(job, CompareJob) else job
    models = {"predicted": (one.lm, workdir)}
    if isinstance(job, CompareJob):
        least, *_, most = comparing.in_order(job)
        models = {name: (comparing.lm_place(workdir, name), f"{workdir}/{name}") for name in (least, most)}
    print("\n" + show(workdir, models, one.tasks))


def records(
    workdir: str, data: str, tasks: Sequence[str], config: synthesize.SynthesisConfig, *, f0: bool = False
) -> None:
    """Synthesises speech in WORKDIR/speech and makes the tasks' unit records in DATA/TASK.

    Existing records are kept, so that an interrupted run continues. `f0` adds f0, which a multi-stream LM needs.

    Raises:
      MissingExtraError: espeak-ng is not installed.
      ValueError: WORKDIR holds speech of another config.
    """
    speech = Path(workdir) / "speech"
    synthesize.synthesize(speech, config, tasks)
    splits = {name: synthesize.clips(speech / name) for name in tasks}
    notes = ("speech synthesised by espeak-ng",)
    # A voice's pitch varies between utterances, so f0 is normalised by utterance, as for unknown speakers.
    splits = {
        name: {split: [clip._replace(speaker="") for clip in some] for split, some in of_task.items()}
        for name, of_task in splits.items()
    }
    wanted = [
        Wanted(synthesize.TASKS[name], splits[name], speech / name, os.path.join(data, name), notes=notes)
        for name in tasks
        if not os.path.exists(os.path.join(data, name))
    ]
    extract_all(wanted, encoder=ENCODER, kmeans=None, f0=f0)


def show(workdir: str, models: Mapping[str, tuple[str, str]], tasks: Sequence[str], each: int = 2) -> str:
    """Classifies a few test recordings of every task, from the waveform, and formats labels and probabilities.

    Args:
      workdir: the directory of the speech.
      models: column heading → (directory of the LM, directory of the job that trained prompts on it).
      tasks: of the jobs.
      each: recordings a task.

    Returns:
      A Markdown table, which is also written to WORKDIR/examples.md.
    """
    speech, encoder = Path(workdir) / "speech", load_encoder(ENCODER)
    lms = {name: load_unit_lm(lm) for name, (lm, _) in models.items()}
    streams = any(lm.config.prosody for lm in lms.values())
    asked = [(name, clip) for name in tasks for clip in synthesize.clips(speech / name)["test"][:each]]
    encoded = [encode(speech / name / clip.path, encoder, f0=streams) for name, clip in asked]
    columns = []
    for model, (_, job) in models.items():
        lm = lms[model]
        # With a single task, the report is in the job's directory.
        reports = {name: os.path.join(job, name) if len(tasks) > 1 else job for name in tasks}
        packs = {name: load_prompt(best_pack(report)) for name, report in reports.items()}
        banks = scoring.make_banks(lm.config, lm.params, "float32", packs)
        split = scoring.unit_set(encoded if lm.config.prosody else [one.units for one in encoded], lm.config)
        answers = scoring.answer(lm.params, banks, split, [(name,) for name, _ in asked])
        columns.append([_format(name, clip.labels, a[name]) for (name, clip), a in zip(asked, answers, strict=True)])
    head = ["recording", "is", *(f"{name} (probability)" for name in models)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (name, clip), *predicted in zip(asked, *columns, strict=True):
        lines.append(f"| {' | '.join([str(speech / name / clip.path), ', '.join(clip.labels), *predicted])} |")
    text = "\n".join([*lines, ""])
    Path(workdir, "examples.md").write_text(text, encoding="utf-8")
    return text


def _format(name: str, labels: tuple[str, ...], answer: Mapping[str, Any]) -> str:
    slots = [slot.name for slot in synthesize.TASKS[name].slots]
    predicted = [answer["labels"][slot] for slot in slots]
    shares = [answer["probabilities"][slot][label] for slot, label in zip(slots, predicted, strict=True)]
    text = ", ".join(f"{label} ({share:.2f})" for label, share in zip(predicted, shares, strict=True))
    return text if tuple(predicted) == labels else f"{text} ✗"
