"""Speech made on the spot, its unit records, and what trained adapters or prompts predict for some recordings.

The source of jobs whose config has `synthesis` (configs/demo.py, demo_prosody.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from data_pipelines import synthesize
from data_pipelines.extract import Wanted, extract_all
from data_pipelines.source import Source, best_pack
from spjax.jobs import comparing
from spjax.serving import scoring
from spjax.serving.load import load_prompt, load_unit_lm
from spjax.speech2unit.encoder import encode, load_encoder
from spjax.storage import assets, places

ENCODER = "tiny"


def source(config: ConfigDict, workdir: str) -> Source:
    """The source of a job; its places, relative to WORKDIR until now, are made those in it.

    Raises:
      ValueError: a workdir in a bucket, or speech of another config is in the way.
    """
    if places.is_remote(workdir):
        raise ValueError(f"--workdir={workdir} is in a bucket: speech is made and encoded here, give a local one")
    synthesis = synthesize.SynthesisConfig(**config.synthesis)
    spoken = config.task.split(",")
    data = os.path.join(workdir, config.data)
    if config.lm not in assets.NAMES:
        spoken = list(dict.fromkeys((*config.pretraining.tasks, *spoken)))
        config.lm, config.pretraining.data = (os.path.join(workdir, p) for p in (config.lm, config.pretraining.data))
    synthesize.check(os.path.join(workdir, "speech"), synthesis, spoken)
    config.data = data if "," in config.task else os.path.join(data, config.task)
    f0 = config.job == "compare" or "prosody" in config.pretraining.lm
    return Source(
        lambda _, directory: records(workdir, os.path.dirname(directory), spoken, synthesis, f0=f0),
        lambda: _show_job(config, workdir),
    )


def _show_job(config: ConfigDict, workdir: str) -> None:
    """Print what the prompts of a finished job answer for some recordings, once where several processes ran it."""
    if jax.process_index() > 0:
        return
    models = {"predicted": (config.lm, workdir)}
    if config.job == "compare":
        least, *_, most = comparing.in_order(config)
        models = {name: (comparing.lm_place(workdir, name), f"{workdir}/{name}") for name in (least, most)}
    print("\n" + show(workdir, models, config.task.split(",")))


def records(
    workdir: str, data: str, tasks: Sequence[str], config: synthesize.SynthesisConfig, *, f0: bool = False
) -> None:
    """Make the tasks' unit records in DATA/TASK, of speech in WORKDIR/speech.

    What is there is kept, so that a run that was stopped goes on. With `f0` they hold that too, which a
    multi-stream LM takes.

    Raises:
      SpeechError: espeak-ng is not installed.
      ValueError: speech of another config is in the way.
    """
    speech = Path(workdir) / "speech"
    synthesize.synthesize(speech, config, tasks)
    splits = {name: synthesize.clips(speech / name) for name in tasks}
    notes = ("speech synthesised by espeak-ng",)
    # A voice speaks at another pitch each time: f0 is to be less the utterance's mean, as of a stranger's recording.
    splits = {
        name: {split: [clip._replace(speaker="") for clip in some] for split, some in own.items()}
        for name, own in splits.items()
    }
    wanted = [
        Wanted(synthesize.TASKS[name], splits[name], speech / name, os.path.join(data, name), notes=notes)
        for name in tasks
        if not os.path.exists(os.path.join(data, name))
    ]
    extract_all(wanted, encoder=ENCODER, kmeans=None, f0=f0)


def show(workdir: str, models: Mapping[str, tuple[str, str]], tasks: Sequence[str], each: int = 2) -> str:
    """Classify a few test recordings of every task, from the wave on, and say with which probabilities.

    Args:
      workdir: holds the speech.
      models: of each column its heading, the directory of the LM and that of the job that trained prompts on it.
      tasks: of the jobs.
      each: recordings a task.

    Returns:
      Lines of text, which WORKDIR/examples.md holds too.
    """
    speech, encoder = Path(workdir) / "speech", load_encoder(ENCODER)
    lms = {name: load_unit_lm(lm) for name, (lm, _) in models.items()}
    streams = any(lm.config.prosody for lm in lms.values())
    asked = [(name, clip) for name in tasks for clip in synthesize.clips(speech / name)["test"][:each]]
    encoded = [encode(speech / name / clip.path, encoder, f0=streams) for name, clip in asked]
    columns = []
    for model, (_, job) in models.items():
        lm = lms[model]
        # A single task's report stands in the job's directory itself.
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
