"""Training a bank of prompts, compared with as many single runs and with one prompt on the same number of utterances.

    python -m benchmarks.bank

Uses the small LM of the published results and FSC's slots, prompt and loss (configs/defaults.py). N is the size of the
bank, b the utterances of a member in an update:

- `bank`: one update of a bank of N, N * b utterances.
- `singles`: N updates of a bank of one, b utterances each, in sequence: a step of N runs.
- `one`: one update of one prompt on all N * b utterances: the cost of the bank if members had no overhead.
- `half`: one update of the bank after every other member has stopped, N / 2 * b utterances.

Members of the bank and single runs start from the same weights and see the same utterances; their losses are checked to
agree, member by member and step by step. Each side runs in a separate process; they alternate, and ratios are taken
within a round, for seconds and for CPU seconds, which measure the computation even if other processes load the machine.
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
LOSSES_AGREE = {"float32": 1e-3, "bfloat16": 5e-2}  # relative, over the few steps of a benchmark


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds flags of LM and prompt sizes (defaults: those of the published results), rounds and output."""
    parser.add_argument("--dim", type=int, default=256, help="model width; heads of 64, feed-forward of 4 widths")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--units", type=int, default=50, help="units of an utterance")
    parser.add_argument("--prompt", type=int, default=48, help="prompt length")
    parser.add_argument("--separators", type=int, default=8)
    parser.add_argument("--dtype", choices=sorted(LOSSES_AGREE), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each side")
    parser.add_argument("--out", help="write every run to this JSON file")


def numbers(text: str) -> tuple[int, ...]:
    """Parses a list of positive integers, such as "8,32".

    Raises:
      argparse.ArgumentTypeError: not such a list.
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive integers such as 8,32")
    return found


def make_job(args: argparse.Namespace, rows: int, units: int) -> common.Job:
    """Makes LM weights and `rows` utterances of `units` units each, equal in every process."""
    return common.make_job(argparse.Namespace(dim=args.dim, layers=args.layers, batch=rows, units=units))


def make_setting(args: argparse.Namespace, config: common.UnitLMConfig) -> Any:
    """Makes the training setup (`spjax.training.setting.Setting`): FSC with prompts of the flags' sizes."""
    from configs import defaults
    from spjax.models import decode, prompts, verbalizers
    from spjax.models.config import Compute
    from spjax.training import losses
    from spjax.training.setting import Setting

    found = defaults.with_prompts(defaults.prompt_tuning("fsc"))
    found.prompt.update(length=args.prompt, separators=args.separators)
    verbalizer = verbalizers.learnable(common.FSC, config.vocab_size)
    return Setting(
        config=config,
        compute=Compute(args.dtype),
        prompt=prompts.PromptConfig(**found.prompt),
        loss=losses.LossConfig(**found.loss),
        verbalizer=verbalizer,
        tree=decode.label_tree(verbalizer, decoding.combinations()),
    )


def bank_batch(job: common.Job, members: int) -> Batch:
    """Makes a bank's batch of the job's B utterances: B / members of each member, member-major."""
    rows = len(job.units) // members
    return common.our_batch(job)._replace(prompt_id=np.repeat(np.arange(members, dtype=np.int32), rows))


def half_batch(job: common.Job, members: int) -> tuple[Batch, np.ndarray]:
    """Returns the rows of every other member of such a batch, and the numbers of these members."""
    import jax

    who = np.arange(0, members, 2, dtype=np.int32)
    batch = bank_batch(job, members)
    rows = np.flatnonzero(np.isin(batch.prompt_id, who))
    return jax.tree.map(lambda leaf: leaf[rows], batch)._replace(prompt_id=batch.prompt_id[rows] // 2), who


def start(setting: Any, lm: common.Params, seeds: Sequence[int]) -> tuple[dict[str, Any], Any, Callable[..., Any]]:
    """Returns (state, frozen leaves, update) of a training, one member a seed, as `spjax.training.train.train` does."""
    import jax
    import jax.numpy as jnp

    from configs import defaults
    from spjax.training import masks, optim
    from spjax.training.setting import first_params
    from spjax.training.update import make_update

    flat = masks.flatten(first_params(lm, setting, tuple(seeds)))
    trained, frozen = masks.split(flat, "prompt/.*")
    config = optim.OptimConfig(**defaults.with_prompts(defaults.prompt_tuning("fsc")).optim)
    tx = masks.masked(optim.make_bank(config, [1000] * len(seeds), [config.lr] * len(seeds)), trained, frozen)
    state = {
        "trained": trained,
        "optimizer": tx.init(flat),
        "step": jnp.zeros(len(seeds), jnp.int32),
        "seeds": jnp.asarray(seeds, jnp.uint32),
        "active": jnp.ones(len(seeds), bool),
    }
    return state, frozen, jax.jit(make_update(setting, tx), donate_argnums=0)


def runner(side: str, args: argparse.Namespace, rows: int) -> Callable[[], common.Result]:
    """Returns a timed run of a side's update of `rows` utterances a member.

    Its result has `losses` of all members [N] (of `one`: [1]; 0 for stopped members), `cpu`, the CPU seconds of all
    threads, and `compile`, the CPU seconds of the compilation.
    """
    import jax

    job = make_job(args, args.bank * rows, args.units)
    setting, lm = make_setting(args, job.config), common.our_params(job, args.dtype)["lm"]
    seeds = range(1 if side == "one" else args.bank)
    runs = [[seed] for seed in seeds] if side == "singles" else [list(seeds)]
    single = bank_batch(job, 1)  # all rows belong to member 0
    items: list[tuple[Batch, np.ndarray | None]] = [(bank_batch(job, len(seeds)), None)]
    if side == "singles":
        items = [(jax.tree.map(lambda leaf: leaf[n * rows : (n + 1) * rows], single), None) for n in seeds]  # noqa: B023
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
    """Returns the largest relative difference between a member's losses in the bank and alone, over all steps.

    Raises:
      AssertionError: the difference exceeds rounding error, so the sides do different work.
    """
    bank, alone = (np.array([r["losses"] for r in results[f"{side}-{rows}"]]) for side in SIDES[:2])
    difference = float(np.max(np.abs(bank / alone - 1)))
    if not difference <= LOSSES_AGREE[dtype]:
        raise AssertionError(
            f"{rows} utterances a member: losses in the bank and alone differ by {difference:.1e} > "
            f"{LOSSES_AGREE[dtype]}"
        )
    return difference


def tables(results: dict[str, list[common.Result]], args: argparse.Namespace) -> list[str]:
    """Makes the parts of the report: times of each side, and ratios within a round."""
    times = [["utterances a member", "side", "s", "CPU s", "utterances/s", "CPU s to compile"]]
    ratios = [["utterances a member", "of", "singles : bank", "bank : one", "half : bank", "difference of losses"]]
    for rows in args.batches:
        runs = {side: results[f"{side}-{rows}"] for side in SIDES}
        for side, each in runs.items():
            seconds, cpu, compiling = (common.median(each, key) for key in ("seconds", "cpu", "compile"))
            rate = each[0]["utterances"] / seconds
            times.append([rows, side, f"{seconds:.3f}", f"{cpu:.3f}", f"{rate:.0f}", f"{compiling:.1f}"])
        difference = check_losses(results, rows, args.dtype)
        for what, key in (("seconds", "seconds"), ("CPU seconds", "cpu")):
            bank, singles, one, half = ([result[key] for result in runs[side]] for side in SIDES)
            compared = [common.ratio(*pair) for pair in ((singles, bank), (bank, one), (half, bank))]
            ratios.append([rows, what, *compared, f"{difference:.1e}"])
    note = "`singles` compiles once here; as separate processes, each run would compile."
    return [common.table(times), note, common.table(ratios)]


def main() -> None:
    """Runs one side, or compares all of them."""
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
    for rows in args.batches:  # in sequence, so that only four processes are alive at a time
        sides = [f"{side}-{rows}" for side in SIDES]
        commands = {side: [sys.executable, "-m", "benchmarks.bank", f"--side={side}", *sizes] for side in sides}
        results |= common.race(commands, args.rounds)
    common.report(f"A bank of {args.bank}", args, tables(results, args), results)


if __name__ == "__main__":
    main()
