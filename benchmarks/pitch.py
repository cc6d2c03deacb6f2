"""Race of pitch trackers: `spjax.encoders.prosody.log_f0`, librosa.pyin, and pyworld's DIO and Harvest if installed.

    pip install pyworld "setuptools<81"
    python -m benchmarks.pitch --out pitch.json

All get the same sounds of known pitch, from 60 to 500 Hz in frames every 10 ms with the same centres. Errors are in per
cent of frames, without those within 40 ms of a change between voiced and unvoiced: `voicing`, where a tracker takes
voiced for unvoiced or the reverse; `gross`, where both are voiced and the pitch is wrong by more than half a semitone.
`cents` is the median error of the other voiced frames. Times are for the same minute of sound; the trackers take turns
in every round, and a ratio is of two times in one round.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import common
from spjax.encoders import prosody
from spjax.encoders.audio import SAMPLE_RATE

HOP = 160  # samples
Tracker = Callable[[np.ndarray], np.ndarray]  # wave float32 [n] -> Hz [F], NaN where unvoiced, as of `prosody.log_f0`
Sound = tuple[np.ndarray, np.ndarray]  # wave float32 [n], pitch float64 [n], NaN where unvoiced


def ours(wave: np.ndarray) -> np.ndarray:
    """Tracks pitch by our pYIN."""
    return np.exp(prosody.log_f0(wave, HOP))


def librosa_pyin(wave: np.ndarray) -> np.ndarray:
    """Tracks pitch by librosa's pYIN, with frames of 1024 samples and our probability of voicing without a trough."""
    import librosa

    low, high = prosody.F0_RANGE
    around = np.pad(wave, (512 - 200, 512 - 200))  # frames centred on sample HOP * t + 200
    sizes: dict[str, Any] = {"frame_length": 1024, "hop_length": HOP, "center": False, "no_trough_prob": 0.004}
    return librosa.pyin(around, fmin=low, fmax=high, sr=SAMPLE_RATE, **sizes)[0]


def world(wave: np.ndarray, name: str) -> np.ndarray:
    """Tracks pitch by pyworld's `dio` (refined by its `stonemask`) or `harvest`."""
    import pyworld

    low, high = prosody.F0_RANGE
    late = np.asarray(wave[200:], np.float64)  # frames centred on sample HOP * t
    period = 1000 * HOP / SAMPLE_RATE
    hz, times = getattr(pyworld, name)(late, SAMPLE_RATE, f0_floor=low, f0_ceil=high, frame_period=period)
    if name == "dio":
        hz = pyworld.stonemask(late, hz, times, SAMPLE_RATE)
    return np.where(hz > 0, hz, np.nan)[: (len(wave) - 400) // HOP + 1]


def trackers() -> dict[str, Tracker]:
    """Returns the trackers that are installed, ours first."""
    found: dict[str, Tracker] = {"ours": ours, "librosa.pyin": librosa_pyin}
    if importlib.util.find_spec("pyworld"):
        found["pyworld.dio, stonemask"] = functools.partial(world, name="dio")
        found["pyworld.harvest"] = functools.partial(world, name="harvest")
    return found


def voice(hz: np.ndarray, rng: np.random.Generator, first: int = 1, last: int = 12, tilt: float = 1.0) -> np.ndarray:
    """Synthesises harmonics `first` to `last` of a pitch, amplitude 1 / k ** tilt, random phases; NaN: silent."""
    phase = 2 * np.pi * np.cumsum(np.nan_to_num(hz)) / SAMPLE_RATE
    parts = [np.sin(k * phase + rng.uniform(0, 2 * np.pi)) / k**tilt for k in range(first, last + 1)]
    return np.where(np.isnan(hz), 0, 0.1 * np.sum(parts, axis=0))


def sounds(count: int, seconds: float = 2.0, seed: int = 0) -> dict[str, list[Sound]]:
    """Makes `count` sounds of each kind, with pitches between 65 and 450 Hz."""
    rng = np.random.default_rng(seed)
    n = round(seconds * SAMPLE_RATE)
    t = np.arange(n) / SAMPLE_RATE

    def steady() -> np.ndarray:
        return np.full(n, np.exp(rng.uniform(np.log(65), np.log(450))))

    def glide() -> np.ndarray:
        return np.exp(np.linspace(*rng.uniform(np.log(65), np.log(450), 2), n))

    def intonation() -> np.ndarray:  # of a speaker: slow and fast changes, a tenth of the pitch each
        waves = [0.1 * np.sin(2 * np.pi * (rate * t + rng.uniform())) for rate in (0.7, 3.0)]
        return np.exp(rng.uniform(np.log(80), np.log(330)) + np.sum(waves, axis=0))

    def phrases() -> np.ndarray:  # voiced for 0.3 s, unvoiced for 0.2 s
        return np.where(t % 0.5 < 0.3, intonation(), np.nan)

    def noisy(hz: np.ndarray, decibels: float, slope: float = 0.0) -> Sound:  # slope: 0 white, 1 pink
        wave = voice(hz, rng)
        noise = np.fft.irfft(np.fft.rfft(rng.normal(size=n)) / np.maximum(np.fft.rfftfreq(n), 0.001) ** (slope / 2))
        noise *= np.std(wave[~np.isnan(hz)]) / 10 ** (decibels / 20) / np.std(noise)
        return np.asarray(wave + noise, np.float32), hz

    def clean(hz: np.ndarray, **how: Any) -> Sound:
        return np.asarray(voice(hz, rng, **how) + rng.normal(0, 1e-4, n), np.float32), hz

    kinds: dict[str, Callable[[], Sound]] = {
        "sine": lambda: clean(steady(), last=1),
        "harmonics": lambda: clean(steady()),
        "bright harmonics": lambda: clean(steady(), tilt=0.0),
        "no fundamental": lambda: clean(steady(), first=2),
        "glide": lambda: clean(glide()),
        "intonation": lambda: clean(intonation()),
        "phrases, noise 20 dB below": lambda: noisy(phrases(), 20),
        "phrases, noise 10 dB below": lambda: noisy(phrases(), 10),
        "phrases, noise as loud": lambda: noisy(phrases(), 0),
        "phrases, pink noise 10 dB below": lambda: noisy(phrases(), 10, 1.0),
        "phrases, pink noise as loud": lambda: noisy(phrases(), 0, 1.0),
        "noise": lambda: (np.asarray(rng.normal(0, 0.05, n), np.float32), np.full(n, np.nan)),
    }
    return {name: [make() for _ in range(count)] for name, make in kinds.items()}


def errors(track: Tracker, material: Sequence[Sound]) -> dict[str, float]:
    """Returns voicing errors and gross errors in %, and the median of the others in cents (NaN without any)."""
    pairs = []
    for wave, hz in material:
        found, voiced = track(wave), ~np.isnan(hz)
        centres = np.arange(len(found)) * HOP + 200
        change = np.concatenate([[0], np.flatnonzero(voiced[1:] != voiced[:-1]) + 1, [len(hz)]])
        fair = np.abs(centres[:, None] - change).min(axis=1) > 0.04 * SAMPLE_RATE
        pairs.append(np.stack([found, hz[centres]])[:, fair])
    found, truth = np.concatenate(pairs, axis=1)
    cents = 1200 * np.abs(np.log2(found / truth))  # NaN unless both are voiced
    fine = cents[cents <= 50]
    return {
        "voicing": 100 * float(np.mean(np.isnan(found) != np.isnan(truth))),
        "gross": 100 * float(np.mean(cents > 50)),
        "cents": float(np.median(fine)) if len(fine) else float("nan"),
    }


def main() -> None:
    """Runs the race and prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5, help="sounds of 2 s of each kind")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--out", help="file for the results, JSON")
    args = parser.parse_args()
    racers, material = trackers(), sounds(args.count)
    found = {
        kind: {name: errors(track, some) for name, track in racers.items()}
        for kind, some in tqdm(material.items(), desc="sounds")
    }
    minute = np.concatenate([wave for wave, _ in [*material["intonation"], *material["phrases, noise 20 dB below"]]])
    minute = np.resize(minute, 60 * SAMPLE_RATE)
    times: dict[str, list[float]] = {name: [] for name in racers}
    for turn in tqdm(range(args.rounds), desc="rounds"):
        for name in list(racers)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            racers[name](minute)
            times[name].append(time.perf_counter() - start)
    ratios = {
        name: [one / base for one, base in zip(seconds, times["ours"], strict=True)] for name, seconds in times.items()
    }
    cells = {
        kind: ["{voicing:.1f} / {gross:.1f} / {cents:.1f}".format(**one) for one in by_name.values()]
        for kind, by_name in found.items()
    }
    print(common.table([["voicing % / gross % / cents", *racers], *([kind, *row] for kind, row in cells.items())]))
    print(common.table([["tracker", "s for a minute", "times ours (range)"], *(
        [name, f"{statistics.median(times[name]):.2f}", f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})"]
        for name, r in ratios.items()
    )]))  # fmt: skip
    if args.out:
        result = {"machine": common.machine(), "errors": found, "seconds": times}
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
