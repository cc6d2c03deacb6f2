"""A small synthetic corpus of speech-like tones, for the tests of extraction and of k-means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from data_pipelines.clips import Clip, Splits
from spjax.tasks import TASKS, Slot, Task
from tests import toy

TASK = Task("toy", (Slot("pitch", ("low", "high")), Slot("noise", ("none", "some"))), "exact_match")
COUNTS = {"train": 100, "valid": 30, "test": 20}


def tone(number: int, seconds: float, rate: int) -> np.ndarray:
    """float [n]: a gliding tone with overtones, high for odd numbers, noisy for every third."""
    rng = np.random.default_rng(number)
    t = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum((220 if number % 2 else 120) * (1 + 0.3 * np.sin(7 * t + number))) / rate
    wave = sum(np.sin(k * phase) / k for k in range(1, 8)) * np.exp(-((t / seconds - 0.5) ** 2) * 6)
    noise = rng.standard_normal(len(t)) * (0.5 if number % 3 == 0 else 0.01)
    return 0.1 * (wave + noise)


def make_corpus(raw: Path, counts: dict[str, int] | None = None) -> Splits:
    """Writes recordings under `raw` and lists them: three speakers, two rates, crops of a long file."""
    raw.mkdir(parents=True, exist_ok=True)
    splits: Splits = {}
    number = 0
    for split, count in (counts or COUNTS).items():
        splits[split] = []
        for _ in range(count):
            rate = 8000 if number % 5 == 0 else 16000
            wave = tone(number, 0.25 + 0.01 * (number * 7 % 40), rate)
            soundfile.write(raw / f"{number:03d}.wav", wave, rate)
            labels = ("high" if number % 2 else "low", "some" if number % 3 == 0 else "none")
            splits[split].append(
                Clip(f"{number:03d}", f"{number:03d}.wav", labels, speaker=("", "a", "b", "c")[number % 4])
            )
            number += 1
    soundfile.write(raw / "long.flac", np.concatenate([tone(i, 0.5, 16000) for i in range(4)]), 16000)
    crops = [Clip(f"long@{i}", "long.flac", ("low", "none"), start=i / 2, duration=0.5) for i in range(4)]
    splits["train"] += crops
    return splits


def fsc_tree(raw: Path) -> None:
    """Writes tones in the layout of Fluent Speech Commands."""
    classes = TASKS["fsc"].classes
    number = 0
    for split, count in {"train": 24, "valid": 8, "test": 8}.items():
        lines = [",path,speakerId,transcription,action,object,location"]
        for i in range(count):
            path = f"wavs/speakers/{split}/{number:03d}.wav"
            (raw / path).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(raw / path, tone(number, 0.4, 16_000), 16_000)
            labels = [classes[c][1] for c in toy.COMBINATIONS["fsc"][i % len(toy.COMBINATIONS["fsc"])]]
            lines.append(",".join([str(i), path, split, "words", *labels]))
            number += 1
        (raw / "data").mkdir(exist_ok=True)
        (raw / "data" / f"{split}_data.csv").write_text("\n".join(lines) + "\n")
