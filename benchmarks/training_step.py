"""Our full-size training step compared with the reference's in plain PyTorch, and with the machine's matrix peak.

    python -m benchmarks.training_step

Both sides start from the same weights and use the same batch (32 utterances of 50 units, FSC's three labels of 24
classes, P = 5, learnable verbalizer), the reference's loss, clipping and Adam, without dropout; their losses are
checked to agree step by step. Each side runs in a separate process; they alternate, and ratios are taken within a
round.

The peer runs float32 products by F.linear (MKL) and by oneDNN, which is faster on some machines. The goals apply to the
faster one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from benchmarks import common, matmul_peak

OURS = ("ours-float32", "ours-bfloat16")
PEERS = ("peer-float32", "peer-float32-onednn", "peer-bfloat16", "peer-bfloat16-onednn")
# (our side, precision of the peer, goal)
GOALS = (("ours-float32", "float32", 1.1), ("ours-bfloat16", "bfloat16", 1.4), ("ours-bfloat16", "float32", 2.2))
LOSSES_AGREE = {"float32": 1e-3, "bfloat16": 5e-2}  # relative, over the few steps of a benchmark


def ours(job: common.Job, dtype: str) -> Callable[[], common.Result]:
    """Returns a timed run of our training step, that of `spjax.training.train`."""
    import jax
    import jax.numpy as jnp

    from spjax.models import decode, prompts, verbalizers
    from spjax.models.config import Compute
    from spjax.training import losses, masks, optim
    from spjax.training.setting import Setting
    from spjax.training.update import make_update

    batch, params = common.our_batch(job), masks.flatten(common.our_params(job, dtype))
    trained, frozen = masks.split(params, "prompt/.*")
    verbalizer = verbalizers.learnable(common.FSC, job.config.vocab_size)
    setting = Setting(
        config=job.config,
        compute=Compute(dtype),
        prompt=prompts.PromptConfig(dropout=0.0, verbalizer_dropout=0.0),
        loss=losses.LossConfig("reference"),
        verbalizer=verbalizer,
        tree=decode.label_tree(verbalizer, job.classes),
    )
    tx = masks.masked(
        optim.make(optim.OptimConfig(warmup=0.0, decay="constant", eps_before_correction=True), 1000), trained, frozen
    )
    state = {
        "trained": trained,
        "optimizer": tx.init(params),
        "step": jnp.zeros((), jnp.int32),
        "seeds": jnp.zeros(1, jnp.uint32),
        "active": jnp.ones(1, bool),
    }
    update = jax.jit(make_update(setting, tx), donate_argnums=0)

    def run() -> common.Result:
        nonlocal state
        state, metrics = update(state, frozen, batch)
        return {"loss": float(metrics["loss"][0]), "utterances": len(job.units)}

    return run


def peer(job: common.Job, dtype: str, onednn: bool) -> Callable[[], common.Result]:
    """Returns a timed run of the reference's training step in PyTorch."""
    import torch

    from benchmarks import torch_peer

    torch.set_num_threads(common.cores())
    lm = torch_peer.load_lm(job.lm, job.config.heads, getattr(torch, dtype), onednn)
    prompts = torch_peer.load_prompts(job.prompt)
    state, step = torch_peer.adam(prompts), 0
    tokens, targets = (torch.from_numpy(rows) for rows in common.sentences(job))

    def run() -> common.Result:
        nonlocal step
        step += 1
        loss = torch_peer.train_step(lm, prompts, state, step, tokens, targets)
        return {"loss": loss, "utterances": len(tokens)}

    return run


def runner(side: str, job: common.Job) -> Callable[[], common.Result]:
    """Returns the timed run of a side."""
    who, dtype, *onednn = side.split("-")
    return ours(job, dtype) if who == "ours" else peer(job, dtype, bool(onednn))


def check_losses(results: dict[str, list[common.Result]]) -> str:
    """Tabulates the largest relative difference of each side's losses from the float32 peer's, over all steps.

    Raises:
      AssertionError: a difference exceeds rounding error, so the sides do different work.
    """
    want = np.array([r["loss"] for r in results[PEERS[0]]])
    rows = [["side", "largest relative difference of the loss, any step"]]
    for side in (*PEERS[1:], *OURS):
        difference = float(np.max(np.abs(np.array([r["loss"] for r in results[side]]) / want - 1)))
        allowed = LOSSES_AGREE[side.split("-")[1]]
        if not difference <= allowed:
            raise AssertionError(
                f"{side}: the loss differs from the float32 peer's by {difference:.1e} > {allowed}: the sides do "
                "different work"
            )
        rows.append([side, f"{difference:.1e}"])
    return common.table(rows)


def main() -> None:
    """Runs one side, or compares all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_flags(parser, (*OURS, *PEERS))
    args = parser.parse_args()
    if args.side:
        common.serve(runner(args.side, common.make_job(args)))
        return

    config, tokens, scored = common.lm_config(args), args.units + 5, 5  # </s>, <s>, three labels; <s>, labels, </s>
    commands = common.side_commands("benchmarks.training_step", (*OURS, *PEERS), args)
    peaks = {f"peak-{side}": matmul_peak.command(side, args.batch * tokens, args.dim) for side in matmul_peak.SIDES}
    results = common.race({**commands, **peaks}, args.rounds)

    floor = common.training_floor_flops(config, args.batch, tokens, scored)
    computed_flops = common.peer_training_flops(config, args.batch, tokens)
    rows = [
        ["side", "s a step", "utterances/s", "FLOPs needed of those computed", "needed FLOPs, of peak", "peak GFLOP/s"]
    ]
    for side in (*OURS, *PEERS):
        dtype = side.split("-")[1]
        library = "jax" if side in OURS else "torch"
        peak = max(common.median(results[name], "peak") for name in peaks if name.startswith(f"peak-{library}-{dtype}"))
        seconds = common.median(results[side])
        share = floor / seconds / 1e9 / peak
        computed = "" if side in OURS else f"{floor / computed_flops:.0%}"
        rows.append([side, f"{seconds:.3f}", f"{args.batch / seconds:.1f}", computed, f"{share:.0%}", f"{peak:.0f}"])
    note = f"A step needs {floor / 1e9:.0f} GFLOP; the reference computes {computed_flops / 1e9:.0f}."
    parts = [common.table(rows), note, common.goals(results, GOALS), check_losses(results)]
    common.report("Training step", args, parts, results)


if __name__ == "__main__":
    main()
