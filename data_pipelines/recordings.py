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

from ml_collections import ConfigDict

from data_pipelines import data_flags, extract, flag_table, parts
from data_pipelines.builders import UNIT_TEXT
from data_pipelines.source import OWN, Source, best_pack
from spjax import fetch, vocab
from spjax.command_line import Parser
from spjax.convert import ConvertError
from spjax.data.records import CARD, load_card, read_unit_records
from spjax.jobs import workdirs
from spjax.speech2unit.encoder import ACOUSTIC
from spjax.storage import assets, places
from spjax.tasks import TASKS
from spjax.training import sharding

PUBLISHED = "gslm_hubert100"  # of `fetch.SETS`
# Its LM has 12 layers of 1,024: 98,304 numbers in adapters of rank 2, where prompts of length 5 alone have 122,880.
ADAPTER = {"rank": 2, "targets": ("query", "value")}
ADAPTER_LR = 1e-3
LAYER, CLUSTERS = 6, 100
IN_PROCESS = 256  # clips that are encoded before worker processes would have started
_CONTENT = "recordings"  # what the card calls the hash of all files' bytes
_OF_ENCODER = ("encoder", "kmeans", "on-error")
LEAST_UPDATES = 100  # of adapters on recordings of your own: an epoch of a handful has one or two


def source(config: ConfigDict, workdir: str, flags: Mapping[str, Any], overrides: Collection[str]) -> Source:
    """The source of a job on recordings; arguments as of `sources.source_of`, `flags` only those that are given.

    Raises:
      ValueError: the config is not for these recordings, they cannot be used, or records of others are in the way.
      OSError: the published models are neither here nor to be had.
    """
    own = "folders" in flags or "manifest" in flags
    _check_config(config, own, workdir, flags)
    data = _listed(config, own, flags)
    config.data = config.data.rstrip("/")
    if own:
        config.task = data.task.name
        config.data = os.path.join(workdir, config.data, data.task.name)
        if "train.passes" not in overrides:
            train = data.splits["train"]
            count = min(len(train), config.few_shot * len({clip.labels for clip in train}) or len(train))
            config.train.passes = -(-LEAST_UPDATES // (config.train.epochs * -(-count // config.train.max_rows)))
    advice = (
        f"use another --workdir, or remove {workdir}" if own else f"give another --config.data, or remove {config.data}"
    )
    _check_clips(config.data, data, advice)
    encoder, kmeans = _choose_models(config, flags, overrides)
    _fetch_absent(config, encoder, kmeans)
    args = _extract_flags(config, data, encoder, kmeans, flags)
    _check_models(config.data, args, advice)

    def make(task: str, directory: str) -> None:
        if task != data.task.name:
            raise ValueError(
                f"no unit records of {task} at {directory}, and the recordings given are of {data.task.name}"
            )
        args.out = directory
        extract.extract_data(data, args)

    def finish() -> None:
        pack = best_pack(workdir)
        kept = set(read_unit_records(config.data, "test")[0].ids)  # files without speech may have been skipped
        whole = (clip for clip in data.splits["test"] if clip.id in kept and not clip.start and clip.duration is None)
        clip = next(whole, None)  # spjax.predict takes whole files
        if clip and workdirs.there(pack):  # none is kept of a random LM, or of one that is trained
            print(f"to try it: {_predict_line(config, args, pack, os.path.join(data.raw, clip.path))}", flush=True)

    return Source(make, lambda: sharding.on_process_zero("the last line", finish))


def _check_config(config: ConfigDict, own: bool, workdir: str, flags: Mapping[str, Any]) -> None:
    way = next(name for name in ("folders", "manifest", "raw") if name in flags)
    if config.job != "prompt" or "," in config.task:
        raise ValueError(
            f"--{way} is for a config of one task, such as configs/fsc.py or configs/own.py: for this one make the "
            "unit records of each task by python -m data_pipelines.extract"
        )
    if own and config.task != OWN:
        raise ValueError(
            f"--{way} is for recordings of your own, this config is for the task {config.task}: give "
            f"--config=configs/own.py without --config.task, or by --raw=DIR the data set {config.task}"
        )
    if not own and config.task == OWN:
        raise ValueError(
            "--raw is for a data set that spjax knows, this config for recordings of your own: give --folders=DIR, a "
            "folder a class, or --manifest=CSV"
        )
    if config.task in UNIT_TEXT:
        raise ValueError(f"task {config.task} comes as units, not as recordings: give their folder by --units=DIR")
    if "kmeans" in flags and "encoder" not in flags:
        raise ValueError(f"--kmeans={flags['kmeans']} belongs to an encoder: give that by --encoder")
    if "folders" in flags and not places.is_remote(workdir):
        folder, inside = os.path.realpath(flags["folders"]), os.path.realpath(workdir)
        if os.path.commonpath([folder, inside]) == folder:
            raise ValueError(
                f"--workdir={workdir} is inside --folders={flags['folders']}, where every folder is a class: give a "
                "--workdir outside"
            )


def _listed(config: ConfigDict, own: bool, flags: Mapping[str, Any]) -> data_flags.DataSet:
    """The clips and splits that the flags name."""
    parser = Parser(prog="python -m spjax.main")
    data_flags.add_data_flags(parser)
    named = {name: value for name, value in flags.items() if name not in _OF_ENCODER}
    words = flag_table.words(named if own else {"task": config.task, **named})
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


def _choose_models(config: ConfigDict, flags: Mapping[str, Any], overrides: Collection[str]) -> tuple[str, str | None]:
    """Encoder and k-means (None: to be fitted, or its own); sets the LM in the config, and how it is pretrained."""
    encoder, kmeans = flags.get("encoder"), flags.get("kmeans")
    if encoder is None and (config.lm in assets.NAMES or "raw" not in flags or "manifest" in flags):
        encoder = assets.NAMES[0]  # an LM takes the units that it knows; those of your own data are to be had at once
    streams = "prosody" in config.pretraining.lm
    if published := encoder is None:
        home = fetch.SETS[PUBLISHED].default_out()
        encoder, kmeans = str(home / "hubert"), str(home / "kmeans")
    if "lm" not in overrides:
        if published and not streams:
            config.lm = str(home / "unit_lm")
            if not config.reference:
                config.prompt.update({key: value for key, value in ADAPTER.items() if f"prompt.{key}" not in overrides})
                config.optim.lr = config.optim.lr if "optim.lr" in overrides else ADAPTER_LR
                workdirs.say(f"{config.lm}: adapters of rank 2 on query and value (--config.prompt.* overrides)")
        else:
            config.lm = encoder if encoder in assets.NAMES and not streams else f"{config.data}-ulm/lm"
    clusters = len(parts.load_centroids(kmeans).centroids) if kmeans and not published else CLUSTERS
    pretraining = {  # where that LM is absent
        "tasks": (config.task,),
        "data": os.path.dirname(config.data),
        "lm.vocab_size": clusters + vocab.UNIT_OFFSET,
    }
    settled = published or config.lm in assets.NAMES or workdirs.there(config.lm)
    if not settled and os.path.basename(config.data) != config.task:
        raise ValueError(
            f"--config.data={config.data} must end in /{config.task}, where the LM's pretraining looks for records"
        )
    config.pretraining.update_from_flattened_dict(
        {name: value for name, value in pretraining.items() if f"pretraining.{name}" not in overrides}
    )
    return encoder, kmeans


def _fetch_absent(config: ConfigDict, encoder: str, kmeans: str | None) -> None:
    """Fetch the published models, where this job needs one of them that is not there."""
    home = fetch.SETS[PUBLISHED].default_out()
    wanted = [config.lm] if workdirs.whole(config.data, CARD) else [config.lm, encoder, kmeans]
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
    config: ConfigDict, data: data_flags.DataSet, encoder: str, kmeans: str | None, flags: Mapping[str, Any]
) -> argparse.Namespace:
    """What `data_pipelines.extract` is asked for."""
    name, kmeans = assets.find_encoder(encoder, kmeans)
    asked: dict[str, Any] = {"task": data.task.name, "out": config.data, "encoder": encoder}
    asked |= {flag: flags[flag] for flag in ("on-error",) if flag in flags}
    asked |= {"kmeans": kmeans} if kmeans else {"clusters": CLUSTERS}
    if name not in ACOUSTIC:
        asked["layer"] = _layer(name, kmeans)
    if sum(map(len, data.splits.values())) <= IN_PROCESS:
        asked["workers"] = "0"  # encode in this process
    asked["f0"] = "prosody" in config.pretraining.lm
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


def _predict_line(config: ConfigDict, args: argparse.Namespace, pack: str, recording: str) -> str:
    """The command that answers for a recording."""
    asked = {"lm": config.lm, "encoder": args.encoder}
    if args.encoder not in assets.NAMES:
        asked["kmeans"] = args.kmeans or extract.kmeans_of(args.out)
        asked |= {} if args.encoder in ACOUSTIC else {"layer": args.layer}
    words = flag_table.words({**asked, "packs": pack})
    return shlex.join(["python", "-m", "spjax.predict", *words, recording])
