"""Nine speech tasks made on the spot: what `spoken_tasks` says, by which voice, over which noise.

    python -m data_pipelines.synthesize --out=DIR [--train=1000 --valid=200 --test=300]

writes DIR/TASK/{train,valid,test}/NNNNN.wav (16 kHz, mono, 16 bit) and DIR/TASK/clips.jsonl. No voice speaks in two
splits, nor does a noise sound the same in two. Where a voice says a sentence with every label in turn (melody,
emphasis, style), turns are whole: a split has as many utterances as asked for, or up to three more. A task's corpus
depends on its name, the sizes, the seed and the releases of engine and numpy (which clips.jsonl names): each is made in
a process of its own, since the engine's state outlives an utterance.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take their time
    from spjax import process

    process.run("data_pipelines.synthesize")

import argparse
import concurrent.futures
import dataclasses
import importlib.metadata
import io
import json
import os
import shutil
import sys
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipelines import espeak
from data_pipelines.beam_worker import die_with
from data_pipelines.clips import Clip, Splits
from data_pipelines.spoken_tasks import TASKS, Line, lines
from spjax import paths, process
from spjax.command_line import Parser, local_output

RATE = 16_000
_VOICE_SHARES = {"train": 0.6, "valid": 0.15, "test": 0.25}
_MARGIN = 0.06  # seconds of pause kept before and after speech


@dataclasses.dataclass(frozen=True)
class SynthesisConfig:
    """How much speech is made. Utterances of each split of each task, rounded up to whole turns."""

    train: int = 1000
    valid: int = 200
    test: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        for split in _VOICE_SHARES:
            if getattr(self, split) < 1:
                raise ValueError(f"synthesis: {split} is {getattr(self, split)}, must be at least 1")


# ---- what is heard


def split_voices(split: str, seed: int) -> dict[str, list[str]]:
    """The voices of a split by gender; those of all splits together are all there are."""
    mine = {}
    for gender, names in espeak.voices().items():
        order = np.random.default_rng([seed, len(names)]).permutation(len(names))
        stops = np.round(np.cumsum([0, *_VOICE_SHARES.values()]) * len(names)).astype(int)
        number = list(_VOICE_SHARES).index(split)
        mine[gender] = [names[i] for i in sorted(order[stops[number] : stops[number + 1]])]
    return mine


def _noise(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Coloured noise that may swell, with hum, clicks or a passing tone; float64 [n], rms 1."""
    size = 1 << (samples - 1).bit_length()  # of other lengths a Fourier transform may take many times as long
    spectrum = np.fft.rfft(rng.standard_normal(size))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1) ** -rng.uniform(0, 1.2)  # white to brown
    wave = np.fft.irfft(spectrum, size)[:samples]
    wave /= wave.std()
    time = np.arange(samples) / RATE
    wave *= 1 + rng.uniform(0, 0.9) * np.sin(2 * np.pi * (rng.uniform(0.3, 6) * time + rng.random()))
    kind = rng.integers(4)
    if kind == 1:  # hum
        base = rng.uniform(50, 180)
        wave += rng.uniform(0.3, 2) * sum(np.sin(2 * np.pi * base * k * time) / k for k in (1, 2, 3, 5))
    elif kind == 2:  # clicks
        at = rng.integers(0, samples, int(rng.integers(3, 40)))
        clicks = np.zeros(samples)
        clicks[at] = rng.uniform(5, 25, len(at)) * rng.choice([-1, 1], len(at))
        wave += np.convolve(clicks, np.exp(-np.arange(200) / rng.uniform(3, 40)), "same")
    elif kind == 3:  # a tone that glides
        pitch = np.linspace(rng.uniform(200, 3000), rng.uniform(200, 3000), samples)
        wave += rng.uniform(0.5, 2) * np.sin(2 * np.pi * np.cumsum(pitch) / RATE)
    return wave / wave.std()


def _spoken(line: Line, voice: str, rng: np.random.Generator) -> np.ndarray:
    """The line said, at 16 kHz, without the engine's long pauses; float64 [n]."""
    from spjax.speech2unit.audio import prepare

    manner = espeak.Manner(*(int(rng.integers(*bounds)) for bounds in (line.rate, (35, 66), line.range)))
    raw = espeak.say(line.text, line.language, voice, manner, int(rng.integers(2**31)))
    wave = prepare(raw, espeak.sample_rate()).wave.astype(np.float64)
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    margin = int(_MARGIN * RATE)
    return wave[max(loud[0] - margin, 0) : loud[-1] + margin]


def utterance(line: Line, voice: str, rng: np.random.Generator) -> np.ndarray:
    """The wave of a line: int16 [n] at 16 kHz, somewhere between quiet and loud."""
    if line.text:
        speech = _spoken(line, voice, rng)
        if line.labels == ("speech",):  # a crop, as long as those of noise
            size = min(len(speech), int(rng.uniform(0.6, 1.2) * RATE))
            start = int(rng.integers(len(speech) - size + 1))
            speech = speech[start : start + size]
        noise = _noise(rng, len(speech)) * speech.std() / 10 ** (rng.uniform(*line.snr) / 20)
        wave = speech + noise
    else:
        wave = _noise(rng, int(rng.uniform(0.6, 1.2) * RATE))
    return np.round(wave / np.abs(wave).max() * rng.uniform(0.1, 0.9) * 32767).astype(np.int16)


def _said(name: str, number: int, split: str, config: SynthesisConfig) -> Iterator[tuple[Line, str, np.ndarray]]:
    """Line, voice and wave of each utterance of a task's split, which is the number-th."""
    voices, made = split_voices(split, config.seed), 0
    while made < getattr(config, split):
        rng = np.random.default_rng([config.seed, zlib.crc32(name.encode()), number, made])
        turn = lines(name, rng)
        known = voices[turn[0].gender] if turn[0].gender else [*voices["female"], *voices["male"]]
        if len(turn) > 1:  # else any voice will do
            known = [voice for voice in known if voice not in espeak.REVERSED]
        voice = known[int(rng.integers(len(known)))] if turn[0].text else ""
        for line in turn:
            yield line, voice, utterance(line, voice, rng)
        made += len(turn)


def _make_task(name: str, out: str, config: SynthesisConfig) -> str:
    """Write a task's corpus to OUT/NAME: whole, or not at all."""
    import soundfile

    final = Path(out) / name
    fresh = final.with_name(f".{name}.{uuid.uuid4().hex}.tmp")
    clips: dict[str, list[Clip]] = {}
    try:
        with tqdm(total=config.train + config.valid + config.test, desc=f"speaking: {name}", unit="utt") as bar:
            for number, split in enumerate(_VOICE_SHARES):
                (fresh / split).mkdir(parents=True)
                clips[split] = []
                for i, (line, voice, wave) in enumerate(_said(name, number, split, config)):
                    path = f"{split}/{i:05d}.wav"
                    content = io.BytesIO()  # written to a path, every file would be waited for until it is on the disk
                    soundfile.write(content, wave, RATE, format="WAV", subtype="PCM_16")
                    (fresh / path).write_bytes(content.getbuffer())
                    clips[split].append(Clip(path, path, line.labels, speaker=voice))
                    bar.update()
        lines = [
            json.dumps({"split": split, **clip._asdict()}, ensure_ascii=False)
            for split, some in clips.items()
            for clip in some
        ]
        made_with = {name: importlib.metadata.version(name) for name in ("espeakng-loader", "numpy")}
        head = json.dumps({"config": dataclasses.asdict(config), "made_with": made_with})
        (fresh / "clips.jsonl").write_text("\n".join([head, *lines, ""]))
        fresh.rename(final)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return name


def synthesize(out: str | os.PathLike[str], config: SynthesisConfig, tasks: Sequence[str] = tuple(TASKS)) -> None:
    """Make the corpora of the tasks that OUT does not hold yet, several at once.

    Raises:
      SpeechError: the engine is not installed.
      ValueError: a task that is not one of `TASKS`, or a corpus of another config is in the way.
    """
    espeak.data_path()
    check(out, config, tasks)
    missing = [name for name in tasks if not (Path(out) / name).exists()]
    if not missing:
        return
    Path(out).mkdir(parents=True, exist_ok=True)
    for half in Path(out).glob(".*.tmp"):  # of a run that was killed
        shutil.rmtree(half, ignore_errors=True)
    processes = min(len(missing), os.cpu_count() or 1)
    settings = {"initializer": die_with, "initargs": (os.getpid(),), "max_tasks_per_child": 1}
    with process.worker_pool(processes, **settings) as pool:
        for made in concurrent.futures.as_completed([pool.submit(_make_task, n, str(out), config) for n in missing]):
            made.result()


def check(out: str | os.PathLike[str], config: SynthesisConfig, tasks: Sequence[str]) -> None:
    """Whether OUT can hold, or holds, the corpora of these tasks.

    Raises:
      ValueError: a task that is not one of `TASKS`, or a corpus of another config is in the way.
    """
    for name in tasks:
        if name not in TASKS:
            raise ValueError(f"task {name!r} is not synthesised: choose {', '.join(TASKS)}")
        if (Path(out) / name).exists():
            _check_config(Path(out) / name, config)


def _check_config(corpus: Path, config: SynthesisConfig) -> None:
    found = json.loads((corpus / "clips.jsonl").read_text().split("\n", 1)[0])["config"]
    if found != dataclasses.asdict(config):
        raise ValueError(
            f"{corpus} was made with {found}, not {dataclasses.asdict(config)}: remove it, or go elsewhere"
        )


def clips(corpus: str | os.PathLike[str]) -> Splits:
    """The clips of a task's corpus, OUT/TASK."""
    splits: Splits = {split: [] for split in _VOICE_SHARES}
    for line in (Path(corpus) / "clips.jsonl").read_text().splitlines()[1:]:
        row = json.loads(line)
        split = row.pop("split")
        splits[split].append(Clip(**{**row, "labels": tuple(row["labels"])}))
    return splits


def main(argv: Sequence[str] | None = None) -> None:
    """The command line (`--help`)."""
    default = SynthesisConfig()
    parser = Parser(
        prog="python -m data_pipelines.synthesize", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=local_output, required=True, help="directory of the corpora")
    parser.add_argument("--tasks", default=",".join(TASKS), help="with commas (%(default)s)")
    for field in dataclasses.fields(SynthesisConfig):
        parser.add_argument(f"--{field.name}", type=int, default=getattr(default, field.name), help="(%(default)s)")
    args = vars(parser.parse_args(argv))
    out, tasks = args.pop("out"), args.pop("tasks").split(",")
    try:
        with paths.writing(out):
            synthesize(out, SynthesisConfig(**args), tasks)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
