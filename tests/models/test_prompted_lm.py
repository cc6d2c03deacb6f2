"""Prompted forward passes: batches of mixed lengths and prompts against numpy (tests/models/tiny.py)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spjax import vocab
from spjax.models import prompted_lm, unit_lm, verbalizers
from spjax.models.prompts import PromptConfig
from spjax.types import KV
from tests.golden_data import relative
from tests.models import tiny

LENGTHS = (1, 2, 5, 9, 16, 12)
MEMBERS = (0, 2, 1, 1, 2, 0)
VARIANTS = {
    "deep": (3, PromptConfig(length=4)),
    "one layer, three separators, steered": (1, PromptConfig(length=2, separators=3, steer=True)),
    "two layers, shallow, two separators": (2, PromptConfig(length=3, deep=False, separators=2)),
    "shallow and steered": (3, PromptConfig(length=2, deep=False, steer=True)),
    "no prompt but the separator": (2, PromptConfig(length=0)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_batch_equals_each_utterance_alone(variant: str):
    layers, prompt = VARIANTS[variant]
    c, verbalizer = tiny.config(layers), verbalizers.learnable(tiny.TASK, 24)
    lm, bank = tiny.lm(c), tiny.bank(c, prompt, verbalizer, 3)
    units = tiny.utterances(c, LENGTHS)
    feeds = np.random.default_rng(1).integers(vocab.UNIT_OFFSET, c.vocab_size, (len(units), 2))
    tail = 1 + prompt.separators + feeds.shape[1]

    @tiny.jit
    def run(bank, batch, feeds):
        state = prompted_lm.run(lm, bank, batch, feeds, config=c, queries=tail)
        return state, prompted_lm.outputs(lm, bank, state.hidden, batch.prompt_id)

    # The bucket is longer than any utterance, and padding has valid units.
    batch = tiny.batch(units, 19, prompt_id=MEMBERS, fill=9)
    state, scores = run(bank, batch, feeds)
    plain, members = tiny.double(lm), [jax.tree.map(lambda a, n=n: a[n], tiny.double(bank)) for n in range(3)]
    for row, n in enumerate(MEMBERS):
        expected = tiny.hidden(plain, members[n], c, units[row], feeds[row])
        assert relative(state.hidden[row], expected) < 1e-5, f"utterance of {LENGTHS[row]} units"
        assert relative(scores[row], tiny.outputs(plain, members[n], expected)) < 1e-5
    np.testing.assert_array_equal(state.position, np.asarray(LENGTHS) + tail)
    np.testing.assert_array_equal(state.visible.sum(axis=1), np.asarray(LENGTHS) + prompt.length + tail)
    # The content of padding has no effect.
    again, _ = run(bank, tiny.batch(units, 19, prompt_id=MEMBERS), feeds)
    np.testing.assert_array_equal(again.hidden, state.hidden)


def test_a_batch_of_one_and_of_one_prompt_is_the_same():
    c, verbalizer = tiny.config(2), verbalizers.learnable(tiny.TASK, 24)
    lm, bank = tiny.lm(c), tiny.bank(c, PromptConfig(length=3, separators=2, steer=True), verbalizer, 3)
    units, nothing = tiny.utterances(c, LENGTHS), np.zeros((6, 0), np.int32)

    @tiny.jit
    def run(bank, batch, feeds):
        state = prompted_lm.run(lm, bank, batch, feeds, config=c, queries=1)
        return prompted_lm.outputs(lm, bank, state.hidden, batch.prompt_id)

    mixed = run(bank, tiny.batch(units, 16, prompt_id=MEMBERS), nothing)
    for row in (3, 4):
        member = jax.tree.map(lambda a, n=MEMBERS[row]: a[n : n + 1], bank)
        alone = run(member, tiny.batch([units[row]], len(units[row])), nothing[:1])
        assert relative(mixed[row], alone[0]) < 1e-5


def test_zero_offsets_change_nothing():
    c, verbalizer = tiny.config(2), verbalizers.identity(tiny.TASK, 24)
    lm, bank = tiny.lm(c), tiny.bank(c, PromptConfig(length=2, separators=2, steer=True), verbalizer, 1)
    batch, nothing = tiny.batch(tiny.utterances(c, LENGTHS), 16), jnp.zeros((6, 0), jnp.int32)
    run = tiny.jit(lambda bank: prompted_lm.run(lm, bank, batch, nothing, config=c, queries=1).hidden)
    with_zeros = run({**bank, "sep_deep": jnp.zeros_like(bank["sep_deep"])})
    without = run({name: leaf for name, leaf in bank.items() if name != "sep_deep"})
    np.testing.assert_array_equal(with_zeros, without)
    assert relative(run(bank), without) > 1e-2


def test_a_prefix_is_a_cache():
    c = tiny.config(3)
    lm = tiny.lm(c)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 11, c.dim)), jnp.float32)
    causal = np.tril(np.ones((1, 11, 11), bool))
    extend = tiny.jit(unit_lm.extend, static_argnums=1, static_argnames="queries")
    whole, kv = extend(lm, c, (x,), unit_lm.empty_prefix(c), causal)
    first, cache = extend(lm, c, (x[:, :7],), unit_lm.empty_prefix(c), causal[:, :7, :7])
    second, new = extend(lm, c, (x[:, 7:],), cache, causal[:, 7:])
    assert relative(jnp.concatenate([first, second], axis=1), whole) < 1e-5
    for old, more, all_of_it in zip(cache, new, kv, strict=True):
        assert relative(jnp.concatenate([old, more], axis=3), all_of_it) < 1e-5
    # The same in parts, and with the last columns only.
    split = (x[:, :2], x[:, 2:6], x[:, 6:])
    some, kv_of_parts = extend(lm, c, split, unit_lm.empty_prefix(c), causal, queries=6)
    assert some.shape == (2, 6, c.dim)
    assert relative(some, whole[:, 5:]) < 1e-5
    assert relative(kv_of_parts.key, kv.key) < 1e-5
    # A prefix can be shared by rows.
    shared = KV(cache.key[:, :1], cache.value[:, :1])
    both, _ = extend(lm, c, (jnp.concatenate([x[:1, 7:]] * 2),), shared, causal[:, 7:])
    assert relative(both, jnp.concatenate([whole[:1, 7:]] * 2)) < 1e-5


def test_cached_steps_equal_one_forward_pass():
    """Two alternatives for the first label and two tokens after the second of them, as a tree after one prefill."""
    c, verbalizer = tiny.config(2), verbalizers.identity(tiny.TASK, 24)
    lm, bank = tiny.lm(c), tiny.bank(c, PromptConfig(length=2), verbalizer, 1)
    units, nothing = tiny.utterances(c, (3, 8)), jnp.zeros((2, 0), jnp.int32)

    @tiny.jit
    def run(batch):
        state = prompted_lm.run(lm, bank, batch, nothing, config=c, queries=1)
        at = state.position[:, None]
        sees = jnp.eye(2, dtype=bool)
        state = prompted_lm.step(lm, state, jnp.asarray([[5, 6]]), sees, jnp.concatenate([at, at], axis=1), config=c)
        first = state.hidden
        sees = jnp.asarray([[False, True, True]])
        state = prompted_lm.step(lm, state, jnp.asarray([[7]]), sees, at + 1, config=c)
        embedded = unit_lm.embed_tokens(lm, jnp.asarray([[8]]))
        sees = jnp.asarray([[False, True, True, True]])
        state = prompted_lm.step(lm, state, jnp.asarray([[0]]), sees, at + 2, config=c, embedded=embedded)
        return first, state.hidden

    first, last = run(tiny.batch(units, 8))
    plain, member = tiny.double(lm), jax.tree.map(lambda a: a[0], tiny.double(bank))
    for row in range(2):
        assert relative(first[row, :1], tiny.hidden(plain, member, c, units[row], [5])[-1:]) < 1e-5
        assert relative(first[row, 1:], tiny.hidden(plain, member, c, units[row], [6])[-1:]) < 1e-5
        assert relative(last[row], tiny.hidden(plain, member, c, units[row], [6, 7, 8])[-1:]) < 1e-5
