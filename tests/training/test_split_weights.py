"""A sharded LM on eight devices: equal results, layer-wise all-gathers, and no communication of frozen gradients.

The devices are made by a process of their own, which this file is run as.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# (model, shards) of eight devices; the rest is data parallel
MESHES = {"whole": (1, 1), "pieces": (1, 0), "both": (2, 2), "model": (4, 1), "all": (2, 0)}
DIM, LAYERS, FFN = 64, 5, 256


GATED = {
    "kv_heads": 2, "norm": "rms", "positions": "rotary", "activation": "swiglu", "ffn_bias": False, "tied": False,
    "scale_embedding": False,
}  # fmt: skip


def _measure(
    trainable: str, dtype: str, remat: bool, lr: float, block: dict[str, Any], model: int, shards: int
) -> dict[str, Any]:
    """Losses of some steps, scores after them, and memory and collectives of the compiled step."""
    import jax
    import jax.numpy as jnp

    from spjax.data import loader
    from spjax.data import plan as planning
    from spjax.models import decode, unit_lm, verbalizers
    from spjax.models.config import Compute, UnitLMConfig
    from spjax.models.prompts import PromptConfig
    from spjax.training import losses, masks, optim, sharding
    from spjax.training.evaluator import Evaluator
    from spjax.training.setting import Setting, first_params
    from spjax.training.update import make_update
    from tests import toy

    config = UnitLMConfig(dim=DIM, layers=LAYERS, heads=4, ffn_dim=FFN, **block)
    verbalizer = verbalizers.learnable(toy.TASK, config.vocab_size)
    prompt = PromptConfig(length=8, separators=2, steer=True, rank=2, alpha=2.0, targets=tuple(config.kernels))
    setting = Setting(
        config, Compute(dtype, remat), prompt, losses.LossConfig(), verbalizer, decode.label_tree(verbalizer, None)
    )
    units, mesh = toy.unit_set("toy", 64, 0), sharding.make_mesh(model, shards)
    params = first_params(jax.device_get(unit_lm.init(jax.random.key(0), config)), setting, (0,))
    trained, frozen = masks.split(masks.flatten(params), trainable)
    tx = masks.masked(optim.make(optim.OptimConfig(lr=lr), 10), trained, frozen)
    state = {"trained": trained, "optimizer": tx.init({**trained, **frozen}), "step": jnp.zeros(1, jnp.int32)}
    state |= {"seeds": jnp.zeros(1, jnp.uint32), "active": jnp.ones(1, bool)}
    where = sharding.state_shardings(mesh, state)
    state, frozen = (
        sharding.place(state, where),
        sharding.place_frozen(mesh, frozen, dtype if frozen else "float32"),
    )
    step = jax.jit(make_update(setting, tx, mesh=mesh), donate_argnums=0, out_shardings=(where, None))
    plan = planning.plan(
        units.lengths, seed=0, epoch=0, buckets=(16,), max_rows=16, row_multiple=16, max_tokens=4096
    )  # fmt: skip
    found, compiled = [], None
    for batch in loader.batches(units, plan):
        laid = sharding.shard_rows(mesh, batch)
        compiled = compiled or step.lower(state, frozen, laid, None).compile()
        state, metrics = compiled(state, frozen, laid, None)
        found.append(float(metrics["loss"][0]))
    evaluator = Evaluator(setting, units, plan, mesh)
    scores = evaluator.log_probs({**state["trained"], **frozen})
    assert compiled is not None
    arrays = re.findall(
        r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text()
    )
    sent = [
        (kind, [int(n) for n in dims.split(",") if n])
        for dims_text, kind in arrays
        for dims in re.findall(r"\[([\d,]*)\]", dims_text)
    ]
    memory = compiled.memory_analysis()
    kept = sharding.fetch(state["trained"])
    return {
        "losses": found,
        "scores": scores.tolist(),
        "trained": {path: float(np.abs(leaf).sum()) for path, leaf in kept.items()},
        "sent": sent,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }


def _all(*sizes: Any, count: int = len(MESHES), block: dict[str, Any] | None = None) -> dict[str, Any]:
    """Results of `_measure` on the first `count` meshes for (trainable, dtype, remat, learning rate)."""
    code = [sys.executable, "-m", "tests.training.test_split_weights", json.dumps([count, *sizes, block or {}])]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(code, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _assert_the_same(found: dict[str, Any], rtol: float, atol: float) -> None:
    for name in found:
        np.testing.assert_allclose(found[name]["losses"], found["whole"]["losses"], rtol=rtol, err_msg=name)
        np.testing.assert_allclose(found[name]["scores"], found["whole"]["scores"], atol=atol, err_msg=name)
        # Outputs do not depend on the key bias: its gradient is rounding noise, which Adam normalises.
        for path, size in found["whole"]["trained"].items():
            if path == "lm/layers/key/bias":
                continue
            np.testing.assert_allclose(found[name]["trained"][path], size, rtol=1e2 * rtol, err_msg=f"{name} {path}")


def _assert_layer_by_layer(one: dict[str, Any]) -> None:
    """At most one layer of frozen kernels is gathered at a time, and no all-reduce has their shape."""
    for kind, dims in one["sent"]:
        size = math.prod(dims)
        if kind == "all-gather":
            assert size <= DIM * FFN, dims
        elif kind != "all-reduce" or sorted(dims)[-2:] in ([DIM, DIM], [DIM, FFN]):
            raise AssertionError(f"{kind} of {dims}")


def _assert_pieces(found: dict[str, Any]) -> None:
    kernels = 4 * LAYERS * (4 * DIM * DIM + 2 * DIM * FFN)  # bytes
    for name, devices in (("pieces", 8), ("both", 4), ("model", 4), ("all", 8)):
        if name in found:
            one, whole = found[name], found["whole"]
            _assert_layer_by_layer(one)
            assert one["arguments"] == pytest.approx(whole["arguments"] - kernels * (1 - 1 / devices), rel=0.02)
            # Gathered kernels are not saved for the backward pass: at most two full layers exist at a time.
            assert one["temporaries"] < whole["temporaries"] + 2 * kernels / LAYERS, name
    assert {kind for kind, _ in found["whole"]["sent"]} == {"all-reduce"}
    assert "all-gather" in {kind for kind, _ in found["pieces"]["sent"]}


@pytest.mark.slow
@pytest.mark.distributed
def test_sharded_frozen_weights() -> None:
    found = _all("prompt/.*", "float32", False, 1e-2, count=2)
    _assert_the_same(found, 1e-5, 1e-4)
    _assert_pieces(found)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_gated_lm_with_shared_key_heads() -> None:
    """Rotary positions, two key heads on two devices that compute a layer together, three feed-forward kernels."""
    found = _all("prompt/.*", "float32", False, 1e-2, count=3, block=GATED)
    _assert_the_same(found, 1e-5, 1e-4)
    for name in ("pieces", "both"):
        _assert_layer_by_layer(found[name])
        assert "all-gather" in {kind for kind, _ in found[name]["sent"]}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("remat", [False, True])
def test_frozen_weights_on_every_mesh(remat: bool) -> None:
    found = _all("prompt/.*", "float32", remat, 1e-2)
    _assert_the_same(found, 1e-5, 1e-4)
    _assert_pieces(found)


@pytest.mark.slow
@pytest.mark.distributed
def test_sharded_bfloat16_and_trained_weights() -> None:
    found = _all("prompt/.*", "bfloat16", False, 1e-2)
    _assert_the_same(found, 2e-3, 0.05)
    _assert_layer_by_layer(found["pieces"])
    # Kernels that are cast after the all-gather are not saved for the backward pass either.
    narrow = _all(".*", "bfloat16", False, 1e-4, count=2)
    _assert_the_same(narrow, 2e-3, 0.05)
    kernels = 2 * LAYERS * (4 * DIM * DIM + 2 * DIM * FFN)
    temporaries = [narrow[name]["temporaries"] for name in ("whole", "pieces")]
    assert temporaries[1] < temporaries[0] + kernels / 2, temporaries
    # A small learning rate, since Adam's first steps are equally large for gradients that are rounding noise.
    _assert_the_same(_all(".*", "float32", False, 1e-4), 1e-5, 1e-4)


if __name__ == "__main__":
    count, *sizes = json.loads(sys.argv[1])
    print(json.dumps({name: _measure(*sizes, *MESHES[name]) for name in [*MESHES][:count]}))
