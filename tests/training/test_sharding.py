"""Shardings of parameters on one device; several devices: tests/test_main.py."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from spjax.models import prompts, verbalizers
from spjax.models.config import UnitLMConfig
from spjax.models.prompts import PromptConfig
from spjax.training import masks, optim, sharding
from spjax.types import Batch
from tests import toy


def _params() -> dict:
    lm, verbalizer = toy.tiny_lm(), verbalizers.learnable(toy.TASK, 104)
    members = [
        prompts.init_member(jax.random.key(0), PromptConfig(deep=deep, steer=True), toy.LM, verbalizer, lm["embed"])
        for deep in (True, False)
    ]
    return {"lm": lm, "prompt": prompts.stack([members[0]]) | prompts.stack([members[1]])}


def test_every_parameter_has_a_rule_and_fits_it() -> None:
    for path, leaf in masks.flatten(_params()).items():
        assert len(sharding.spec_of(path)) <= np.ndim(leaf), path


def test_a_layer_is_split_by_heads_and_feed_forward() -> None:
    assert sharding.spec_of("lm/layers/query/kernel") == P(None, "shard", "model")
    assert sharding.spec_of("lm/layers/ffn_out/kernel") == P(None, "model", "shard")
    assert sharding.spec_of("lm/layers/out/bias") == P()
    assert sharding.spec_of("prompt/key") == P(sharding.BATCH)


def test_weights_of_other_blocks_have_rules() -> None:
    config = UnitLMConfig(
        dim=8, heads=4, kv_heads=2, embed_dim=4, positions="learned", max_positions=9, activation="swiglu", tied=False
    )
    for path, shape in config.shapes.items():
        assert len(sharding.spec_of(f"lm/{path}")) <= len(shape), path
    four = SimpleNamespace(shape={"data": 1, "shard": 1, "model": 4})
    with pytest.raises(ValueError, match="LM of 2 key and value heads is not divisible by model_parallel=4"):
        sharding.check_lm(four, config)


@pytest.mark.parametrize("path", ["lm/layers/gate/kernel", "head/kernel", "lm", "lm/embed/more"])
def test_an_unknown_parameter_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=f"no rule for parameter '{path}'"):
        sharding.spec_of(path)


def test_optimizer_state_has_the_shardings_of_its_parameters() -> None:
    mesh = sharding.make_mesh()
    trained, frozen = masks.split(masks.flatten(_params()), ".*")
    tx = masks.masked(optim.make(optim.OptimConfig(), 3), trained, frozen)
    state = {"trained": trained, "optimizer": tx.init(trained), "step": jnp.zeros((), jnp.int32)}
    where = sharding.state_shardings(mesh, state)
    found = [(jax.tree_util.keystr(path), leaf.spec) for path, leaf in jax.tree_util.tree_leaves_with_path(where)]
    for parameter, spec in (("lm/layers/query/kernel", P(None, "shard", "model")), ("prompt/sep", P(sharding.BATCH))):
        specs = [lies for path, lies in found if f"'{parameter}'" in path]
        assert specs == [spec] * 3  # itself and its two moments
    assert where["step"].spec == P()


def test_a_bank_is_sharded_like_its_rows_if_divisible() -> None:
    four = SimpleNamespace(shape={"data": 2, "shard": 2, "model": 3})
    batch = Batch(*(np.zeros(24, np.int32) for _ in range(7)))
    for members, major in ((1, True), (2, True), (3, False), (4, True), (6, False), (8, True)):
        assert (sharding.member_major(four, batch, members).prompt_id is None) == major
        spec = sharding._spec(four, "prompt/key", np.zeros((members, 5)))
        assert spec == (P(sharding.BATCH) if members % 4 == 0 else P())
    assert sharding.member_major(None, batch, 3).prompt_id is None


def test_the_number_of_devices_must_be_divisible() -> None:
    devices = jax.device_count()
    with pytest.raises(ValueError, match=f"{devices} devices are not divisible by model_parallel={devices + 1}"):
        sharding.make_mesh(devices + 1)
    with pytest.raises(ValueError, match=f"= {devices} is not divisible by weight_shards={devices + 1}"):
        sharding.make_mesh(1, devices + 1)
    assert dict(sharding.make_mesh(1, 0).shape) == {"data": 1, "shard": devices, "model": 1}


def test_place_and_fetch_are_inverse() -> None:
    mesh = sharding.make_mesh()
    tree = {"prompt/sep": np.arange(6, dtype=np.float32).reshape(2, 3)}
    placed = sharding.place(tree, sharding.shardings(mesh, tree))
    assert np.array_equal(sharding.fetch(placed)["prompt/sep"], tree["prompt/sep"])
    rows = np.arange(8 * jax.device_count())
    assert np.array_equal(sharding.fetch(sharding.shard_rows(mesh, rows)), rows)


def test_an_error_of_process_zero_is_raised() -> None:
    def work() -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        sharding.on_process_zero("the records", work)
    done: list[int] = []
    sharding.on_process_zero("the records", lambda: done.append(1))
    assert done == [1]
