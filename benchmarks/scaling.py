"""Cost of a training step and of an evaluation batch, by length, batch size and bank size.

    python -m benchmarks.scaling

Starting from a base (50 units, 32 utterances, one prompt) one size at a time is changed: T, units of an utterance; B,
utterances of a batch; N, prompts in the bank, which share the B utterances, so that only the overhead of members shows
(benchmarks/bank.py compares banks with single runs). Evaluation scores all of FSC's 31 label combinations.

All sizes are compiled in one process and alternate, round after round, each timed run after an untimed one. Growth is
the ratio to the base in the same round, in CPU seconds, which measure the computation even if other processes load the
machine. Scratch is the temporary memory that the compiled program reports.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from tqdm import tqdm

from benchmarks import bank, common

WORKS = ("training", "evaluation")


class Size(NamedTuple):
    """T units of an utterance, B utterances of a batch, N prompts that share them."""

    T: int
    B: int
    N: int

    def __str__(self) -> str:
        return f"T={self.T} B={self.B} N={self.N}"


def axes(args: argparse.Namespace) -> dict[str, list[Size]]:
    """Returns the sizes to measure along each axis, in increasing order, the base included.

    Raises:
      ValueError: a bank's members cannot share the batch evenly.
    """
    base = Size(args.units, args.batch, 1)
    uneven = [n for n in args.banks if args.batch % n]
    if uneven:
        raise ValueError(f"--banks: {uneven} do not divide the {args.batch} utterances of --batch")
    values = {"T": args.lengths, "B": args.batches, "N": args.banks}
    return {
        axis: sorted({base, *(base._replace(**{axis: value}) for value in found)}) for axis, found in values.items()
    }


def runner(work: str, size: Size, args: argparse.Namespace) -> tuple[Callable[[], None], common.Result]:
    """Compiles one batch of `training` or `evaluation` of a size; returns it and the facts known before it runs."""
    import jax

    from spjax.models import decode
    from spjax.training import masks

    job = bank.make_job(args, size.B, size.T)
    setting, lm = bank.make_setting(args, job.config), common.our_params(job, args.dtype)["lm"]
    batch = jax.tree.map(jax.numpy.asarray, bank.bank_batch(job, size.N))
    state, frozen, update = bank.start(setting, lm, range(size.N))

    def answer(flat: masks.Flat, batch: bank.Batch) -> jax.Array:
        params = masks.unflatten(flat)
        settings = {"config": setting.config, "compute": setting.compute}
        return decode.score(params["lm"], params["prompt"], batch, [setting.tree], **settings)

    began = time.process_time()
    if work == "training":
        step = update.lower(state, frozen, batch).compile()
    else:
        flat = {**state["trained"], **frozen}
        step = jax.jit(answer).lower(flat, batch).compile()
    memory = step.memory_analysis()
    known = {
        "utterances": size.B,
        "compile": time.process_time() - began,
        "scratch MiB": memory.temp_size_in_bytes / 2**20 if memory else None,
    }

    def train() -> None:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))

    return train if work == "training" else lambda: jax.block_until_ready(step(flat, batch)), known


def measure(args: argparse.Namespace) -> dict[str, list[common.Result]]:
    """Returns timed runs by `WORK T=.. B=.. N=..`, one a round, in order."""
    sizes = dict.fromkeys(size for found in axes(args).values() for size in found)
    names = [(f"{work} {size}", work, size) for work in WORKS for size in sizes]
    runs = {}
    for name, work, size in tqdm(names, desc="compiling", file=sys.stderr):
        runs[name] = runner(work, size, args)
    found: dict[str, list[common.Result]] = {name: [] for name in runs}
    with tqdm(total=args.rounds * len(runs), file=sys.stderr) as steps:
        for number in range(args.rounds):
            for name in list(runs) if number % 2 == 0 else reversed(runs):
                steps.set_description(name)
                run, known = runs[name]
                run()
                began, before = time.perf_counter(), time.process_time()
                run()
                spent = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - before}
                found[name].append({**spent, **known})
                steps.update()
    return found


def tables(results: Mapping[str, list[common.Result]], args: argparse.Namespace) -> list[str]:
    """Makes one table an axis: cost of a batch and of an utterance, growth over the base, scratch memory."""
    base = Size(args.units, args.batch, 1)
    parts = []
    for axis, sizes in axes(args).items():
        fixed = ", ".join(f"{name} = {value}" for name, value in base._asdict().items() if name != axis)
        heads = [
            f"{work}: {what}"
            for work in WORKS
            for what in ("s", "CPU ms an utterance", "times the base", "scratch MiB")
        ]
        rows: list[list[object]] = [[axis, *heads]]
        for size in sizes:
            cells: list[object] = [getattr(size, axis)]
            for work in WORKS:
                each, first = results[f"{work} {size}"], results[f"{work} {base}"]
                seconds, cpu, scratch = common.median(each), common.median(each, "cpu"), each[0]["scratch MiB"]
                growth = common.ratio([r["cpu"] for r in each], [r["cpu"] for r in first])
                cells += [f"{seconds:.3f}", f"{1e3 * cpu / size.B:.1f}", growth]
                cells.append("" if scratch is None else f"{scratch:.0f}")
            rows.append(cells)
        parts.append(f"By {axis}, {fixed}:\n\n{common.table(rows)}")
    return parts


def main() -> None:
    """Measures every size and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bank.add_flags(parser)
    parser.add_argument("--batch", type=int, default=32, help="utterances in a batch, of the base")
    parser.add_argument("--lengths", type=bank.numbers, default=(25, 50, 100, 200, 400, 800), help="T")
    parser.add_argument("--batches", type=bank.numbers, default=(4, 8, 16, 32, 64, 128), help="B")
    parser.add_argument("--banks", type=bank.numbers, default=(1, 2, 4, 8, 16, 32), help="N; each divides --batch")
    args = parser.parse_args()
    try:
        axes(args)
    except ValueError as error:
        parser.error(str(error))
    results = measure(args)
    common.report("Cost by length, batch and bank", args, tables(results, args), results)


if __name__ == "__main__":
    main()
