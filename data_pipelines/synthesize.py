"""Synthesises nine speech tasks: the utterances of `spoken_tasks`, in many voices, with noise.

    python -m data_pipelines.synthesize --out=DIR [--train=1000 --valid=200 --test=300]

writes DIR/TASK/{train,valid,test}/NNNNN.wav (16 kHz, mono, 16 bit) and DIR/TASK/clips.jsonl. No voice and no noise is
in two splits. Where a voice says a sentence once with every label (melody, emphasis, style), these stay together, so a
split may have up to three more utterances than requested. A task's corpus depends on its name, the sizes, the seed and
the versions of espeak-ng and numpy (in clips.jsonl); each is made in a separate process, since the engine keeps state
between utterances.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from spjax import process

    process.run("data_pipelines.synthesize")

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
from data_pipelines.clips import Clip, Splits
from data_pipelines.spoken_tasks import TASKS, Line, lines
from spjax import paths, process
from spjax.command_line import Parser, local_output

RATE = 16_000
_VOICE_SHARES = {"train": 0.6, "valid": 0.15, "test": 0.25}
_MARGIN = 0.06  # seconds of silence kept before and after speech


@dataclasses.dataclass(frozen=True)
class SynthesisConfig:
    """Number of utterances of each split of each task; rounded up to complete sets of labels."""

    train: int = 1000
    valid: int = 200
    test: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        for split in _VOICE_SHARES:
            if getattr(self, split) < 1:
                raise ValueError(f"synthesis: {split} is {getattr(self, split)}, must be at least 1")


# ---- audio


def split_voices(split: str, seed: int) -> dict[str, list[str]]:
    """Returns the voices of a split by gender; the splits partition all voices."""
    mine = {}
    for gender, names in espeak.voices().items():
        order = np.random.default_rng([seed, len(names)]).permutation(len(names))
        stops = np.round(np.cumsum([0, *_VOICE_SHARES.values()]) * len(names)).astype(int)
        number = list(_VOICE_SHARES).index(split)
        mine[gender] = [names[i] for i in sorted(order[stops[number] : stops[number + 1]])]
    return mine


def _noise(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Makes coloured, amplitude-modulated noise with hum, clicks or a gliding tone; float64 [n], rms 1."""
    size = 1 << (samples - 1).bit_length()  # a power of two, for which an FFT is fast
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
    elif kind == 3:  # gliding tone
        pitch = np.linspace(rng.uniform(200, 3000), rng.uniform(200, 3000), samples)
        wave += rng.uniform(0.5, 2) * np.sin(2 * np.pi * np.cumsum(pitch) / RATE)
    return wave / wave.std()


def _speech(line: Line, voice: str, rng: np.random.Generator) -> np.ndarray:
    """Synthesises a line at 16 kHz, without the engine's long pauses; float64 [n]."""
    from spjax.encoders.audio import prepare

    manner = espeak.Manner(*(int(rng.integers(*bounds)) for bounds in (line.rate, (35, 66), line.range)))
    raw = espeak.say(line.text, line.language, voice, manner, int(rng.integers(2**31)))
    wave = prepare(raw, espeak.sample_rate()).wave.astype(np.float64)
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    margin = int(_MARGIN * RATE)
    return wave[max(loud[0] - margin, 0) : loud[-1] + margin]


def utterance(line: Line, voice: str, rng: np.random.Generator) -> np.ndarray:
    """Synthesises the waveform of a line, with random level: int16 [n] at 16 kHz."""
    if line.text:
        speech = _speech(line, voice, rng)
        if line.labels == ("speech",):  # cropped to the length of noise utterances
            size = min(len(speech), int(rng.uniform(0.6, 1.2) * RATE))
            start = int(rng.integers(len(speech) - size + 1))
            speech = speech[start : start + size]
        noise = _noise(rng, len(speech)) * speech.std() / 10 ** (rng.uniform(*line.snr) / 20)
        wave = speech + noise
    else:
        wave = _noise(rng, int(rng.uniform(0.6, 1.2) * RATE))
    return np.round(wave / np.abs(wave).max() * rng.uniform(0.1, 0.9) * 32767).astype(np.int16)


def _utterances(name: str, number: int, split: str, config: SynthesisConfig) -> Iterator[tuple[Line, str, np.ndarray]]:
    """Yields line, voice and waveform of each utterance of a task in split number `number`."""
    voices, made = split_voices(split, config.seed), 0
    while made < getattr(config, split):
        rng = np.random.default_rng([config.seed, zlib.crc32(name.encode()), number, made])
        drawn = lines(name, rng)
        known = voices[drawn[0].gender] if drawn[0].gender else [*voices["female"], *voices["male"]]
        if len(drawn) > 1:  # the label is in the prosody
            known = [voice for voice in known if voice not in espeak.REVERSED]
        voice = known[int(rng.integers(len(known)))] if drawn[0].text else ""
        for line in drawn:
            yield line, voice, utterance(line, voice, rng)
        made += len(drawn)


def _make_task(name: str, out: str, config: SynthesisConfig) -> str:
    """Writes a task's corpus to OUT/NAME, atomically."""
    import soundfile

    final = Path(out) / name
    fresh = final.with_name(f".{name}.{uuid.uuid4().hex}.tmp")
    clips: dict[str, list[Clip]] = {}
    try:
        with tqdm(
            total=config.train + config.valid + config.test, desc=f"synthesis: {name}", unit="utt", leave=False
        ) as bar:
            for number, split in enumerate(_VOICE_SHARES):
                (fresh / split).mkdir(parents=True)
                clips[split] = []
                for i, (line, voice, wave) in enumerate(_utterances(name, number, split, config)):
                    path = f"{split}/{i:05d}.wav"
                    content = io.BytesIO()  # soundfile syncs every file that it writes to a path
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
    """Makes the missing corpora of the tasks in OUT, several at once.

    Raises:
      MissingExtraError: the engine is not installed.
      ValueError: an unknown task, or OUT has a corpus of another config.
    """
    espeak.data_path()
    check(out, config, tasks)
    missing = [name for name in tasks if not (Path(out) / name).exists()]
    if not missing:
        return
    Path(out).mkdir(parents=True, exist_ok=True)
    for half in Path(out).glob(".*.tmp"):  # left by a killed run
        shutil.rmtree(half, ignore_errors=True)
    processes = min(len(missing), os.cpu_count() or 1)
    with process.worker_pool(processes, max_tasks_per_child=1) as pool:
        for made in concurrent.futures.as_completed([pool.submit(_make_task, n, str(out), config) for n in missing]):
            made.result()


def check(out: str | os.PathLike[str], config: SynthesisConfig, tasks: Sequence[str]) -> None:
    """Checks that OUT holds no corpora of the tasks with another config.

    Raises:
      ValueError: an unknown task, or OUT has a corpus of another config.
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
            f"{corpus} was made with {found}, not {dataclasses.asdict(config)}: remove it, or use another directory"
        )


def clips(corpus: str | os.PathLike[str]) -> Splits:
    """Reads the clips of a task's corpus, OUT/TASK."""
    splits: Splits = {split: [] for split in _VOICE_SHARES}
    for line in (Path(corpus) / "clips.jsonl").read_text().splitlines()[1:]:
        row = json.loads(line)
        split = row.pop("split")
        splits[split].append(Clip(**{**row, "labels": tuple(row["labels"])}))
    return splits


def main(argv: Sequence[str] | None = None) -> None:
    """The command line (`--help`)."""
    default = SynthesisConfig()
    parser = Parser(prog="python -m data_pipelines.synthesize", description=__doc__)
    parser.add_argument("--out", type=local_output, required=True, help="directory of the corpora")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated (%(default)s)")
    for field in dataclasses.fields(SynthesisConfig):
        parser.add_argument(f"--{field.name}", type=int, default=getattr(default, field.name), help="(%(default)s)")
    args = vars(parser.parse_args(argv))
    out, tasks = args.pop("out"), args.pop("tasks").split(",")
    try:
        with paths.writing(out):
            synthesize(out, SynthesisConfig(**args), tasks)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
