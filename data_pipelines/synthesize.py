"""Six speech tasks made on the spot: what is said, in which language and accent, by which voice, over which noise.

    python -m data_pipelines.synthesize --out=DIR [--train=1000 --valid=200 --test=300]

writes DIR/TASK/{train,valid,test}/NNNNN.wav (16 kHz, mono, 16 bit) and DIR/TASK/clips.jsonl. No voice speaks in two
splits, nor does a noise sound the same in two. A task's corpus depends on its name, the sizes, the seed and the
releases of engine and numpy (which clips.jsonl names): each is made in a process of its own, since the engine's state
outlives an utterance.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.metadata
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import uuid
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipelines import espeak
from data_pipelines.beam_worker import die_with
from data_pipelines.clips import Clip, Splits
from spjax.tasks import Slot, Task

RATE = 16_000
_VOICE_SHARES = {"train": 0.6, "valid": 0.15, "test": 0.25}
_MARGIN = 0.06  # seconds of pause kept before and after speech


@dataclasses.dataclass(frozen=True)
class SynthesisConfig:
    """How much speech is made. Utterances of each split of each task."""

    train: int = 1000
    valid: int = 200
    test: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        for split in _VOICE_SHARES:
            if getattr(self, split) < 1:
                raise ValueError(f"synthesis: {split} is {getattr(self, split)}, must be at least 1")


class Line(NamedTuple):
    """What is to be heard in an utterance.

    Attributes:
      labels: of the task's slots.
      text: what is said; "" for noise alone.
      language: language and accent, as the engine names them.
      gender: of the voice; "" for either.
      snr: speech over noise, in dB.
    """

    labels: tuple[str, ...]
    text: str = ""
    language: str = "en-us"
    gender: str = ""
    snr: tuple[float, float] = (20.0, 40.0)


# ---- the tasks: a row, and what an utterance of it says


def _list(text: str) -> tuple[str, ...]:
    return tuple(one.strip() for one in text.split(","))


_COMMANDS = _list("yes, no, up, down, left, right, on, off, stop, go")
_OTHERS = _list(
    "bed, bird, cat, dog, happy, house, marvin, sheila, tree, zero, one, two, three, four, five, six, seven, eight, "
    "nine, bread, river, table, yellow, music, paper, window, apple, garden, orange, letter, morning"
)
_WHERE = ("kitchen", "bedroom", "washroom")
_INTENTS: tuple[tuple[str, str, str], ...] = (
    *((action, "lights", place) for action in ("activate", "deactivate") for place in ("none", *_WHERE)),
    *((action, thing, "none") for action in ("activate", "deactivate") for thing in ("music", "lamp")),
    *((action, "heat", place) for action in ("increase", "decrease") for place in ("none", *_WHERE)),
    *((action, "volume", "none") for action in ("increase", "decrease")),
    *(("bring", thing, "none") for thing in ("newspaper", "juice", "socks", "shoes")),
    *(("bring", thing, "bedroom") for thing in ("socks", "shoes", "newspaper")),
    *(("bring", thing, "kitchen") for thing in ("juice", "newspaper")),
)
_PHRASES = {
    "activate": ("turn on the {0}", "switch on the {0}", "{0} on", "put the {0} on", "start the {0}"),
    "deactivate": ("turn off the {0}", "switch off the {0}", "{0} off", "put the {0} out", "stop the {0}"),
    "increase": ("turn up the {0}", "raise the {0}", "more {0}", "increase the {0}", "{0} up"),
    "decrease": ("turn down the {0}", "lower the {0}", "less {0}", "decrease the {0}", "{0} down"),
    "bring": ("bring me the {0}", "get me my {0}", "fetch the {0}", "go get the {0}", "bring my {0}"),
}
_PLACES = {"increase": "in", "decrease": "in", "activate": "in", "deactivate": "in", "bring": "from"}
_LANGUAGES = {
    "german": "de", "english": "en-us", "spanish": "es", "french": "fr", "italian": "it", "dutch": "nl",
    "lithuanian": "lt", "russian": "ru",
}  # fmt: skip
_ACCENTS = {
    "american": "en-us", "british": "en-gb-x-rp", "caribbean": "en-029", "lancastrian": "en-gb-x-gbclan",
    "scottish": "en-gb-scotland",
}  # fmt: skip
_WHO = _list(
    "my father, the girl, her brother, our teacher, the farmer, a dancer, the doctor, that woman, the driver, his uncle"
)
_DOES = _list("took, heard about, asked for, walked past, bought, forgot, carried, turned over, laughed at")
_WHAT = _list(
    "the water, a new car, the last letter, the old house, a warm bath, the garden path, another dance, the north road,"
    "a hot coffee, the market, thirty birds, a better idea, the first class, an early start, the corner shop, the park"
)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _commands(rng: np.random.Generator) -> Line:
    word = _pick(rng, [*_COMMANDS, "_unknown_"])
    return Line((word,), _pick(rng, _OTHERS) if word == "_unknown_" else word)


def _intents(rng: np.random.Generator) -> Line:
    action, thing, place = _INTENTS[int(rng.integers(len(_INTENTS)))]
    where = "" if place == "none" else f" {_PLACES[action]} the {place}"
    return Line((action, thing, place), _pick(rng, _PHRASES[action]).format(thing) + where)


def _language(rng: np.random.Generator) -> Line:
    name = _pick(rng, list(_LANGUAGES))
    return Line((name,), str(int(10 ** rng.uniform(1, 3))), _LANGUAGES[name])  # a number is a text in every language


def _sentence(rng: np.random.Generator) -> str:
    return f"{_pick(rng, _WHO)} {_pick(rng, _DOES)} {_pick(rng, _WHAT)}"


def _gender(rng: np.random.Generator) -> Line:
    gender = _pick(rng, ["female", "male"])
    return Line((gender,), _sentence(rng), "en-us", gender)


def _accent(rng: np.random.Generator) -> Line:
    name = _pick(rng, list(_ACCENTS))
    return Line((name,), _sentence(rng), _ACCENTS[name])


def _voice_activity(rng: np.random.Generator) -> Line:
    if rng.random() < 0.5:
        return Line(("background",))
    return Line(("speech",), _sentence(rng), _pick(rng, list(_LANGUAGES.values())), snr=(3.0, 25.0))


def _slot(name: str, labels: Sequence[str]) -> tuple[Slot, ...]:
    return (Slot(name, tuple(labels)),)


_DRAW: dict[str, tuple[Task, Callable[[np.random.Generator], Line]]] = {
    task.name: (task, draw)
    for task, draw in (
        (Task("commands", _slot("command", [*_COMMANDS, "_unknown_"])), _commands),
        (
            Task(
                "intents",
                tuple(
                    Slot(name, tuple(dict.fromkeys(intent[slot] for intent in _INTENTS)))
                    for slot, name in enumerate(("action", "object", "location"))
                ),
                metric="exact_match",
            ),
            _intents,
        ),
        (Task("language", _slot("language", sorted(_LANGUAGES))), _language),
        (Task("gender", _slot("gender", ["female", "male"])), _gender),
        (Task("accent", _slot("accent", sorted(_ACCENTS))), _accent),
        (Task("voice_activity", _slot("sound", ["background", "speech"])), _voice_activity),
    )
}
TASKS: dict[str, Task] = {name: task for name, (task, _) in _DRAW.items()}


# ---- what is heard


def _voices(split: str, seed: int) -> dict[str, list[str]]:
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

    manner = espeak.Manner(int(rng.integers(140, 200)), int(rng.integers(35, 66)), int(rng.integers(35, 66)))
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


def _make_task(name: str, out: str, config: SynthesisConfig) -> str:
    """Write a task's corpus to OUT/NAME: whole, or not at all."""
    import soundfile

    final = Path(out) / name
    fresh = final.with_name(f".{name}.{uuid.uuid4().hex}.tmp")
    _, draw = _DRAW[name]
    clips: dict[str, list[Clip]] = {}
    try:
        with tqdm(total=config.train + config.valid + config.test, desc=f"speaking: {name}", unit="utt") as bar:
            for number, split in enumerate(_VOICE_SHARES):
                (fresh / split).mkdir(parents=True)
                voices = _voices(split, config.seed)
                clips[split] = []
                for i in range(getattr(config, split)):
                    rng = np.random.default_rng([config.seed, zlib.crc32(name.encode()), number, i])
                    line = draw(rng)
                    known = voices[line.gender] if line.gender else [*voices["female"], *voices["male"]]
                    voice = _pick(rng, known) if line.text else ""
                    wave = utterance(line, voice, rng)
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
    context, processes = multiprocessing.get_context("spawn"), min(len(missing), os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(
        processes, context, _start_worker, (os.getpid(),), max_tasks_per_child=1
    ) as pool:
        try:
            for made in concurrent.futures.as_completed(
                [pool.submit(_make_task, n, str(out), config) for n in missing]
            ):
                made.result()
        except BaseException:  # Ctrl-C must not wait for what the workers are at
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _start_worker(launcher: int) -> None:
    """Ctrl-C is the launcher's affair; and a worker ends with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(launcher)


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
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.synthesize", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", required=True, help="directory of the corpora")
    parser.add_argument("--tasks", default=",".join(TASKS), help="with commas (%(default)s)")
    for field in dataclasses.fields(SynthesisConfig):
        parser.add_argument(f"--{field.name}", type=int, default=getattr(default, field.name), help="(%(default)s)")
    args = vars(parser.parse_args(argv))
    out, tasks = args.pop("out"), args.pop("tasks").split(",")
    try:
        synthesize(out, SynthesisConfig(**args), tasks)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
