"""Recordings as the source of a job: `--raw` (a data set that spjax knows), `--folders` or `--manifest` (your own).

They are listed at every start, and unit records that were made of other recordings, or by another encoder, are refused.
What is absent is made: the published models (`spjax.fetch`), a k-means, the records; the job itself pretrains an LM
where there is none for the encoder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import os
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from data_pipelines import data_flags, extract, flag_table, parts
from data_pipelines.builders import UNIT_TEXT
from data_pipelines.source import OWN, Source, best_pack
from spjax import fetch, vocab
from spjax.command_line import Parser
from spjax.config import PromptJob
from spjax.convert import ConvertError
from spjax.data.records import CARD, load_card, read_unit_records
from spjax.encoders.encoder import ACOUSTIC
from spjax.io import assets, places
from spjax.jobs import workdirs
from spjax.tasks import TASKS
from spjax.training import sharding
from spjax.training.sweep import with_values

PUBLISHED = "gslm_hubert100"  # of `fetch.SETS`
# Its LM has 12 layers of 1,024: 98,304 numbers in adapters of rank 2, where prompts of length 5 alone have 122,880.
ADAPTER = {"rank": 2, "targets": ("query", "value")}
ADAPTER_LR = 1e-3
LAYER, CLUSTERS = 6, 100
IN_PROCESS = 256  # clips that are encoded before worker processes would have started
_CONTENT = "recordings"  # what the card calls the hash of all files' bytes
_OF_ENCODER = ("encoder", "kmeans", "on-error")
LEAST_UPDATES = 100  # of adapters on recordings of your own: an epoch of a handful has one or two


def source(job: PromptJob, workdir: str, flags: Mapping[str, Any], overrides: Collection[str]) -> Source:
    """The source of a job on recordings; arguments as of `sources.source_of`, `flags` only those that are given.

    Raises:
      ValueError: the job is not for these recordings, they cannot be used, or records of others are in the way.
      OSError: the published models are neither here nor to be had.
    """
    own = "folders" in flags or "manifest" in flags
    _check_job(job, own, workdir, flags)
    data = _listed(job, own, flags)
    job = dataclasses.replace(job, data=job.data.rstrip("/"))
    if own:
        place = os.path.join(workdir, job.data, data.task.name)
        job = dataclasses.replace(job, task=data.task.name, data=place)
        if "train.passes" not in overrides:
            train = data.splits["train"]
            count = min(len(train), job.few_shot * len({clip.labels for clip in train}) or len(train))
            passes = -(-LEAST_UPDATES // (job.train.epochs * -(-count // job.train.max_rows)))
            job = dataclasses.replace(job, train=dataclasses.replace(job.train, passes=passes))
    advice = (
        f"use another --workdir, or remove {workdir}" if own else f"give another --config.data, or remove {job.data}"
    )
    _check_clips(job.data, data, advice)
    job, encoder, kmeans = _choose_models(job, flags, overrides)
    _fetch_absent(job, encoder, kmeans)
    args = _extract_flags(job, data, encoder, kmeans, flags)
    _check_models(job.data, args, advice)

    def make(task: str, directory: str) -> None:
        if task != data.task.name:
            raise ValueError(
                f"no unit records of {task} at {directory}, and the recordings given are of {data.task.name}"
            )
        args.out = directory
        extract.extract_data(data, args)

    def finish() -> None:
        pack = best_pack(workdir)
        kept = set(read_unit_records(job.data, "test")[0].ids)  # files without speech may have been skipped
        whole = (clip for clip in data.splits["test"] if clip.id in kept and not clip.start and clip.duration is None)
        clip = next(whole, None)  # spjax.predict takes whole files
        if clip and workdirs.there(pack):  # none is kept of a random LM, or of one that is trained
            print(f"to try it: {_predict_line(job, args, pack, os.path.join(data.raw, clip.path))}", flush=True)

    return Source(job, make, lambda: sharding.on_process_zero("the last line", finish))


def _check_job(job: PromptJob, own: bool, workdir: str, flags: Mapping[str, Any]) -> None:
    if own and job.task != OWN:
        way = next(name for name in ("folders", "manifest") if name in flags)
        raise ValueError(
            f"--{way} is for recordings of your own, this config is for the task {job.task}: give "
            f"--config=configs/own.py without --config.task, or by --raw=DIR the data set {job.task}"
        )
    if not own and job.task == OWN:
        raise ValueError(
            "--raw is for a data set that spjax knows, this config for recordings of your own: give --folders=DIR, a "
            "folder a class, or --manifest=CSV"
        )
    if job.task in UNIT_TEXT:
        raise ValueError(f"task {job.task} comes as units, not as recordings: give their folder by --units=DIR")
    if "kmeans" in flags and "encoder" not in flags:
        raise ValueError(f"--kmeans={flags['kmeans']} belongs to an encoder: give that by --encoder")
    if "folders" in flags and not places.is_remote(workdir):
        folder, inside = os.path.realpath(flags["folders"]), os.path.realpath(workdir)
        if os.path.commonpath([folder, inside]) == folder:
            raise ValueError(
                f"--workdir={workdir} is inside --folders={flags['folders']}, where every folder is a class: give a "
                "--workdir outside"
            )


def _listed(job: PromptJob, own: bool, flags: Mapping[str, Any]) -> data_flags.DataSet:
    """The clips and splits that the flags name."""
    parser = Parser(prog="python -m spjax.main")
    data_flags.add_data_flags(parser)
    named = {name: value for name, value in flags.items() if name not in _OF_ENCODER}
    words = flag_table.words(named if own else {"task": job.task, **named})
    data = data_flags.chosen(parser.parse_args(words))
    if not own:
        return data
    task = data.task
    if task.name in TASKS:  # published results of that task are none of these recordings
        task = dataclasses.replace(task, name=f"{task.name}_own")
    files = {} if places.is_remote(data.raw) else {_CONTENT: _content_hash(data)}
    return data._replace(task=task, sources={**data.sources, **files})


def _content_hash(data: data_flags.DataSet) -> str:
    """sha256 (hex) of the bytes of all recordings: one that is replaced under its name is another."""
    every = hashlib.sha256()
    for path in dict.fromkeys(clip.path for clips in data.splits.values() for clip in clips):
        with contextlib.suppress(OSError), open(os.path.join(data.raw, path), "rb") as file:  # extraction says why
            every.update(hashlib.file_digest(file, "sha256").digest())
    return every.hexdigest()


def _choose_models(
    job: PromptJob, flags: Mapping[str, Any], overrides: Collection[str]
) -> tuple[PromptJob, str, str | None]:
    """The job with its LM and how that is pretrained; encoder, and k-means (None: to be fitted, or the encoder's)."""
    encoder, kmeans = flags.get("encoder"), flags.get("kmeans")
    if encoder is None and (job.lm in assets.NAMES or "raw" not in flags or "manifest" in flags):
        encoder = assets.NAMES[0]  # an LM takes the units that it knows; those of your own data are to be had at once
    streams = job.pretraining.lm.prosody is not None
    if published := encoder is None:
        home = fetch.SETS[PUBLISHED].default_out()
        encoder, kmeans = str(home / "hubert"), str(home / "kmeans")
    if "lm" not in overrides:
        if published and not streams:
            job = dataclasses.replace(job, lm=str(home / "unit_lm"))
            if not job.reference:
                adapter = {key: value for key, value in ADAPTER.items() if f"prompt.{key}" not in overrides}
                rate = {} if "optim.lr" in overrides else {"lr": ADAPTER_LR}
                job = dataclasses.replace(
                    job,
                    prompt=with_values(job.prompt, adapter),
                    optim=with_values(job.optim, rate),
                )
                workdirs.say(f"{job.lm}: adapters of rank 2 on query and value (--config.prompt.* overrides)")
        else:
            lm = encoder if encoder in assets.NAMES and not streams else f"{job.data}-ulm/lm"
            job = dataclasses.replace(job, lm=lm)
    clusters = len(parts.load_centroids(kmeans).centroids) if kmeans and not published else CLUSTERS
    settled = published or job.lm in assets.NAMES or workdirs.there(job.lm)
    if not settled and os.path.basename(job.data) != job.task:
        raise ValueError(
            f"--config.data={job.data} must end in /{job.task}, where the LM's pretraining looks for records"
        )
    pretraining: dict[str, Any] = {"tasks": (job.task,), "data": os.path.dirname(job.data)}  # if that LM is absent
    if "pretraining.lm.vocab_size" not in overrides:
        pretraining["lm"] = dataclasses.replace(job.pretraining.lm, vocab_size=clusters + vocab.UNIT_OFFSET)
    changed = {name: value for name, value in pretraining.items() if f"pretraining.{name}" not in overrides}
    job = dataclasses.replace(job, pretraining=dataclasses.replace(job.pretraining, **changed))
    return job, encoder, kmeans


def _fetch_absent(job: PromptJob, encoder: str, kmeans: str | None) -> None:
    """Fetch the published models, where this job needs one of them that is not there."""
    home = fetch.SETS[PUBLISHED].default_out()
    wanted = [job.lm] if workdirs.whole(job.data, CARD) else [job.lm, encoder, kmeans]
    ours = [place for place in wanted if place and Path(place).parent == home]
    if all(map(workdirs.there, ours)):
        return

    def get() -> None:
        try:
            fetch.fetch(PUBLISHED)
        except (fetch.FetchError, ConvertError) as error:
            raise FileNotFoundError(
                f"{', '.join(place for place in ours if not workdirs.there(place))}: not there, and not to be had "
                f"({str(error).partition('. ')[0]})\n{fetch.by_hand(PUBLISHED)}\nOr do without these models: "
                "--encoder=tiny takes the units and the LM that go with spjax."
            ) from error

    sharding.on_process_zero("the published models", get)


def _extract_flags(
    job: PromptJob, data: data_flags.DataSet, encoder: str, kmeans: str | None, flags: Mapping[str, Any]
) -> argparse.Namespace:
    """What `data_pipelines.extract` is asked for."""
    name, kmeans = assets.find_encoder(encoder, kmeans)
    asked: dict[str, Any] = {"task": data.task.name, "out": job.data, "encoder": encoder}
    asked |= {flag: flags[flag] for flag in ("on-error",) if flag in flags}
    asked |= {"kmeans": kmeans} if kmeans else {"clusters": CLUSTERS}
    if name not in ACOUSTIC:
        asked["layer"] = _layer(name, kmeans)
    if sum(map(len, data.splits.values())) <= IN_PROCESS:
        asked["workers"] = "0"  # encode in this process
    asked["f0"] = job.pretraining.lm.prosody is not None
    return extract.parser().parse_args(flag_table.words(asked))


def _layer(encoder: str, kmeans: str | None) -> int:
    """That of the k-means; where one is to be fitted, the sixth, or the last but one of a small encoder."""
    if kmeans and workdirs.there(kmeans):
        return parts.load_centroids(kmeans).card["layer"] or LAYER
    card = os.path.join(encoder, "config.json")
    return min(LAYER, workdirs.read_json(card)["layers"] - 1) if workdirs.there(card) else LAYER


def _check_clips(records: str, data: data_flags.DataSet, advice: str) -> None:
    """Raise ValueError where unit records were made of other recordings than those listed."""
    if not workdirs.whole(records, CARD):
        return
    card = load_card(records)
    now = {f"{split} clips": parts.clips_hash(clips) for split, clips in data.splits.items()}
    now |= {name: value for name, value in data.sources.items() if name == _CONTENT}
    if any(card.sources.get(name) != value for name, value in now.items()):
        raise ValueError(
            f"{records} holds units of other recordings or splits than {data.raw} has now: some were added, removed, "
            f"changed or split otherwise since: {advice}"
        )
    if card.task != data.task:  # of the same recordings: only what their labels are called, or are measured by
        raise ValueError(
            f"{records} is for the metric {card.task.metric} of {', '.join(slot.name for slot in card.task.slots)}, "
            f"now it is to be {data.task.metric} of {', '.join(slot.name for slot in data.task.slots)}: {advice}"
        )


def _check_models(records: str, args: argparse.Namespace, advice: str) -> None:
    """Raise ValueError where unit records were made by other models, as far as these are at hand."""
    if not workdirs.whole(records, CARD):
        return
    known: dict[str, Any] = {}
    kmeans = args.kmeans or extract.kmeans_of(args.out)
    name = assets.find_encoder(args.encoder, args.kmeans)[0]
    card = os.path.join(name, "config.json")
    if name in ACOUSTIC:
        known = {"encoder": name, "layer": 0}
    elif workdirs.there(card):
        known = {"encoder": workdirs.read_json(card)["name"], "layer": args.layer}
    if workdirs.there(os.path.join(kmeans, "card.json")):
        known["kmeans"] = parts.load_centroids(kmeans).id
    elif args.kmeans is None:
        known["kmeans"] = f"one that was to be in {kmeans} and is not"
    found = load_card(records)
    if other := [
        f"{key} {getattr(found, key)}, now {value}" for key, value in known.items() if getattr(found, key) != value
    ]:
        raise ValueError(f"{records} holds units that were made otherwise ({'; '.join(other)}): {advice}")


def _predict_line(job: PromptJob, args: argparse.Namespace, pack: str, recording: str) -> str:
    """The command that answers for a recording."""
    asked = {"lm": job.lm, "encoder": args.encoder}
    if args.encoder not in assets.NAMES:
        asked["kmeans"] = args.kmeans or extract.kmeans_of(args.out)
        asked |= {} if args.encoder in ACOUSTIC else {"layer": args.layer}
    words = flag_table.words({**asked, "packs": pack})
    return shlex.join(["python", "-m", "spjax.predict", *words, recording])
