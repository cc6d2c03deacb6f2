"""Loss and gradient of a bank: against the definition, single members, rematerialisation, and bfloat16."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spjax import vocab
from spjax.models import low_rank, prompted_lm, prompts, verbalizers
from spjax.models.config import Compute
from spjax.models.prompts import PromptConfig
from spjax.models.unit_lm import FLOAT32
from spjax.training import losses
from spjax.training.losses import LossConfig
from spjax.types import Batch
from tests.golden_data import relative
from tests.models import tiny

C = tiny.config(3)
N = 3
VERBALIZER = verbalizers.learnable(tiny.TASK, C.vocab_size)
PROMPT = PromptConfig(
    length=3,
    separators=2,
    steer=True,
    dropout=0.3,
    verbalizer_dropout=0.2,
    rank=2,
    alpha=2.0,
    lora_dropout=0.2,
    targets=("query", "ffn_out"),
)
LENGTHS = (3, 8, 1) * N
PLAIN, NOISY = LossConfig(), LossConfig(noise=0.3)


@functools.cache
def measure(loss: LossConfig = NOISY, compute: Compute = FLOAT32) -> Any:
    """(bank, batch, keys) -> losses [N], gradient of their sum."""
    lm = tiny.lm(C)

    def total(bank, batch, keys):
        each = losses.member_losses(
            lm, bank, batch, keys, loss=loss, prompt=PROMPT, verbalizers=[VERBALIZER], config=C, compute=compute
        )
        return each.sum(), each

    def run(bank, batch, keys):
        (_, each), grads = jax.value_and_grad(total, has_aux=True)(bank, batch, keys)
        return each, grads

    return tiny.jit(run)


@functools.cache
def setting() -> tuple[Any, Batch, jax.Array]:
    """A bank, three rows per member of which the third is padding, and a key per member."""
    classes = tiny.random_classes(tiny.TASK, N * 3)
    batch = tiny.batch(tiny.utterances(C, LENGTHS), 10, classes, np.repeat(np.arange(N), 3))
    filling = np.arange(N * 3) % 3 == 2
    batch = batch._replace(
        weight=np.where(filling, 0, 1).astype(np.float32), classes=np.where(filling[:, None], 0, classes)
    )
    return tiny.bank(C, PROMPT, VERBALIZER, N), batch, jax.random.split(jax.random.key(7), N)


def plain_losses(bank: Any, batch: Batch) -> np.ndarray:
    params, banks = tiny.double(tiny.lm(C)), tiny.double(bank)
    for target in PROMPT.targets:
        banks[f"{target}_b"] = banks[f"{target}_b"] * PROMPT.alpha / PROMPT.rank
    found = np.zeros((N, 2))
    for row, units in enumerate(tiny.utterances(C, LENGTHS)):
        if batch.weight[row]:
            n = batch.prompt_id[row]
            member = jax.tree.map(lambda a, n=n: a[n], banks)
            score = tiny.answer_score(params, member, C, VERBALIZER, units, batch.classes[row])
            found[n] += -score / VERBALIZER.steps, 1
    return found[:, 0] / found[:, 1]


def test_loss_and_gradient_by_definition():
    bank, batch, _ = setting()
    each, grads = measure(LossConfig())(bank, batch, None)
    assert relative(each, plain_losses(bank, batch)) < 1e-5
    # Directional derivatives of each leaf from the definition in float64.
    rng, step = np.random.default_rng(0), 1e-5
    for name, leaf in tiny.double(bank).items():
        direction = rng.normal(size=leaf.shape)
        ahead, behind = ({**tiny.double(bank), name: leaf + sign * step * direction} for sign in (1, -1))
        slope = (plain_losses(ahead, batch) - plain_losses(behind, batch)).sum() / (2 * step)
        assert relative(np.sum(np.asarray(grads[name]) * direction), slope) < 1e-4, name
        assert np.abs(grads[name]).max() > 1e-4, name


def test_a_bank_equals_its_members_alone():
    """With dropout and noise, loss and gradient of a member depend only on its rows, prompt and key."""
    bank, batch, keys = setting()
    each, grads = measure()(bank, batch, keys)
    undisturbed = plain_losses(bank, batch)
    assert (np.abs(each - undisturbed) > 1e-3).all(), "dropout and noise do something"
    for n in range(N):
        own = slice(3 * n, 3 * n + 3)
        rows = jax.tree.map(lambda a, own=own: a[own], batch)._replace(prompt_id=np.zeros(3, np.int32))
        member = jax.tree.map(lambda a, n=n: a[n : n + 1], bank)
        alone, own_grads = measure()(member, rows, keys[n : n + 1])
        assert relative(alone[0], each[n]) < 1e-5
        for name, leaf in own_grads.items():
            assert relative(leaf[0], grads[name][n]) < 1e-5, name
    other, _ = measure()(bank, batch, keys.at[1].set(jax.random.key(8)))
    np.testing.assert_array_equal(other[jnp.asarray([0, 2])], each[jnp.asarray([0, 2])])
    assert other[1] != each[1]


def test_rematerialisation_changes_nothing():
    bank, batch, keys = setting()
    each, grads = measure()(bank, batch, keys)
    again, recomputed = measure(compute=Compute(remat=True))(bank, batch, keys)
    assert relative(again, each) < 1e-5
    for name, leaf in recomputed.items():
        assert relative(leaf, grads[name]) < 1e-5, name


def test_bfloat16_is_close():
    bank, batch, keys = setting()
    each, grads = measure()(bank, batch, keys)
    near, rounded = measure(compute=Compute("bfloat16"))(bank, batch, keys)
    assert near.dtype == jnp.float32
    assert 1e-6 < relative(near, each) < 3e-2
    for name, leaf in rounded.items():
        assert leaf.dtype == jnp.float32, name
        cosine = np.vdot(leaf, grads[name]) / (np.linalg.norm(leaf) * np.linalg.norm(grads[name]))
        assert cosine > 0.995, name


def test_a_member_with_only_padding_rows_has_no_loss():
    bank, batch, keys = setting()
    weight = np.where(batch.prompt_id == 1, 0, batch.weight).astype(np.float32)
    each, grads = measure()(bank, batch._replace(weight=weight), keys)
    assert each[1] == 0
    for name, leaf in grads.items():
        assert np.isfinite(leaf).all(), name
        assert not np.asarray(leaf[1]).any(), name


def test_dropout_is_one_mask_per_member_and_keeps_the_mean():
    ones = {name: jnp.ones((2, 3, 40, 16)) for name in ("key", "value")} | {"sep": jnp.ones((2, 1, 16))}
    keys = jax.random.split(jax.random.key(0), 2)
    found = prompts.dropout(ones, 0.25, keys)
    for name in ("key", "value"):
        assert {0.0, float(np.float32(1 / 0.75))} == set(np.unique(found[name]).tolist())
        assert abs(float(found[name].mean()) - 1) < 0.05
    assert (found["key"] != found["value"]).any()
    assert (found["key"][0] != found["key"][1]).any()
    assert found["sep"] is ones["sep"]
    shallow = {"input": jnp.ones((2, 3, 16)), "sep": jnp.ones((2, 1, 16))}
    assert prompts.dropout(shallow, 0.25, keys) is shallow
    assert prompts.dropout(ones, 0.0, keys) is ones
    each = prompts.dropout(ones, jnp.asarray([0.25, 0.0]), keys)
    np.testing.assert_array_equal(each["key"][0], found["key"][0])
    np.testing.assert_array_equal(each["key"][1], ones["key"][1])


def test_noise_replaces_units_only():
    units = tiny.utterances(C, [200] * 6)
    batch = tiny.batch(units, 256)
    keys = jax.random.split(jax.random.key(3), 2)
    found = np.asarray(losses.replace_units(batch, keys, 0.25, C).source)
    specials = batch.source < vocab.UNIT_OFFSET
    np.testing.assert_array_equal(found[specials], batch.source[specials])
    assert found[~specials].min() >= vocab.UNIT_OFFSET
    assert found.max() < C.vocab_size
    changed = (found != batch.source)[~specials].mean()
    assert abs(changed - 0.25 * (1 - 1 / C.num_units)) < 0.04
    assert losses.replace_units(batch, keys, 0.0, C) is batch


RATES = {
    "dropout": (0.2, 0.0, 0.4),
    "verbalizer_dropout": (0.0, 0.3, 0.1),
    "lora_dropout": (0.3, 0.1, 0.0),
    "noise": (0.1, 0.0, 0.3),
    "label_smoothing": (0.0, 0.2, 0.1),
}


def test_members_with_different_rates_equal_themselves_alone():
    """In one program, loss and gradient of each equal those of a bank of one with its rates, including 0."""
    c = tiny.config(1)
    shape, (_, batch, keys) = PromptConfig(length=2, rank=2), setting()
    bank, lm = tiny.bank(c, shape, VERBALIZER, N), tiny.lm(c)

    def run(bank, batch, keys, prompt, loss, differing=None):
        def total(bank):
            each = losses.member_losses(
                lm, bank, batch, keys, loss=loss, prompt=prompt, verbalizers=[VERBALIZER], config=c, compute=FLOAT32,
                differing=differing,
            )  # fmt: skip
            return each.sum(), each

        return jax.value_and_grad(total, has_aux=True)(bank)

    own = lambda tree, n, rows: jax.tree.map(lambda leaf: leaf[n * rows : (n + 1) * rows], tree)  # noqa: E731
    batch = batch._replace(prompt_id=None)

    @tiny.jit
    def both(bank, batch, keys):
        values = {name: rates[1] for name, rates in RATES.items()}
        loss = LossConfig(**{name: values.pop(name) for name in ("noise", "label_smoothing")})
        prompt = dataclasses.replace(shape, **values)
        alone = run(own(bank, 1, 1), own(batch, 1, 3), keys[1:2], prompt, loss)
        return run(bank, batch, keys, shape, PLAIN, RATES), alone

    ((_, each), grads), ((_, loss), found) = both(bank, batch, keys)
    assert relative(each[1], loss[0]) < 1e-5
    for name, leaf in found.items():
        assert relative(grads[name][1], leaf[0]) < 1e-5, name


def test_smoothed_labels_equal_optax():
    bank, batch, keys = setting()
    lm, steps = tiny.lm(C), VERBALIZER.steps
    config = dataclasses.replace(PROMPT, dropout=0.0, verbalizer_dropout=0.0, lora_dropout=0.0)
    common = {"prompt": config, "verbalizers": [VERBALIZER], "config": C, "compute": FLOAT32}

    @tiny.jit
    def run(bank, batch, keys):
        loss = LossConfig(label_smoothing=0.3)
        smooth, measured = (losses.member_losses(lm, bank, batch, one, loss=loss, **common) for one in (keys, None))
        plain = losses.member_losses(lm, bank, batch, None, loss=PLAIN, **common)
        labels = losses.encode_labels([VERBALIZER], batch)
        bank = low_rank.scaled(bank, config.scale)
        state = prompted_lm.run(lm, bank, batch, labels.fed_back[:, :-1], config=C, queries=steps)
        return smooth, measured, plain, labels, prompted_lm.outputs(lm, bank, state.hidden, batch.prompt_id)

    smooth, measured, plain, labels, scores = run(bank, batch, keys)
    expected = np.zeros((N, 3))
    for k, slot in enumerate(tiny.TASK.slots):
        allowed = np.flatnonzero(labels.allowed[0, k])
        assert len(allowed) == len(slot.labels)
        hot = (np.asarray(labels.targets)[:, k, None] == allowed).astype(np.float32)
        smoothed = optax.smooth_labels(hot, 0.3)
        expected += np.asarray(optax.softmax_cross_entropy(scores[:, k, allowed], smoothed)).reshape(N, 3)
    real = np.asarray(batch.weight).reshape(N, 3) > 0
    np.testing.assert_allclose(smooth, np.where(real, expected, 0).sum(1) / real.sum(1) / steps, rtol=1e-5)
    np.testing.assert_array_equal(plain, measured)  # the valid loss has no smoothing
    assert not np.allclose(smooth, plain, rtol=0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "golden"}, "must be slots or reference"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0, must be in"),
        ({"kind": "reference", "label_smoothing": 0.1}, "kind='reference' lacks: give kind='slots'"),
    ],
)
def test_invalid_losses_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**wrong)
