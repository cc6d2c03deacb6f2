"""Low-rank adapters compared with prompts in training, and with a merged model in serving.

    python -m benchmarks.lora

Uses the small LM of the published results and FSC's slots. Training compares a step of a bank whose members have
adapters of all kernels and no prompt (`lora`) with one whose members have the default prompt (`prompt`), on the same
batch. Serving compares the scores of a batch whose rows use different packs of adapters (`mixed`) with those of the
same batch by an LM with one pack's adapters merged into its kernels (`merged`). All sides run in this process and
alternate; ratios are taken within a round, for seconds and for CPU seconds, which measure the computation even if other
processes load the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import bank, common
from spjax.malloc import with_huge_pages
from spjax.types import Params

Sides = dict[str, Callable[[], Any]]


def training(args: argparse.Namespace, members: int) -> Sides:
    """Makes a step of `args.rows` utterances a member, with prompts and with adapters."""
    import jax

    job = bank.make_job(args, members * args.rows, args.units)
    lm, batch = common.our_params(job, args.dtype)["lm"], bank.bank_batch(job, members)
    prompt = bank.make_setting(args, job.config)
    adapters = dataclasses.replace(prompt.prompt, length=0, rank=args.rank, lora_dropout=args.dropout)
    lora = dataclasses.replace(prompt, prompt=adapters)

    def side(setting: Any) -> Callable[[], Any]:
        state, frozen, update = bank.start(setting, lm, range(members))
        step, held = update.lower(state, frozen, batch).compile(), [state]

        def run() -> Any:
            held[0], metrics = step(held[0], frozen, batch)
            return jax.block_until_ready(metrics)

        return run

    return {"prompt": side(prompt), "lora": side(lora)}


def serving(args: argparse.Namespace) -> Sides:
    """Scores a batch whose rows use different packs, and one that uses a single pack merged into the LM."""
    import jax
    import jax.numpy as jnp

    from spjax.models import decode, low_rank, prompts
    from spjax.models.config import Compute

    job = bank.make_job(args, args.packs, args.units)
    lm, batch = common.our_params(job, args.serve_dtype)["lm"], common.our_batch(job)
    setting = bank.make_setting(args, job.config)
    config = dataclasses.replace(setting.prompt, length=0, rank=args.rank)

    def pack(seed: int) -> Params:
        keys = iter(jax.random.split(jax.random.key(seed), 9))
        new = prompts.init_member(next(keys), config, job.config, setting.verbalizer, jnp.asarray(lm["embed"]))
        more = {name: 0.02 * jax.random.normal(next(keys), new[name].shape) for name in new if name.endswith("_b")}
        return new | more

    compute = Compute(args.serve_dtype)
    score = jax.jit(functools.partial(decode.score, trees=[setting.tree], config=job.config, compute=compute))

    def side(lm: Params, tree: Params, prompt_id: np.ndarray) -> Callable[[], Any]:
        tree = prompts.projected(tree, lm, job.config, compute)
        rows = batch._replace(prompt_id=prompt_id.astype(np.int32))
        run = score.lower(lm, tree, rows).compile()
        return lambda: jax.block_until_ready(run(lm, tree, rows))

    packs = low_rank.scaled(prompts.stack([pack(seed) for seed in range(args.packs)]), config.scale)
    layers = dict(lm["layers"])
    for name in low_rank.targets_of(packs):
        more = packs[f"{name}_a"][0].mT @ packs[f"{name}_b"][0]
        kernel = layers[name]["kernel"]
        layers[name] = {**layers[name], "kernel": (kernel + more).astype(kernel.dtype)}
    one = {name: leaf[:1] for name, leaf in packs.items() if name not in low_rank.LEAVES}
    mixed = side(lm, packs, np.random.default_rng(0).permutation(args.packs))
    return {"merged": side({**lm, "layers": layers}, one, np.zeros(args.packs)), "mixed": mixed}


def race(sides: Sides, rounds: int, repeats: int) -> dict[str, list[common.Result]]:
    """Measures seconds and CPU seconds of `repeats` runs of every side, round by round."""
    found: dict[str, list[common.Result]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(repeats):
                sides[name]()
            spent = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            found[name].append({key: value / repeats for key, value in spent.items()})
    return found


def main() -> None:
    """Runs all comparisons and prints the ratios."""
    with_huge_pages()  # as the training and serving commands do
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bank.add_flags(parser)
    parser.set_defaults(rounds=9)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters")
    parser.add_argument("--rows", type=int, default=32, help="utterances of a member in an update")
    parser.add_argument("--members", type=bank.numbers, default=(1, 3), help="of the bank")
    parser.add_argument("--packs", type=int, default=16, help="packs, and rows, of a served batch")
    parser.add_argument("--serve-dtype", choices=sorted(bank.LOSSES_AGREE), default="float32")
    parser.add_argument("--repeats", type=int, default=2, help="runs that are timed together")
    args = parser.parse_args()
    races = {f"training, {members} members": (training(args, members), 1.15) for members in args.members}
    races[f"serving, {args.packs} packs"] = (serving(args), 1.25)
    results: dict[str, list[common.Result]] = {}
    rows = [["race", "side", "s", "CPU s", "ratio of s", "ratio of CPU s", "goal"]]
    for name, (sides, goal) in races.items():
        found = race(sides, args.rounds, args.repeats)
        results |= {f"{name}: {side}": each for side, each in found.items()}
        base, other = found.values()
        for side, each in found.items():
            times = [f"{common.median(each, key):.4f}" for key in ("seconds", "cpu")]
            compared = [common.ratio(*([one[key] for one in runs] for runs in (other, base))) for key in each[0]]
            rows.append([name, side, *times, *([*compared, f"≤ {goal}"] if each is other else ["", "", ""])])
    common.report("Low-rank adapters", args, [common.table(rows)], results)


if __name__ == "__main__":
    main()
