"""A bank of prompts trained together against as many single runs, and against one prompt, at the same total work.

    python -m benchmarks.bank

The small LM that the results are made with, FSC's slots, prompt and loss (configs/defaults.py). N is the bank, b the
utterances a member sees in an update:

- `bank`: one update of a bank of N, N * b utterances.
- `singles`: N updates of a bank of one, b utterances each, one after the other: a step of N runs.
- `one`: one update of one prompt on all N * b utterances: what a bank would cost if its members cost nothing.
- `half`: one update of the bank of which every other member has stopped, N / 2 * b utterances.

Members of the bank and single runs start alike and see the same utterances; that their losses agree, member by member
and step by step, is checked. Each side has its process; they take turns, and ratios are of one round: of seconds, and
of the processor's seconds, which tell how much was computed even where others take most of the machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import common, decoding
from spjax.types import Batch

SIDES = ("bank", "singles", "one", "half")
LOSSES_AGREE = {"float32": 1e-3, "bfloat16": 5e-2}  # relative, over the few steps that a race takes


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Sizes of LM and prompt, by default those that the results are made with; rounds and output."""
    parser.add_argument("--dim", type=int, default=256, help="model width; heads of 64, feed-forward of 4 widths")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--units", type=int, default=50, help="units of an utterance")
    parser.add_argument("--prompt", type=int, default=48, help="prompt length")
    parser.add_argument("--separators", type=int, default=8)
    parser.add_argument("--dtype", choices=sorted(LOSSES_AGREE), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each side")
    parser.add_argument("--out", help="write every run to this JSON file")


def numbers(text: str) -> tuple[int, ...]:
    """A flag's list of positive integers, "8,32".

    Raises:
      argparse.ArgumentTypeError: it is none.
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of positive integers such as 8,32")
    return found


def make_job(args: argparse.Namespace, rows: int, units: int) -> common.Job:
    """LM weights and `rows` utterances of so many units, the same in every process."""
    return common.make_job(argparse.Namespace(dim=args.dim, layers=args.layers, batch=rows, units=units))


def make_setting(args: argparse.Namespace, config: common.UnitLMConfig) -> Any:
    """What is trained (`spjax.training.train.Setting`): FSC with prompts, of sizes by the flags."""
    from configs import defaults
    from spjax.evaluation import decode
    from spjax.models import prompts, verbalizers
    from spjax.models.config import Compute
    from spjax.training import losses, train

    found = defaults.with_prompts(defaults.prompt_tuning("fsc"))
    found.prompt.update(length=args.prompt, separators=args.separators)
    verbalizer = verbalizers.learnable(common.FSC, config.vocab_size)
    return train.Setting(
        config=config,
        compute=Compute(args.dtype),
        prompt=prompts.PromptConfig(**found.prompt),
        loss=losses.LossConfig(**found.loss),
        verbalizer=verbalizer,
        tree=decode.label_tree(verbalizer, decoding.combinations()),
    )


def bank_batch(job: common.Job, members: int) -> Batch:
    """The job's B utterances as a batch of a bank: B / members of each member, member-major."""
    rows = len(job.units) // members
    return common.our_batch(job)._replace(prompt_id=np.repeat(np.arange(members, dtype=np.int32), rows))


def half_batch(job: common.Job, members: int) -> tuple[Batch, np.ndarray]:
    """Of such a batch what every other member has, and the numbers of these members."""
    import jax

    who = np.arange(0, members, 2, dtype=np.int32)
    batch = bank_batch(job, members)
    rows = np.flatnonzero(np.isin(batch.prompt_id, who))
    return jax.tree.map(lambda leaf: leaf[rows], batch)._replace(prompt_id=batch.prompt_id[rows] // 2), who


def start(setting: Any, lm: common.Params, seeds: Sequence[int]) -> tuple[dict[str, Any], Any, Callable[..., Any]]:
    """A training's (state, frozen leaves, update), one member a seed, as `spjax.training.train.train` makes them."""
    import jax
    import jax.numpy as jnp

    from configs import defaults
    from spjax.training import masks, optim, train

    flat = masks.flatten(train.first_params(lm, setting, tuple(seeds)))
    trained, frozen = masks.split(flat, "prompt/.*")
    config = optim.OptimConfig(**defaults.with_prompts(defaults.prompt_tuning("fsc")).optim)
    tx = masks.masked(optim.make_bank(config, [1000] * len(seeds), [config.lr] * len(seeds)), trained, frozen)
    state = {
        "trained": trained,
        "optimizer": tx.init(flat),
        "step": jnp.zeros(len(seeds), jnp.int32),
        "seeds": jnp.asarray(seeds, jnp.uint32),
    }
    return state, frozen, jax.jit(train.make_update(setting, tx), donate_argnums=0)


def runner(side: str, args: argparse.Namespace, rows: int) -> Callable[[], common.Result]:
    """A side's update of `rows` utterances a member as a timed run.

    Its result has the losses of all members [N] (of `one`: [1]; of members that stopped: 0), `cpu`, the seconds of all
    its threads, and `compile`, those that compiling took, once.
    """
    import jax

    job = make_job(args, args.bank * rows, args.units)
    setting, lm = make_setting(args, job.config), common.our_params(job, args.dtype)["lm"]
    seeds = range(1 if side == "one" else args.bank)
    runs = [[seed] for seed in seeds] if side == "singles" else [list(seeds)]
    whole = bank_batch(job, 1)  # of single prompts: every row of it is member 0's
    items: list[tuple[Batch, np.ndarray | None]] = [(bank_batch(job, len(seeds)), None)]
    if side == "singles":
        items = [(jax.tree.map(lambda leaf: leaf[n * rows : (n + 1) * rows], whole), None) for n in seeds]  # noqa: B023
    elif side == "half":
        items = [half_batch(job, len(seeds))]

    starts = [start(setting, lm, run) for run in runs]
    states, (_, frozen, update) = [state for state, _, _ in starts], starts[0]
    began = time.process_time()
    step = update.lower(states[0], frozen, *items[0]).compile()
    compiling = time.process_time() - began

    def run() -> common.Result:
        found, began = [], time.process_time()
        for n, item in enumerate(items):
            states[n], metrics = step(states[n], frozen, *item)
            found.append(metrics["loss"])
        losses = np.concatenate(jax.block_until_ready(found)).tolist()
        spent = {"cpu": time.process_time() - began, "compile": compiling}
        return {"losses": losses, "utterances": sum(len(batch.last) for batch, _ in items), **spent}

    return run


def check_losses(results: dict[str, list[common.Result]], rows: int, dtype: str) -> float:
    """Largest relative difference between the losses of a member in the bank and alone, over all steps.

    Raises:
      AssertionError: it is more than rounding: the sides do not do the same job.
    """
    bank, alone = (np.array([r["losses"] for r in results[f"{side}-{rows}"]]) for side in SIDES[:2])
    apart = float(np.max(np.abs(bank / alone - 1)))
    if not apart <= LOSSES_AGREE[dtype]:
        raise AssertionError(
            f"{rows} utterances a member: losses in the bank and alone differ by {apart:.1e} > {LOSSES_AGREE[dtype]}"
        )
    return apart


def tables(results: dict[str, list[common.Result]], args: argparse.Namespace) -> list[str]:
    """The report's parts: times of each side, and ratios of one round."""
    times = [["utterances a member", "side", "s", "CPU s", "utterances/s", "CPU s to compile"]]
    ratios = [["utterances a member", "of", "singles : bank", "bank : one", "half : bank", "members' losses apart"]]
    for rows in args.batches:
        runs = {side: results[f"{side}-{rows}"] for side in SIDES}
        for side, each in runs.items():
            seconds, cpu, compiling = (common.median(each, key) for key in ("seconds", "cpu", "compile"))
            rate = each[0]["utterances"] / seconds
            times.append([rows, side, f"{seconds:.3f}", f"{cpu:.3f}", f"{rate:.0f}", f"{compiling:.1f}"])
        apart = check_losses(results, rows, args.dtype)
        for what, key in (("seconds", "seconds"), ("CPU seconds", "cpu")):
            bank, singles, one, half = ([result[key] for result in runs[side]] for side in SIDES)
            compared = [common.ratio(*pair) for pair in ((singles, bank), (bank, one), (half, bank))]
            ratios.append([rows, what, *compared, f"{apart:.1e}"])
    note = "`singles` compiles once here; as many runs, each a process of its own, would compile each."
    return [common.table(times), note, common.table(ratios)]


def main() -> None:
    """Serve one side, or race them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--bank", type=int, default=16, help="N, prompts trained together")
    parser.add_argument("--batches", type=numbers, default=(2, 8, 32), help="b, utterances of a member in an update")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, rows = args.side.rsplit("-", 1)
        common.serve(runner(side, args, int(rows)))
        return

    names = ("dim", "layers", "units", "prompt", "separators", "dtype", "bank")
    sizes = [f"--{name}={getattr(args, name)}" for name in names]
    results: dict[str, list[common.Result]] = {}
    for rows in args.batches:  # one size after the other: only four processes are alive at a time
        sides = [f"{side}-{rows}" for side in SIDES]
        commands = {side: [sys.executable, "-m", "benchmarks.bank", f"--side={side}", *sizes] for side in sides}
        results |= common.race(commands, args.rounds)
    common.report(f"A bank of {args.bank}", args, tables(results, args), results)


if __name__ == "__main__":
    main()
