"""The embedded default: speech made on the spot, its unit records, and what trained prompts say of some recordings.

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
from data_pipelines.fit_kmeans import fit_kmeans
from data_pipelines.sources import Source, best_pack
from spjax.jobs import comparing
from spjax.serving.classify import classify_units, load_prompt, load_unit_lm
from spjax.speech2unit.encoder import encode, load_encoder
from spjax.storage import places, save_kmeans
from spjax.tasks import Task

ENCODER = "mfcc"
CLUSTERS = 100
FITTED_ON = 1500  # train recordings that k-means sees, of all tasks together: 200,000 frames


def source(config: ConfigDict, workdir: str) -> Source:
    """The source of a job; its places, relative to WORKDIR until now, are made those in it.

    Raises:
      ValueError: a workdir in a bucket, or speech of another config is in the way.
    """
    if places.is_remote(workdir):
        raise ValueError(f"--workdir={workdir} is in a bucket: speech is made and encoded here, give a local one")
    synthesis = synthesize.SynthesisConfig(**config.synthesis)
    spoken = list(dict.fromkeys((*config.pretraining.tasks, *config.task.split(","))))
    synthesize.check(os.path.join(workdir, "speech"), synthesis, spoken)
    data, config.lm, config.pretraining.data = (
        os.path.join(workdir, place) for place in (config.data, config.lm, config.pretraining.data)
    )
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
    models = {"heard as": (config.lm, workdir)}
    if config.job == "compare":
        least, *_, most = comparing.in_order(config)
        models = {name: (comparing.lm_place(workdir, name), f"{workdir}/{name}") for name in (least, most)}
    print("\n" + show(workdir, models, config.task.split(",")))


def records(
    workdir: str, data: str, tasks: Sequence[str], config: synthesize.SynthesisConfig, *, f0: bool = False
) -> None:
    """Make the tasks' unit records in DATA/TASK, of speech in WORKDIR/speech and centroids in WORKDIR/kmeans.

    What is there is kept, so that a run that was stopped goes on. With `f0` they hold that too, which a
    multi-stream LM takes.

    Raises:
      SpeechError: espeak-ng is not installed.
      ValueError: speech of another config is in the way.
    """
    speech, centroids = Path(workdir) / "speech", Path(workdir) / "kmeans"
    synthesize.synthesize(speech, config, tasks)
    splits = {name: synthesize.clips(speech / name) for name in tasks}
    if not centroids.exists():
        seen = [clip._replace(path=f"{name}/{clip.path}") for name in tasks for clip in splits[name]["train"]]
        described = "synthesised speech: " + ", ".join(tasks)
        encoder = load_encoder(ENCODER)
        fitted = fit_kmeans(seen, speech, encoder, utterances=FITTED_ON, clusters=CLUSTERS, described=described)
        save_kmeans(centroids, fitted)
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
    extract_all(wanted, encoder=ENCODER, kmeans=centroids, f0=f0)


def show(workdir: str, models: Mapping[str, tuple[str, str]], tasks: Sequence[str], each: int = 2) -> str:
    """Classify a few test recordings of every task, from the wave on, and say with which probabilities.

    Args:
      workdir: holds the speech and its k-means.
      models: of each column its heading, the directory of the LM and that of the job that trained prompts on it.
      tasks: of the jobs.
      each: recordings a task.

    Returns:
      Lines of text, which WORKDIR/examples.md holds too.
    """
    speech = Path(workdir) / "speech"
    encoder = load_encoder(ENCODER, str(Path(workdir) / "kmeans"))
    lms = {name: load_unit_lm(lm) for name, (lm, _) in models.items()}
    streams = any(lm.config.prosody for lm in lms.values())
    head = ["recording", "is", *(f"{name} (probability)" for name in models)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in tasks:
        task, clips = synthesize.TASKS[name], synthesize.clips(speech / name)["test"][:each]
        encoded = [encode(speech / name / clip.path, encoder, f0=streams) for clip in clips]
        columns = []
        for model, (_, job) in models.items():
            lm = lms[model]
            # A single task's report stands in the job's directory itself.
            pack = load_prompt(best_pack(os.path.join(job, name) if len(tasks) > 1 else job))
            taken = encoded if lm.config.prosody else [one.units.tolist() for one in encoded]
            answers = classify_units(lm, pack, taken)
            columns.append([_told(task, clip.labels, a) for clip, a in zip(clips, answers, strict=True)])
        for clip, *told in zip(clips, *columns, strict=True):
            lines.append(f"| {' | '.join([str(speech / name / clip.path), ', '.join(clip.labels), *told])} |")
    text = "\n".join([*lines, ""])
    Path(workdir, "examples.md").write_text(text, encoding="utf-8")
    return text


def _told(task: Task, labels: tuple[str, ...], answer: Mapping[str, Any]) -> str:
    said = [answer["labels"][slot.name] for slot in task.slots]
    shares = [answer["probabilities"][slot.name][label] for slot, label in zip(task.slots, said, strict=True)]
    heard = ", ".join(f"{label} ({share:.2f})" for label, share in zip(said, shares, strict=True))
    return heard if tuple(said) == labels else f"{heard} ✗"
