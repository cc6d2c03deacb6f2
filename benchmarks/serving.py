"""Serving: batches of mixed tasks compared with one task a batch, and with one utterance at a time.

    python -m benchmarks.serving

Uses N packs of one structure, as trained with configs/defaults.py, on the small LM of the published results, or on any
other size; utterances of mixed lengths, each with all N tasks. The sides compute the same rows:

- `mixed`: one call of one predictor: rows of all tasks share batches.
- `single`: N calls of N predictors of one pack each: one task a batch.
- `alone`: one call for each utterance and task of a subset: batch size 1.

Their answers are checked to agree. Each side runs in a separate process; they alternate, and ratios are taken within a
round, for seconds and for CPU seconds, which measure the computation even if other processes load the machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.bank import numbers

SIDES = ("mixed", "single", "alone")
SLOTS = {"word": 12, "accent": 9, "mood": 4, "speaker": 40}  # slot of each task and its number of labels, repeated
ANSWERS_AGREE = {"float32": 1e-5, "bfloat16": 5e-2, "int8": 5e-2}  # probabilities
MIXED, BATCHED = 1.05, 8.0  # goals: cost of a mixed row relative to a single task's, and of a row alone to a mixed one


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds flags of the sizes of LM and prompts, number of requests, rounds and output."""
    parser.add_argument("--dim", type=int, default=256, help="model width; heads of 64, feed-forward of 4 widths")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=48, help="prompt length")
    parser.add_argument("--separators", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=8, help="N, packs served together")
    parser.add_argument("--utterances", type=int, default=64)
    parser.add_argument("--units", type=numbers, default=(25, 40, 60), help="lengths of the utterances, in turn")
    parser.add_argument("--alone", type=int, default=4, help="utterances of a timed run at batch size 1")
    parser.add_argument("--dtype", choices=sorted(ANSWERS_AGREE), default="float32", help="the LM's kernels")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--out", help="write every run to this JSON file")


def make_packs(args: argparse.Namespace, lm: Any) -> dict[str, Any]:
    """Makes N random packs of one structure, one task each, equal in every process."""
    import jax

    from spjax.io import PromptPack, make_card
    from spjax.models import prompts, verbalizers
    from spjax.models.prompts import PromptConfig
    from spjax.tasks import Slot, Task

    config, shape = lm.config, PromptConfig(length=args.prompt, separators=args.separators, steer=True, sep_scale=0.06)
    packs = {}
    for n in range(args.tasks):
        name, labels = list(SLOTS.items())[n % len(SLOTS)]
        task = Task(f"{name}_{n}", (Slot(name, tuple(map(str, range(labels)))),))
        verbalizer = verbalizers.learnable(task, config.vocab_size)
        drawn = prompts.init_member(jax.random.key(n), shape, config, verbalizer, lm.params["embed"])
        card = make_card(
            task, kind="learnable", codes=verbalizer.codes, feeds=verbalizer.fed_back, outputs=verbalizer.outputs,
            config=config, lm_hash=lm.hash,
        )  # fmt: skip
        packs[task.name] = PromptPack({name: np.asarray(leaf) for name, leaf in drawn.items()}, card)
    return packs


def runner(side: str, args: argparse.Namespace) -> Callable[[], common.Result]:
    """Returns a side's answers as a timed run.

    Its result has `utterances` (rows: an utterance and a task each), `cpu`, the CPU seconds of all threads, and
    `answers`, the probabilities of the first utterances by task.
    """
    from spjax import SpeechPrompt, UnitLM

    job = common.make_job(argparse.Namespace(dim=args.dim, layers=args.layers, batch=1, units=1))
    lm = UnitLM(job.config, common.our_params(job, "float32")["lm"], "random")
    packs, rng = make_packs(args, lm), np.random.default_rng(1)
    lengths = [args.units[i % len(args.units)] for i in range(args.utterances)]
    units = [rng.integers(0, job.config.num_units, length).tolist() for length in lengths]
    groups = [{name: pack} for name, pack in packs.items()] if side == "single" else [packs]
    predictors = [SpeechPrompt.load(lm, None, group, compute=args.dtype) for group in groups]
    asked = units[: args.alone] if side == "alone" else units

    def run() -> common.Result:
        found: list[dict[str, Any]] = [{} for _ in asked]
        began = time.process_time()
        for predictor in predictors:
            if side == "alone":
                answers = [
                    {name: predictor.predict_units([one], name)[0][name] for name in predictor.tasks} for one in asked
                ]
            else:
                answers = predictor.predict_units(asked)
            for known, answer in zip(found, answers, strict=True):
                known |= answer
        spent = time.process_time() - began
        kept = [{name: shares(answer[name]) for name in packs} for answer in found[: args.alone]]
        return {"utterances": len(asked) * len(packs), "cpu": spent, "answers": kept}

    return run


def shares(answer: dict[str, Any]) -> list[float]:
    """Returns every probability of a task's answer."""
    return [share for slot in answer["probabilities"].values() for share in slot.values()]


def check_answers(results: dict[str, list[common.Result]], dtype: str) -> float:
    """Returns the largest difference of a probability between sides.

    Raises:
      AssertionError: the difference exceeds rounding error, so the sides do different work.
    """
    flat = {
        side: np.concatenate([one for answer in results[side][0]["answers"] for one in answer.values()])
        for side in SIDES
    }
    difference = max(float(np.abs(flat[side] - flat["mixed"]).max()) for side in SIDES)
    if not difference <= ANSWERS_AGREE[dtype]:
        raise AssertionError(f"probabilities differ between the sides by {difference:.1e} > {ANSWERS_AGREE[dtype]}")
    return difference


def tables(results: dict[str, list[common.Result]], args: argparse.Namespace) -> list[str]:
    """Makes the parts of the report: times of each side, and ratios within a round."""
    times = [["side", "rows", "s", "CPU s", "rows/s"]]
    for side in SIDES:
        each = results[side]
        seconds, cpu, rows = common.median(each), common.median(each, "cpu"), each[0]["utterances"]
        times.append([side, rows, f"{seconds:.3f}", f"{cpu:.3f}", f"{rows / seconds:.1f}"])
    ratios = [["time a row of", "mixed : single", "goal", "alone : mixed", "goal"]]
    for what in ("seconds", "cpu"):
        mixed, single, alone = ([r[what] / r["utterances"] for r in results[side]] for side in SIDES)
        ratios.append([what, common.ratio(mixed, single), f"≤ {MIXED}", common.ratio(alone, mixed), f"≥ {BATCHED}"])
    note = f"Probabilities of the sides differ by {check_answers(results, args.dtype):.1e} at most."
    return [common.table(times), common.table(ratios), note]


def main() -> None:
    """Runs one side, or compares all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        common.serve(runner(args.side, args))
        return

    names = ("dim", "layers", "prompt", "separators", "tasks", "utterances", "alone", "dtype")
    sizes = [f"--{name}={getattr(args, name)}" for name in names] + [f"--units={','.join(map(str, args.units))}"]
    commands = {side: [sys.executable, "-m", "benchmarks.serving", f"--side={side}", *sizes] for side in SIDES}
    results = common.race(commands, args.rounds)
    common.report(f"Serving {args.tasks} tasks", args, tables(results, args), results)


if __name__ == "__main__":
    main()
