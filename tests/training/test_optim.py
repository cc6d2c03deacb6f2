"""Adam against its formulas in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spjax.training import optim

PATHS = {"prompt/sep": (3, 2, 4), "prompt/key": (3, 5), "lm/embed": (4, 2)}


def _random(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {path: (random.normal(size=shape) * scale).astype(np.float32) for path, shape in PATHS.items()}


def _on_device(flat: dict[str, np.ndarray]) -> dict[str, jnp.ndarray]:
    return {path: jnp.asarray(leaf) for path, leaf in flat.items()}


def _adam(grads: list[np.ndarray], lr: float, b1: float, b2: float, eps: float, eps_before: bool) -> np.ndarray:
    """Sum of the updates, float64. eps_before: fairseq's step lr √(1-b2^t)/(1-b1^t) · m / (√v + eps)."""
    m = v = total = np.zeros(grads[0].shape)
    for t, g in enumerate(grads, 1):
        g = g.astype(np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        c1, c2 = 1 - b1**t, 1 - b2**t
        if eps_before:
            total = total - lr * np.sqrt(c2) / c1 * m / (np.sqrt(v) + eps)
        else:
            total = total - lr * (m / c1) / (np.sqrt(v / c2) + eps)
    return total


@pytest.mark.parametrize("eps_before", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_adam_against_the_formula(eps_before: bool, eps: float) -> None:
    config = optim.OptimConfig(
        lr=5e-3, warmup=0.0, decay="constant", eps=eps, eps_before_correction=eps_before, clip=0.0
    )
    tx = optim.make(config, 6)
    flat = _on_device(_random(0))
    state = tx.init(flat)
    grads = [_random(seed, 1e-2) for seed in range(1, 7)]
    total = {path: np.zeros(shape) for path, shape in PATHS.items()}
    for each in grads:
        updates, state = tx.update(_on_device(each), state, flat)
        total = {path: total[path] + np.asarray(updates[path], np.float64) for path in PATHS}
    for path in PATHS:
        expected = _adam([g[path] for g in grads], 5e-3, config.b1, config.b2, eps, eps_before)
        np.testing.assert_allclose(total[path], expected, rtol=1e-4, atol=1e-7)


def test_the_conventions_of_eps_differ_where_gradients_are_small() -> None:
    grads = [np.full(3, 1e-6)]
    after, before = (_adam(grads, 1.0, 0.9, 0.98, 1e-6, which) for which in (False, True))
    assert abs(after[0] / before[0]) > 3  # so the test above distinguishes them


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.floats(0.01, 100), st.floats(0.01, 10))
def test_each_member_is_clipped_by_its_norm(seed: int, scale: float, limit: float) -> None:
    grads = {path: leaf for path, leaf in _random(seed, scale).items() if path.startswith("prompt/")}
    grads["prompt/key"][1] = 0
    grads["prompt/sep"][1] *= 1e-6  # a member that needs no clipping next to two that may
    clipped, _ = optim.clip_members(limit).update(_on_device(grads), None)
    norms = np.asarray(optim.member_norms(_on_device(grads)))
    for n in range(3):
        own = np.sqrt(sum(np.sum(np.square(leaf[n], dtype=np.float64)) for leaf in grads.values()))
        assert norms[n] == pytest.approx(own, rel=1e-5)
        for path, leaf in grads.items():
            expected = leaf[n] * min(1.0, limit / (own + 1e-6))
            np.testing.assert_allclose(clipped[path][n], expected, rtol=1e-5, atol=1e-12)


def test_a_member_is_clipped_the_same_alone_and_in_a_bank() -> None:
    grads = {path: leaf for path, leaf in _on_device(_random(0, 3.0)).items() if path.startswith("prompt/")}
    clip = optim.clip_members(1.0)
    bank, _ = clip.update(grads, None)
    for n in range(3):
        alone, _ = clip.update({path: leaf[n : n + 1] for path, leaf in grads.items()}, None)
        for path in grads:
            np.testing.assert_allclose(alone[path][0], bank[path][n], rtol=1e-6)


def test_frozen_scalars_pass_through_the_clip() -> None:
    grads = {"prompt/sep": jnp.ones((2, 3)), "lm/embed": jnp.zeros(())}
    clipped, _ = optim.clip_members(1.0).update(grads, None)
    assert clipped["lm/embed"].shape == ()
    np.testing.assert_allclose(jnp.linalg.norm(clipped["prompt/sep"], axis=1), 1, rtol=1e-5)


def test_schedule_rises_in_warm_up_and_falls_to_zero() -> None:
    rate = optim.schedule(optim.OptimConfig(lr=2.0, warmup=0.1), 100)
    np.testing.assert_allclose([rate(i) for i in (0, 5, 10)], [0, 1, 2], atol=1e-6)
    np.testing.assert_allclose([rate(55), rate(100)], [1, 0], atol=1e-6)  # halfway down the cosine, and its end
    values = np.asarray([rate(i) for i in range(10, 101)])
    assert (np.diff(values) < 0).all()


def test_constant_schedule() -> None:
    flat = optim.schedule(optim.OptimConfig(lr=2.0, warmup=0.0, decay="constant"), 9)
    assert [float(flat(i)) for i in (0, 8)] == [2, 2]
    rate = optim.schedule(optim.OptimConfig(lr=2.0, warmup=0.5, decay="constant"), 8)
    np.testing.assert_allclose([rate(i) for i in (0, 2, 4, 7)], [0, 1, 2, 2])


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("decay", ["cosine", "constant"])
def test_the_shortest_runs_have_a_schedule(steps: int, decay: str) -> None:
    rate = optim.schedule(optim.OptimConfig(lr=1.0, warmup=0.5, decay=decay), steps)
    assert all(0 <= float(rate(i)) <= 1 for i in range(steps))
    assert any(float(rate(i)) > 0 for i in range(steps))


def test_weight_decay_leaves_vectors_alone() -> None:
    config = optim.OptimConfig(lr=1.0, warmup=0.0, decay="constant", weight_decay=0.1, clip=0.0)
    vectors = {"lm/final_norm/scale": jnp.ones(3), "lm/layers/ffn_norm/scale": jnp.ones((2, 3))}
    flat = {"lm/layers/key/kernel": jnp.ones((2, 3, 3)), **vectors}
    tx = optim.make(config, 1)
    updates, _ = tx.update({path: jnp.zeros(leaf.shape) for path, leaf in flat.items()}, tx.init(flat), flat)
    np.testing.assert_allclose(updates["lm/layers/key/kernel"], -0.1, rtol=1e-5)
    for path in vectors:
        np.testing.assert_allclose(updates[path], 0)


@pytest.mark.parametrize("eps_before", [False, True])
@settings(max_examples=6)
@given(taking_part=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6))
def test_a_member_of_a_bank_is_updated_the_same_as_alone(eps_before: bool, taking_part: list[list[bool]]) -> None:
    """Clipping, moments, step count, warm-up, decay and learning rate do not depend on other active members."""
    config = optim.OptimConfig(lr=1.0, warmup=0.3, clip=0.5, eps_before_correction=eps_before, weight_decay=0.1)
    steps, lrs, decays = [6, 9, 20], [1e-2, 5e-2, 2e-2], [0.1, 0.0, 0.3]
    bank = optim.make_bank(config, steps, lrs, decays)
    params = {path: leaf for path, leaf in _on_device(_random(0)).items() if path.startswith("prompt/")}
    state = bank.init(params)
    each = zip(steps, lrs, decays, strict=True)
    alone = [optim.make(dataclasses.replace(config, lr=lr, weight_decay=decay), total) for total, lr, decay in each]
    own = [{path: leaf[n : n + 1] for path, leaf in params.items()} for n in range(3)]
    states = [one.init(some) for one, some in zip(alone, own, strict=True)]
    for number, flags in enumerate(taking_part):
        who = np.flatnonzero(flags)
        grads = {path: leaf[who] for path, leaf in _on_device(_random(number + 1)).items() if path in params}
        some = jax.tree.map(lambda leaf: leaf[who], (params, state))  # noqa: B023
        updates, new = bank.update(grads, some[1], some[0])
        changed = optax.apply_updates(some[0], updates), new
        params, state = jax.tree.map(lambda all_, rows: all_.at[who].set(rows), (params, state), changed)  # noqa: B023
        for row, n in enumerate(who):
            mine = {path: leaf[row : row + 1] for path, leaf in grads.items()}
            updates, states[n] = alone[n].update(mine, states[n], own[n])
            own[n] = optax.apply_updates(own[n], updates)
    for n in range(3):
        for path, leaf in own[n].items():
            np.testing.assert_allclose(params[path][n], leaf[0], rtol=1e-5, atol=1e-7, err_msg=path)


def test_every_leaf_of_a_banks_optimizer_has_a_leading_bank_axis() -> None:
    for eps_before in (False, True):
        config = optim.OptimConfig(eps_before_correction=eps_before, weight_decay=0.1)
        state = optim.make_bank(config, [5, 5, 5], [1e-2] * 3).init(
            {path: leaf for path, leaf in _on_device(_random(0)).items() if path.startswith("prompt/")}
        )
        assert {leaf.shape[0] for leaf in jax.tree.leaves(state)} == {3}


@pytest.mark.parametrize("wrong", [{"decay": "linear"}, {"lr": 0.0}, {"warmup": 1.0}, {"warmup": -0.1}])
def test_invalid_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="optim: "):
        optim.OptimConfig(**wrong)
