"""Speed of the record reader compared with training, in utterances a second.

    python -m benchmarks.reader

- `records`: `read_unit_records` of a split with durations, with every check, from files to memory. Once a run.
- `batches`: a plan and its batches, from memory to the input of a step. Once an epoch.
- `training`: one update of one prompt on 32 utterances, by default on the small LM of the published results
  (benchmarks/bank.py); `--dim=1024 --layers=12` for the full-size one.

Each side runs in a separate process; they alternate. The goal, reading at 20 times the speed of training, applies to
the reader, and to reader and batches in sequence.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks import bank, common
from spjax.data import loader, plan
from spjax.data.records import read_unit_records
from spjax.data.write_records import Utterance, write_unit_records

SIDES = ("records", "batches", "training")
GOAL = 20.0
ROWS = 32  # utterances of an update


def write_records(folder: Path, args: argparse.Namespace, seed: int = 0) -> None:
    """Writes records of `args.utterances` utterances of FSC, with `args.units` units ± 50 %."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(args.units // 2, 2 * args.units - args.units // 2 + 1, args.utterances)
    offsets = common.FSC.slot_offsets
    utterances = [
        Utterance(
            id=f"wavs/{number:08x}.wav",
            units=rng.integers(0, 100, length),
            classes=[int(rng.integers(a, b)) for a, b in itertools.pairwise(offsets)],
            durations=rng.integers(1, 9, length),
            provenance=f"wavs/{number:08x}.wav, 16000 Hz",
        )
        for number, length in enumerate(lengths)
    ]
    write_unit_records(folder, common.FSC, {"train": utterances})


def runner(side: str, args: argparse.Namespace) -> Callable[[], common.Result]:
    """Returns the timed run of a side."""
    if side == "training":
        return bank.runner("one", argparse.Namespace(**{**vars(args), "bank": 1}), ROWS)
    if side == "records":
        return lambda: {"utterances": len(read_unit_records(args.records, "train")[0])}
    units, _ = read_unit_records(args.records, "train")
    widths = plan.buckets(units.lengths)
    epoch = 0

    def run() -> common.Result:
        nonlocal epoch
        epoch += 1
        steps = plan.plan(units.lengths, seed=0, epoch=epoch, buckets=widths, max_tokens=2**20, max_rows=ROWS)
        return {"utterances": sum(int(batch.weight.sum()) for batch in loader.batches(units, steps))}

    return run


def tables(results: dict[str, list[common.Result]]) -> list[str]:
    """Makes the parts of the report: speed of each side, and relative to training."""
    costs = {side: [common.cost(result) for result in results[side]] for side in SIDES}
    costs["records, then batches"] = [a + b for a, b in zip(costs["records"], costs["batches"], strict=True)]
    rows = [["side", "utterances/s", "times training", f"goal ≥ {GOAL:g}"]]
    for side, each in costs.items():
        times = common.ratio(costs["training"], each)
        met = "" if side == "training" else "met" if times.median >= GOAL else "missed"
        rows.append([side, f"{1 / float(np.median(each)):,.0f}", "1" if side == "training" else str(times), met])
    return [common.table(rows)]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one side, or compares all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bank.add_flags(parser)
    parser.add_argument("--utterances", type=int, default=23_132, help="in the records (default: FSC's train split)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--records", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        common.serve(runner(args.side, args))
        return

    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records"
        write_records(records, args)
        names = ("dim", "layers", "units", "prompt", "separators", "dtype")
        flags = [f"--records={records}", *(f"--{name}={getattr(args, name)}" for name in names)]
        sides = {side: [sys.executable, "-m", "benchmarks.reader", f"--side={side}", *flags] for side in SIDES}
        results = common.race(sides, args.rounds)
    common.report("Reading records against training", args, tables(results), results)


if __name__ == "__main__":
    main()
