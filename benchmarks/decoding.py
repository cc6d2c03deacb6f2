"""Decoding labels: our batched, cached, constrained decoding compared with the reference's method in plain PyTorch.

    python -m benchmarks.decoding

Both sides label the same utterances (50 units, FSC's three slots, learnable verbalizer, P = 5) with the same weights,
and their labels are checked to agree. The reference takes one utterance at a time and runs the entire prefix for every
label, and once more to find the end; its rate without that last pass is reported too. Ours takes the batch of 32 at
once:

- `ours`: the most likely label of each slot, greedily, as the peer does; this is the comparison.
- `ours-all`: the probability of each of FSC's 31 label combinations, which the product returns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from benchmarks import common, matmul_peak
from spjax.models import verbalizers
from spjax.vocab import BOS, EOS

OURS = ("ours-float32", "ours-bfloat16", "ours-all-float32", "ours-all-bfloat16")
PEERS = ("peer-float32", "peer-float32-onednn", "peer-bfloat16", "peer-bfloat16-onednn")
GOALS = (("ours-float32", "float32", 5.0), ("ours-bfloat16", "bfloat16", 5.0), ("ours-bfloat16", "float32", 10.0))
GOALS_ALL = tuple((f"ours-all-{side.split('-')[1]}", precision, goal) for side, precision, goal in GOALS)
PEER_UTTERANCES = 2  # utterances that the peer labels in a timed run
LABELS = len(common.FSC.slots)

# Combinations in Fluent Speech Commands: objects and locations by action.
_ANYWHERE = ("none", "kitchen", "bedroom", "washroom")
_ON_AND_OFF = {"lights": _ANYWHERE, "lamp": ("none",), "music": ("none",)}
_LOUDNESS = {"heat": _ANYWHERE, "volume": ("none",)}
_COMBINATIONS = {
    "change language": dict.fromkeys(("none", "Chinese", "Korean", "English", "German"), ("none",)),
    "activate": _ON_AND_OFF,
    "deactivate": _ON_AND_OFF,
    "increase": _LOUDNESS,
    "decrease": _LOUDNESS,
    "bring": dict.fromkeys(("newspaper", "juice", "socks", "shoes"), ("none",)),
}


def combinations() -> list[tuple[int, int, int]]:
    """Returns the class ids of FSC's 31 combinations of action, object and location."""
    ids = {label: number for number, label in enumerate(common.FSC.classes)}
    return [
        (ids["action", action], ids["object", thing], ids["location", place])
        for action, things in _COMBINATIONS.items()
        for thing, places in things.items()
        for place in places
    ]


def ours(job: common.Job, dtype: str, every: bool) -> Callable[[], common.Result]:
    """Returns a timed run of our decoding of the batch: greedy, or with the scores of every combination."""
    import jax

    from spjax.models import decode
    from spjax.models.config import Compute

    verbalizer = verbalizers.learnable(common.FSC, job.config.vocab_size)
    batch, params = common.our_batch(job), common.our_params(job, dtype)
    settings = {"config": job.config, "compute": Compute(dtype)}
    tree = decode.label_tree(verbalizer, combinations())

    @jax.jit
    def label(params: common.Params, batch: common.Batch) -> jax.Array:
        if every:
            return decode.score(params["lm"], params["prompt"], batch, [tree], **settings)
        return decode.greedy(
            params["lm"], params["prompt"], batch, max_steps=verbalizer.steps, verbalizer=verbalizer, constrained=True,
            **settings,
        )  # fmt: skip

    def run() -> common.Result:
        found = np.asarray(label(params, batch))
        labels = verbalizer.codes[tree.combinations[found.argmax(1)], 0] if every else found
        return {"utterances": len(found), "labels": labels.tolist()}

    return run


def peer(job: common.Job, dtype: str, onednn: bool) -> Callable[[], common.Result]:
    """Returns a timed run of the reference's decoding of a few utterances."""
    import torch

    from benchmarks import torch_peer

    torch.set_num_threads(common.cores())
    lm = torch_peer.load_lm(job.lm, job.config.heads, getattr(torch, dtype), onednn)
    prompts = torch_peer.load_prompts(job.prompt)
    allowed = torch.from_numpy(verbalizers.learnable(common.FSC, job.config.vocab_size).allowed)
    sources = [[EOS, *units, BOS] for units in job.units[:PEER_UTTERANCES].tolist()]

    def run() -> common.Result:
        labels, last_passes = [], 0.0
        for source in sources:
            ticks: list[float] = []
            decoded = torch_peer.decode(
                lm,
                prompts,
                source,
                LABELS + 1,
                end=None,
                allowed=allowed,
                tick=lambda t=ticks: t.append(time.perf_counter()),
            )
            labels.append(decoded[:LABELS])
            last_passes += ticks[-1] - ticks[-2]
        return {"utterances": len(sources), "labels": labels, "last_passes": last_passes}

    return run


def runner(side: str, job: common.Job) -> Callable[[], common.Result]:
    """Returns the timed run of a side."""
    who, *rest = side.split("-")
    if who == "ours":
        return ours(job, rest[-1], "all" in rest)
    return peer(job, rest[0], "onednn" in rest)


def check_labels(results: dict[str, list[common.Result]]) -> None:
    """Checks that both sides predict the same labels.

    Raises:
      AssertionError: greedy labels in float32 differ, so the sides do different work.
    """
    want = results["peer-float32"][0]["labels"]
    for side in ("ours-float32", "peer-float32-onednn"):
        got = results[side][0]["labels"][: len(want)]
        if got != want:
            raise AssertionError(f"{side} predicts {got}, the float32 peer {want}: the sides do different work")


def main() -> None:
    """Runs one side, or compares all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_flags(parser, (*OURS, *PEERS))
    args = parser.parse_args()
    if args.side:
        common.serve(runner(args.side, common.make_job(args)))
        return

    commands = common.side_commands("benchmarks.decoding", (*OURS, *PEERS), args)
    peaks = {
        f"peak-{name}": matmul_peak.command(name, args.batch * args.units, args.dim) for name in matmul_peak.SIDES[:2]
    }
    results = common.race({**commands, **peaks}, args.rounds)
    check_labels(results)

    floor = common.decoding_floor_flops(common.lm_config(args), args.units, LABELS)
    rows = [["side", "utterances/s", "without the pass that finds the end", "needed FLOPs, of JAX's peak"]]
    for side in (*OURS, *PEERS):
        dtype = "bfloat16" if "bfloat16" in side else "float32"
        peak = common.median(results[f"peak-jax-{dtype}"], "peak")
        per_second = [1 / common.cost(result) for result in results[side]]
        without = [r["utterances"] / (r["seconds"] - r.get("last_passes", 0.0)) for r in results[side]]
        rate = float(np.median(per_second))
        cells = [
            f"{rate:.2f}",
            f"{np.median(without):.2f}" if side in PEERS else "",
            f"{rate * floor / 1e9 / peak:.0%}",
        ]
        rows.append([side, *cells])
    note = f"The labels of an utterance need {floor / 1e9:.1f} GFLOP."
    parts = [common.table(rows), note, common.goals(results, (*GOALS, *GOALS_ALL))]
    common.report("Decoding", args, parts, results)


if __name__ == "__main__":
    main()
