"""Cost of a training step: no gradient and no optimizer state of the frozen LM; lowering for other devices."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export

from spjax.models import decode, unit_lm, verbalizers
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.prompts import PromptConfig
from spjax.tasks import TASKS
from spjax.training import losses, masks, optim, speed
from spjax.training.setting import Setting, first_params
from spjax.training.update import make_update
from spjax.types import Batch
from tests.models import tiny

# All sizes of the program are different, so that a shape identifies an array.
MEDIUM = UnitLMConfig(vocab_size=104, dim=208, layers=6, heads=4, ffn_dim=800)
ROWS, COLUMNS = 2, 9


def setting_of(config: UnitLMConfig, compute: Compute = unit_lm.FLOAT32) -> Setting:
    verbalizer = verbalizers.learnable(TASKS["fsc"], config.vocab_size)
    tree = decode.label_tree(verbalizer, [(0, 6, 20), (0, 7, 21), (1, 6, 22), (5, 19, 23)])
    return Setting(config, compute, PromptConfig(separators=2, steer=True), losses.LossConfig(), verbalizer, tree)


def lower_args(setting: Setting, trainable: str, members: int = 1) -> tuple[Any, Any, masks.Flat, Batch]:
    """(update, state, frozen, batch) as shapes; allocates no arrays."""

    def start() -> Any:
        lm = unit_lm.init(jax.random.key(0), setting.config)
        return first_params(lm, setting, tuple(range(members)))

    trained, frozen = masks.split(masks.flatten(jax.eval_shape(start)), trainable)
    tx = masks.masked(optim.make(optim.OptimConfig(), 100), trained, frozen)
    operand = setting.compute.operand
    frozen = {
        path: jax.ShapeDtypeStruct(leaf.shape, operand if path.endswith("kernel") else leaf.dtype)
        for path, leaf in frozen.items()
    }
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    rows = shape((members * ROWS,))
    state = {
        "trained": trained,
        "optimizer": jax.eval_shape(tx.init, {**trained, **frozen}),
        "step": shape(()),
        "seeds": jax.ShapeDtypeStruct((members,), jnp.uint32),
        "active": jax.ShapeDtypeStruct((members,), bool),
    }
    batch = Batch(
        source=shape((members * ROWS, COLUMNS)), source_length=rows, last=rows, classes=shape((members * ROWS, 3)),
        prompt_id=rows, weight=jax.ShapeDtypeStruct(rows.shape, jnp.float32), index=rows,
    )  # fmt: skip
    return jax.jit(make_update(setting, tx), donate_argnums=0), state, frozen, batch


@functools.cache
def traced(trainable: str, remat: bool = False) -> Any:
    update, *args = lower_args(setting_of(MEDIUM, Compute(remat=remat)), trainable)
    return update.trace(*args)


@functools.cache
def compiled(trainable: str) -> Any:
    return traced(trainable).lower().compile(compiler_options=tiny.QUICK)


def products(trainable: str) -> list[tuple[tuple[int, ...], int]]:
    """Sorted result sizes and total FLOPs of every matmul."""
    program = traced(trainable).jaxpr
    return [
        (tuple(sorted(size for size in shape if size > 1)), 2 * times * depth * math.prod(shape))
        for shape, depth, times in speed.products(program)
    ]


def test_no_matmul_of_a_prompt_step_is_a_gradient_of_the_lm():
    d, f, v = MEDIUM.dim, MEDIUM.ffn_dim, MEDIUM.vocab_size
    weights = {tuple(sorted(shape)) for shape in ((d, d), (d, f), (v, d))}
    assert not {shape for shape, _ in products("prompt/.*")} & weights
    assert {shape for shape, _ in products(".*")} >= weights, (
        "full fine-tuning has them: the test sees what it looks for"
    )


def test_a_prompt_step_takes_two_thirds_of_the_flops():
    """Forward and backward pass through the LM, without the gradients of its weights."""
    prompt, full = (sum(flops for _, flops in products(trainable)) for trainable in ("prompt/.*", ".*"))
    columns = ROWS * (COLUMNS + 1 + 2 + 2)  # source, last unit, separators, labels fed back
    dense = 2 * columns * MEDIUM.num_params
    assert prompt < 2 * dense, "first and last layer do less than all columns"
    assert 0.5 < prompt / full < 0.68
    # The same in the compiled program, which counts a loop's body once.
    counted = [compiled(trainable).cost_analysis()["flops"] for trainable in ("prompt/.*", ".*")]
    assert counted[0] / counted[1] < 0.68


def test_memory_has_no_frozen_gradient():
    weights = 4 * MEDIUM.num_params
    prompt, full = (compiled(trainable).memory_analysis() for trainable in ("prompt/.*", ".*"))
    assert full.temp_size_in_bytes - prompt.temp_size_in_bytes > 0.7 * weights
    # A full step returns the LM and Adam's two moments of it; a prompt step only those of the prompts.
    assert full.output_size_in_bytes > 3 * weights
    assert prompt.output_size_in_bytes < 0.1 * weights
    for memory in (prompt, full):
        assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes, "the state is updated in place"


@pytest.mark.parametrize("trainable", ["prompt/.*", "prompt/(key|value)", ".*"])
def test_the_optimizer_has_state_of_trained_leaves_only(trainable: str):
    _, state, frozen, _ = lower_args(setting_of(MEDIUM), trainable)
    moments = [leaf.shape for leaf in jax.tree.leaves(state["optimizer"]) if leaf.ndim]
    expected = [leaf.shape for leaf in state["trained"].values()] * 2
    assert sorted(moments) == sorted(expected)
    assert bool(frozen) == (trainable != ".*")


def test_remat_is_optional():
    # Attention is always rematerialised; with remat the full layer.
    counts = [
        sum(
            "remat" in e.primitive.name or "checkpoint" in e.primitive.name
            for e, _ in speed.equations(program.jaxpr.jaxpr)
        )
        for program in (traced("prompt/.*", remat=True), traced("prompt/.*"))
    ]
    assert counts[0] > counts[1] > 0


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_full_size_step_lowers_for(platform: str, dtype: str):
    """Three prompts in a bank with the published architecture; and the scores of its label combinations."""
    setting = setting_of(UnitLMConfig(), Compute(dtype))
    update, *args = lower_args(setting, "prompt/.*", members=3)
    exported = export.export(update, platforms=[platform])(*args)
    assert exported.platforms == (platform,)
    text = exported.mlir_module()
    assert ("bf16" in text) == (dtype == "bfloat16")
    state, frozen, batch = args

    @jax.jit
    def score(flat: masks.Flat, batch: Batch) -> jax.Array:
        params = masks.unflatten(flat)
        return decode.score(
            params["lm"], params["prompt"], batch, [setting.tree], config=setting.config, compute=setting.compute,
        )  # fmt: skip

    exported = export.export(score, platforms=[platform])({**state["trained"], **frozen}, batch)
    assert exported.out_avals[0].shape == (3 * ROWS, 4)
