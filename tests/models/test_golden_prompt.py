"""Prompt tuning against the published code: logits, loss, all gradients and Adam steps of seven golden cases."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spjax.models import prompted_lm
from spjax.models.unit_lm import FLOAT32
from spjax.training import losses, masks, optim
from spjax.training.reference import protocol
from spjax.training.train import TrainConfig
from tests.golden_data import CASES, Case, load_case, relative, tiny_lm, tree_of
from tests.models import tiny

TOLERANCE = 1e-5
_, LOSS, OPTIM, _ = protocol(TrainConfig())


class Work(NamedTuple):
    """A golden case, its bank by path, and the results of our code.

    `measure(trained)` gives outputs [B, K + 2, ...], loss and gradients.
    """

    case: Case
    layers: int
    trained: masks.Flat
    measure: Callable[[masks.Flat], tuple[jax.Array, jax.Array, masks.Flat]]


@pytest.fixture(scope="module", params=CASES)
def work(request: pytest.FixtureRequest, golden: Path) -> Work:
    config, lm = tiny_lm(golden)
    lm = jax.tree.map(jnp.asarray, lm)
    case = load_case(golden, request.param, config.layers)

    @tiny.jit
    def measure(trained: masks.Flat) -> tuple[jax.Array, jax.Array, masks.Flat]:
        def loss(trained: masks.Flat) -> jax.Array:
            each = losses.member_losses(
                lm, masks.unflatten(trained)["prompt"], case.batch, None, loss=LOSS, prompt=case.prompt,
                verbalizers=[case.verbalizer], config=config, compute=FLOAT32,
            )  # fmt: skip
            return each.sum()

        bank = masks.unflatten(trained)["prompt"]
        feeds = losses.encode_labels([case.verbalizer], case.batch).fed_back
        ran = prompted_lm.run(lm, bank, case.batch, feeds, config=config, queries=case.verbalizer.steps + 2)
        outputs = prompted_lm.outputs(lm, bank, ran.hidden, case.batch.prompt_id)
        return outputs, *jax.value_and_grad(loss)(trained)

    trained = {f"prompt/{path}": jnp.asarray(leaf) for path, leaf in case.bank.items()}
    return Work(case, config.layers, trained, measure)


def test_logits_loss_and_gradients(golden: Path, work: Work):
    case, expected = work.case, work.case.arrays
    outputs, loss, grads = work.measure(work.trained)
    # Columns of the published code: five prompt positions, source, last unit, separator and labels.
    column = 5 + case.batch.source_length[:, None] + np.arange(case.verbalizer.steps + 2)
    logits = np.take_along_axis(expected["logits"], column[:, :, None], axis=1)
    assert relative(outputs, logits) < TOLERANCE
    tokens = int(expected["ntokens"])
    assert relative(loss * tokens, expected["loss_sum"]) < TOLERANCE
    named = dict(np.load(golden / "prompt" / f"{case.name}_grads.npz"))
    wanted = tree_of(named, work.layers)
    assert {f"prompt/{path}" for path in wanted} == set(grads)
    for path, leaf in wanted.items():
        assert relative(grads[f"prompt/{path}"] * tokens, leaf) < TOLERANCE, path


def test_five_adam_steps(golden: Path, work: Work):
    for suffix, clip in (("adam5", 1.0), ("adam5_clip0.05", 0.05)):
        file = golden / "prompt" / f"{work.case.name}_{suffix}.npz"
        if not file.exists():
            assert (suffix, work.case.name) != ("adam5_clip0.05", "b_linear24_multi")
            continue
        expected = dict(np.load(file))
        trained = work.trained
        tx = masks.masked(optim.make(dataclasses.replace(OPTIM, clip=clip), 10), trained, {})
        state, update = tx.init(trained), jax.jit(functools.partial(masks.apply_gradients, tx))
        norms: list[float] = []
        for step in range(1, 6):
            grads = work.measure(trained)[2]
            trained, state = update(state, trained, {}, grads)
            here = {
                path.removeprefix(f"step{step}/"): leaf for path, leaf in expected.items() if f"step{step}/" in path
            }
            for path, leaf in tree_of(here, work.layers).items():
                assert relative(trained[f"prompt/{path}"], leaf) < TOLERANCE, f"{path} after {step} steps"
            if f"gnorm_{step}" in expected:  # fairseq logs the mean over the updates so far, rounded to 3 decimals
                norms.append(float(optim.member_norms(grads)[0]))
                assert abs(np.mean(norms) - expected[f"gnorm_{step}"]) < 6e-4


def test_the_unused_input_prompt_is_not_needed(golden: Path):
    """A deep prompt imported with or without it gives the same outputs; it did not change in 80 updates either."""
    for name in CASES:
        named = dict(np.load(golden / "prompt" / f"{name}_grads.npz"))
        moved = dict(np.load(golden / "prompt" / f"{name}_adam5.npz"))
        path = "decoder.prefix_embed_prompts.weight"
        deep = "decoder.deep_key_embed_prompts.0.weight" in named
        assert named[path].any() != deep
        assert (moved[f"step5/{path}"] != moved[f"step1/{path}"]).any() != deep
