"""Extraction of unit records on this machine, with one worker and with two.

    python -m benchmarks.extraction

The recordings are short and synthetic, and each run goes from audio files to finished records. A run of one part a
worker measures the start-up (processes, imports, loading); the speed beyond it is computed from the rest. Runs
alternate, round after round, and their records are checked to be equal byte by byte.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from data_pipelines import parts
from data_pipelines.clips import Clip
from data_pipelines.extract import extract
from data_pipelines.fit_kmeans import fit_kmeans
from spjax.encoders.audio import SAMPLE_RATE
from spjax.encoders.encoder import load_encoder
from spjax.io import save_kmeans
from spjax.tasks import Slot, Task

TASK = Task("noise", (Slot("kind", ("even", "odd")),))


def make_clips(raw: Path, count: int, seconds: float) -> list[Clip]:
    """Writes recordings of noise with varying colour, 0.5 to 1.5 times `seconds` long."""
    import soundfile

    rng = np.random.default_rng(0)
    clips = []
    for number in range(count):
        samples = int(SAMPLE_RATE * seconds * rng.uniform(0.5, 1.5))
        steps = rng.standard_normal(samples)
        wave = steps + np.interp(
            np.arange(samples), np.arange(0, samples, 1600), rng.uniform(-1, 1, -(-samples // 1600))
        ) * (np.roll(steps, 1))
        soundfile.write(raw / f"{number:06d}.wav", 0.1 * wave, SAMPLE_RATE)
        clips.append(Clip(f"{number:06d}", f"{number:06d}.wav", (TASK.slots[0].labels[number % 2],)))
    return clips


def timed(clips: Sequence[Clip], raw: Path, out: Path, **settings: Any) -> common.Result:
    """Runs one extraction; returns its seconds, CPU seconds with workers, and the load from other processes."""
    start, before, spent = time.perf_counter(), common._ticks(os.getpid()), sum(os.times()[:4])
    extract(TASK, {"test": list(clips)}, raw, out, overwrite=True, **settings)
    cpu, after = sum(os.times()[:4]) - spent, common._ticks(os.getpid())
    result: common.Result = {"seconds": time.perf_counter() - start, "cpu": cpu, "utterances": len(clips)}
    if before and after and after[0] > before[0]:
        total, idle = after[0] - before[0], after[1] - before[1]
        result["others"] = max(0.0, 1 - (idle + cpu * os.sysconf("SC_CLK_TCK")) / total)
    return result


def tables(results: dict[str, list[common.Result]], speech: float, workers: Sequence[int]) -> list[str]:
    """Makes the parts of the report. `speech`: seconds of speech an utterance."""
    head = ["s", "s to start", "CPU s", "CPU s to start", "utterances/s beyond", "s of speech/s beyond"]
    times: list[list[object]] = [["workers", *head]]
    for number in workers:
        full, first = results[f"{number} workers"], results[f"{number} workers, start"]
        shown = [f"{common.median(runs, key):.1f}" for key in ("seconds", "cpu") for runs in (full, first)]
        more = full[0]["utterances"] - first[0]["utterances"]
        rate = more / (common.median(full) - common.median(first))
        times.append([number, *shown, f"{rate:.0f}", f"{rate * speech:.0f}"])
    ratios: list[list[object]] = [["workers", "speed-up over one"]]
    for number in workers[1:]:
        seconds = [[result["seconds"] for result in results[f"{n} workers"]] for n in (workers[0], number)]
        ratios.append([number, common.ratio(*seconds)])
    return [common.table(times), common.table(ratios)]


def main(argv: Sequence[str] | None = None) -> None:
    """Makes recordings and alternates between the numbers of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=10_000, help="number of recordings")
    parser.add_argument("--seconds", type=float, default=1.5, help="mean length of a recording")
    parser.add_argument("--encoder", default="mfcc", help="mfcc, log_mel, or an imported encoder's directory")
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="write every run to this JSON file")
    args = parser.parse_args(argv)
    if args.clips <= parts.CLIPS_PER_PART * max(args.workers):
        parser.error(f"--clips={args.clips}: give more than one part ({parts.CLIPS_PER_PART} clips) a worker")
    results: dict[str, list[common.Result]] = {}
    with tempfile.TemporaryDirectory() as folder:
        raw, kmeans, out = (Path(folder) / name for name in ("raw", "kmeans", "records"))
        raw.mkdir()
        clips = make_clips(raw, args.clips, args.seconds)
        fitted = fit_kmeans(clips[:500], raw, load_encoder(args.encoder), clusters=args.clusters)
        save_kmeans(kmeans, fitted)
        made: set[tuple[bytes, ...]] = set()
        settings = {"encoder": args.encoder, "kmeans": kmeans}
        timed(clips[:1], raw, out, workers=0, **settings)  # imports modules before the timed runs
        for number in range(args.rounds):
            for workers in args.workers if number % 2 == 0 else args.workers[::-1]:
                for name, some in (("", clips), (", start", clips[: parts.CLIPS_PER_PART * workers])):
                    shutil.rmtree(out)
                    result = timed(some, raw, out, workers=workers, **settings)
                    results.setdefault(f"{workers} workers{name}", []).append(result)
                    if some is clips:
                        made.add(tuple(path.read_bytes() for path in sorted(out.iterdir())))
        if len(made) > 1:
            raise AssertionError(f"the records of {args.workers} workers differ")
    parts_of_report = tables(results, args.seconds, args.workers)
    common.report("Speech to unit records", args, parts_of_report, results)


if __name__ == "__main__":
    main()
