"""Makes unit records for pretraining the bundled unit LM: synthesised speech of many languages, encoded to units.

Data source of a job whose config has `speech` (configs/pretrain_tiny.py), which ends with `write_assets`. Waveforms are
not stored: each part of the utterances is synthesised, encoded and written as units at once, several parts in parallel.
Finished parts are kept, so that an interrupted run continues. Voices are the demo's: its train voices for train, its
valid voices for valid; its test voices are not used.

An utterance depends on the seed, its split and number, and the versions of espeak-ng and numpy, not on the number of
processes. (The engine keeps state between utterances, so each part is made in a separate process.)
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.metadata
import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipelines import espeak, sentences, spoken_tasks, synthesize
from data_pipelines.source import Source
from data_pipelines.spoken_tasks import Line
from spjax import process
from spjax.config import PretrainJob, checked
from spjax.data.write_records import Utterance, write_unit_records
from spjax.encoders.encoder import Encoder, load_encoder
from spjax.encoders.units import merge
from spjax.io import files, load_kmeans, places, save_kmeans, unit_lms
from spjax.jobs import workdirs
from spjax.tasks import Slot, Task

ENCODER, CLUSTERS = "mfcc", 100
# Fraction of each kind of utterances: those of the demo's tasks, and sentences in English and other languages.
KINDS = {
    "commands": 0.12, "intents": 0.14, "language": 0.10, "accent": 0.10, "voice_activity": 0.06,
    "english": 0.24, "others": 0.24,
}  # fmt: skip
PART = 2000  # utterances a part; one takes 10 ms
FITTED_ON = 1  # parts of train used to fit k-means: 250,000 frames
_RESAMPLED = 0.4  # fraction of utterances played slower or faster, to vary vocal tract length
_RATES = (0.87, 1.14)
_ROOMS = 0.15  # fraction of utterances with room reverberation
_SPLITS = ("train", "valid")


@dataclasses.dataclass(frozen=True)
class SpeechConfig:
    """Amount of synthesised speech.

    Attributes:
      train, valid: utterances of each split.
      seed: of the utterances; voices always are those of the demo's seed 0.
    """

    train: int = 104_000
    valid: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        for split in _SPLITS:
            if getattr(self, split) < 1:
                raise ValueError(f"speech: {split} is {getattr(self, split)}, must be at least 1")


class Synthesised(NamedTuple):
    """An utterance: kind, language, voice ("" for noise), text and waveform (float32 [n] at 16 kHz)."""

    kind: str
    language: str
    voice: str
    text: str
    wave: np.ndarray


def utterance(config: SpeechConfig, split: str, number: int) -> Synthesised:
    """Synthesises the number-th utterance of a split."""
    from spjax.encoders.audio import SAMPLE_RATE, prepare

    rng = np.random.default_rng([config.seed, _SPLITS.index(split), number])
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    line = _line(kind, rng)
    voices = synthesize.split_voices(split, 0)
    known = voices[line.gender] if line.gender else [*voices["female"], *voices["male"]]
    voice = known[int(rng.integers(len(known)))] if line.text else ""
    wave = synthesize.utterance(line, voice, rng)
    if rng.random() < _ROOMS:
        wave = _in_room(wave, rng)
    rate = int(SAMPLE_RATE * rng.uniform(*_RATES)) if rng.random() < _RESAMPLED else SAMPLE_RATE
    return Synthesised(kind, line.language if line.text else "none", voice, line.text, prepare(wave, rate).wave)


def _line(kind: str, rng: np.random.Generator) -> Line:
    if kind in spoken_tasks.TASKS:
        return spoken_tasks.lines(kind, rng)[0]
    languages = sentences.ENGLISH if kind == "english" else sentences.OTHERS
    return sentences.line(languages[int(rng.integers(len(languages)))], rng)


def _in_room(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds a reverberation of 0.1 to 0.5 s (60 dB decay) to an int16 waveform; the length is kept."""
    from scipy.signal import fftconvolve

    seconds = rng.uniform(0.1, 0.5)
    time = np.arange(int(seconds * synthesize.RATE)) / synthesize.RATE
    echo = rng.standard_normal(len(time)) * 10 ** (-3 * time / seconds) * rng.uniform(0.02, 0.15)
    echo[0] = 1
    wet = fftconvolve(wave.astype(np.float64), echo)[: len(wave)]
    return np.round(wet / np.abs(wet).max() * np.abs(wave.astype(np.int32)).max()).astype(np.int16)


# ---- parts


def _part(folder: str, config: SpeechConfig, split: str, part: int, kmeans: str | None) -> str:
    """Writes a part: the units of its utterances, or their features if there is no k-means."""
    from threadpoolctl import threadpool_limits

    path = _path(folder, split, part, kmeans is None)
    encoder = load_encoder(ENCODER, kmeans)
    kinds, lengths, ids, arrays = [], [], [], []
    with threadpool_limits(1):
        for number in range(part * PART, min((part + 1) * PART, getattr(config, split))):
            made = utterance(config, split, number)
            frames = _features(encoder, made.wave) if kmeans is None else merge(_units(encoder, made.wave))[0]
            arrays.append(frames.astype(np.float32 if kmeans is None else np.int16))
            kinds.append(made.kind)
            lengths.append(len(frames))
            ids.append("\t".join((f"{split}-{number:06d}", made.language, made.voice, made.text)))
    content = io.BytesIO()
    np.savez(content, kinds=kinds, lengths=lengths, ids=ids, flat=np.concatenate(arrays))
    files.write_file(path, content.getvalue())
    return path


def _features(encoder: Encoder, wave: np.ndarray) -> np.ndarray:
    return encoder.features([wave])[0]


def _units(encoder: Encoder, wave: np.ndarray) -> np.ndarray:
    return encoder.units([wave])[0]


def _path(folder: str, split: str, part: int, features: bool) -> str:
    return os.path.join(folder, f"{split}-{part:04d}{'-features' if features else ''}.npz")


def _make_parts(folder: str, config: SpeechConfig, wanted: list[tuple[str, int]], kmeans: str | None) -> None:
    """Makes the missing parts, one process a core."""
    missing = [one for one in wanted if not os.path.exists(_path(folder, *one, kmeans is None))]
    if not missing:
        return
    espeak.data_path()
    with process.worker_pool(min(len(missing), os.cpu_count() or 1), max_tasks_per_child=1) as pool:
        jobs = [pool.submit(_part, folder, config, split, part, kmeans) for split, part in missing]
        done = concurrent.futures.as_completed(jobs)
        for job in tqdm(done, total=len(jobs), desc="synthesis", unit=f" x {PART:,} utterances", leave=False):
            job.result()


def _numbers(config: SpeechConfig, split: str) -> range:
    return range(-(-getattr(config, split) // PART))


def _read(folder: str, split: str, part: int, features: bool) -> dict[str, Any]:
    path = _path(folder, split, part, features)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("kinds", "lengths", "ids", "flat")}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and run the same command again") from error


# ---- a job's records


def source(job: PretrainJob, workdir: str) -> Source:
    """Makes the source of a pretraining job, whose `data` is WORKDIR/units.

    Raises:
      ValueError: a workdir in a bucket, a multi-stream LM, or tasks that are not kinds of utterances.
    """
    if places.is_remote(workdir):
        raise ValueError(f"--workdir={workdir} is in a bucket, but speech is synthesised locally: give a local one")
    if job.lm.prosody:
        raise ValueError("config.lm has prosody, but this speech has no f0: pretrain a unit LM (backbone=gslm)")
    if unknown := sorted(set(job.tasks) - set(KINDS)):
        raise ValueError(f"config.tasks has {', '.join(unknown)}: choose among {', '.join(KINDS)}")
    speech = SpeechConfig(**checked(SpeechConfig, job.speech or {}, "speech."))
    return Source(
        dataclasses.replace(job, data=os.path.join(workdir, "units")),
        lambda kind, directory: records(workdir, kind, directory, speech),
        lambda: write_assets(job, speech, workdir),
    )


def records(workdir: str, kind: str, directory: str, config: SpeechConfig) -> None:
    """Writes the unit records of one kind of utterances; the units of all kinds are made first, in WORKDIR/parts.

    Raises:
      MissingExtraError: espeak-ng is not installed.
      ValueError: WORKDIR/parts are of another config, damaged, or have no utterance of this kind.
    """
    folder, centroids = os.path.join(workdir, "parts"), os.path.join(workdir, "kmeans")
    _claim(folder, config)
    if not os.path.exists(centroids):
        _fit(folder, config, centroids)
    parts = [(split, part) for split in _SPLITS for part in _numbers(config, split)]
    _make_parts(folder, config, parts, centroids)
    languages = ("none", *sentences.LANGUAGES)
    task = Task(kind, (Slot("language", languages),))
    splits = {
        split: list(_utterances(folder, [part for of, part in parts if of == split], split, kind, task))
        for split in _SPLITS
    }
    for split, some in splits.items():
        if not some:
            raise ValueError(
                f"none of the {getattr(config, split)} utterances of {split} is of kind {kind}: give more by "
                f"--config.speech.{split}, or leave {kind} out of config.tasks"
            )
    write_unit_records(
        directory, task, splits, vocabulary=CLUSTERS, encoder=ENCODER, layer=0, kmeans=load_kmeans(centroids).id,
        notes=("speech synthesised by espeak-ng",),
    )  # fmt: skip


def _claim(folder: str, config: SpeechConfig) -> None:
    """Records the config of the parts, or checks that it is the same."""
    path, wanted = os.path.join(folder, "config.json"), {**dataclasses.asdict(config), "part": PART, "kinds": KINDS}
    if not os.path.exists(path):
        workdirs.write_json(path, wanted)
    elif (found := workdirs.read_json(path)) != wanted:
        raise ValueError(f"{folder} was made with {found}, not {wanted}: remove it, or use another --workdir")


def _fit(folder: str, config: SpeechConfig, centroids: str) -> None:
    from spjax.encoders.kmeans import fit

    parts = [("train", part) for part in _numbers(config, "train")[:FITTED_ON]]
    _make_parts(folder, config, parts, None)
    read = [_read(folder, *part, True) for part in parts]
    fitted_on = {
        "data": "synthesised speech: " + ", ".join(KINDS),
        "split": "train",
        "utterances": sum(len(part["lengths"]) for part in read),
    }
    card = {"encoder": ENCODER, "layer": None, "fitted_on": fitted_on}
    save_kmeans(centroids, fit((part["flat"] for part in read), CLUSTERS, seed=config.seed, card=card))
    for part in parts:
        os.remove(_path(folder, *part, True))


def _utterances(folder: str, parts: list[int], split: str, kind: str, task: Task) -> Iterator[Utterance]:
    labels = task.slots[0].labels
    for part in parts:
        read = _read(folder, split, part, False)
        flat = np.split(read["flat"], np.cumsum(read["lengths"])[:-1])
        for units, of, name in zip(flat, read["kinds"], read["ids"], strict=True):
            if of == kind:
                number, language, voice, text = str(name).split("\t")
                yield Utterance(number, units, [labels.index(language)], provenance=f"{voice}: {text}")


# ---- bundled assets


def write_assets(job: PretrainJob, speech: SpeechConfig, workdir: str) -> None:
    """Writes the content of spjax/assets/tiny to WORKDIR/assets: LM in bfloat16, k-means, log and README."""
    import jax

    if jax.process_index() > 0:
        return
    out, log = os.path.join(workdir, "assets"), Path(workdir, "log.jsonl").read_bytes()
    kmeans = load_kmeans(os.path.join(workdir, "kmeans"))
    save_kmeans(os.path.join(out, "kmeans"), kmeans)
    lm_config, params, info = unit_lms.read_unit_lm(os.path.join(workdir, "lm"))
    provenance = info["provenance"]
    provenance["config"]["data"] = "units"  # instead of a path on this machine
    identity = unit_lms.save_unit_lm(os.path.join(out, "lm"), lm_config, params, provenance, bfloat16=True)
    files.write_file(os.path.join(out, "log.jsonl"), log)
    facts = {
        "unit LM": f"{lm_config.num_params:,} parameters, bfloat16, hash {identity}",
        "k-means": f"{CLUSTERS} clusters of {ENCODER}, hash {kmeans.hash}",
        **_amounts(workdir, speech),
        "made with": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("espeakng-loader", "numpy")),
    }
    rows = [json.loads(line) for line in log.splitlines()]
    hours = (rows[-1]["time"] - rows[0]["time"]) / 3600
    facts["pretraining"] = (
        f"{job.pretrain.epochs} epochs, seed {job.pretrain.seed}, {hours:.1f} h from first to last update"
    )
    files.write_file(os.path.join(out, "README.md"), _readme(facts, job.tasks, rows).encode())
    print(f"files for spjax/assets/tiny: {out}", flush=True)


def _amounts(workdir: str, config: SpeechConfig) -> dict[str, str]:
    """Describes each split: number of utterances, units, sentences, languages and voices."""
    facts = {}
    for split in _SPLITS:
        parts = [_read(os.path.join(workdir, "parts"), split, part, False) for part in _numbers(config, split)]
        texts = [str(name).split("\t")[1:] for part in parts for name in part["ids"]]
        units = sum(int(part["lengths"].sum()) for part in parts)
        sentences_of = {(language, text) for language, _, text in texts if text}
        voices = sorted({voice for _, voice, _ in texts if voice})
        facts[split] = (
            f"{len(texts):,} utterances, {units:,} units, {len(sentences_of):,} different sentences, "
            f"{len({language for language, _, text in texts if text})} languages and accents, "
            f"{len(voices)} voices: {', '.join(voices)}"
        )
    return facts


def _readme(facts: dict[str, str], kinds: Sequence[str], log: list[dict[str, Any]]) -> str:
    lines = [
        "# tiny: a unit LM and its k-means",
        "",
        '`spjax.load_unit_lm("tiny")`, `spjax.load_encoder("tiny")`; `--lm=tiny --encoder=tiny` of spjax.predict.',
        "",
        "Written by `python -m spjax.main --config=configs/pretrain_tiny.py`, which reproduces it. The train voices",
        "are the train voices of the demo (configs/demo.py, seed 0), the valid voices those of its valid split; none",
        "of its test voices was used. With a `synthesis.seed` other than 0 the demo draws other test voices, most of",
        "which were used here.",
        "",
        *(f"- {name}: {fact}" for name, fact in facts.items()),
        "",
        "Perplexity of a unit on valid, by kind of utterance (float32, before rounding):",
        "",
        f"| epoch | {' | '.join(kinds)} | loss (nats) |",
        "|---" * (len(kinds) + 2) + "|",
        *(
            f"| {number} | {' | '.join(format(one['valid/' + kind + '/perplexity'], '.2f') for kind in kinds)} | "
            f"{one['valid/nll']:.3f} |"
            for number, one in enumerate((line for line in log if "valid/nll" in line), 1)
        ),
        "",
    ]
    return "\n".join(lines)
