"""LoRA adapters: against PEFT and merged kernels, in banks of different members, and dropout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spjax.models import decode, low_rank, prompted_lm, prompts, verbalizers
from spjax.models.prompts import PromptConfig
from spjax.models.unit_lm import FLOAT32
from spjax.training import losses, masks, optim
from spjax.training.losses import LossConfig
from spjax.types import Batch, Params
from tests.golden_data import relative
from tests.models import tiny

C = tiny.config(3)
VERBALIZER = verbalizers.learnable(tiny.TASK, C.vocab_size)
PEFT = np.load(Path(__file__).parents[1] / "golden" / "lora.npz")
PEFT_CASES = {  # as in tests/golden/make_lora.py
    "all": PromptConfig(length=0, rank=4, alpha=8.0),
    "query_value": PromptConfig(length=0, rank=2, alpha=1.0, targets=("query", "value")),
    "both": PromptConfig(length=2, separators=2, rank=3, alpha=3.0),
}
LENGTHS = (3, 8, 1, 5)


def rows(members: int = 1, columns: int = 10, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    """The same utterances for every member, member-major."""
    classes = np.tile(tiny.random_classes(tiny.TASK, len(lengths)), (members, 1))
    named = np.repeat(np.arange(members), len(lengths))
    return tiny.batch(tiny.utterances(C, lengths) * members, columns, classes, named)


@functools.cache
def measure(config: PromptConfig, scales: tuple[float, ...] | None = None) -> Any:
    """(bank, batch, keys) -> losses [N], gradient of their sum."""

    def total(bank: Params, batch: Batch, keys: Any) -> Any:
        each = losses.member_losses(
            tiny.lm(C), bank, batch, keys, loss=LossConfig(), prompt=config, verbalizers=[VERBALIZER], config=C,
            compute=FLOAT32, differing={"scale": scales} if scales else None,
        )  # fmt: skip
        return each.sum(), each

    def run(bank: Params, batch: Batch, keys: Any) -> Any:
        (_, each), grads = jax.value_and_grad(total, has_aux=True)(bank, batch, keys)
        return each, grads

    return tiny.jit(run)


# ---- PEFT


@pytest.mark.parametrize("name", PEFT_CASES)
def test_forward_gradients_and_adam_steps_equal_peft(name: str) -> None:
    config = PEFT_CASES[name]
    bank, batch = tiny.bank(C, config, VERBALIZER, 1), rows()
    expected = lambda kind: {key: PEFT[f"{name}/{kind}/{key}"] for key in bank}  # noqa: E731
    feeds = losses.encode_labels([VERBALIZER], batch).fed_back[:, :-1]
    run = tiny.jit(functools.partial(prompted_lm.run, config=C, queries=VERBALIZER.steps))
    ran = run(tiny.lm(C), low_rank.scaled(bank, config.scale), batch, feeds)
    assert relative(ran.hidden, PEFT[f"{name}/hidden"]) < 1e-5
    tx = optim.make_bank(optim.OptimConfig(warmup=0.0, decay="constant", clip=0.0), [5], [3e-3])
    trained = {f"prompt/{key}": leaf for key, leaf in bank.items()}
    tx = masks.masked(tx, trained, {})
    state = tx.init(trained)
    step = tiny.jit(lambda state, trained, grads: masks.apply_gradients(tx, state, trained, {}, grads))
    for number in range(5):
        each, grads = measure(config)(masks.unflatten(trained)["prompt"], batch, None)
        if not number:
            assert relative(each[0], PEFT[f"{name}/loss"]) < 1e-5
            for key, grad in expected("grad").items():
                assert relative(grads[key][0], grad) < 1e-5, key
        trained, state = step(state, trained, {f"prompt/{key}": grad for key, grad in grads.items()})
    for key, leaf in expected("after").items():
        moved = np.abs(leaf - np.asarray(bank[key][0])).max()
        assert moved > 3e-3, "what is compared has moved"
        np.testing.assert_allclose(trained[f"prompt/{key}"][0], leaf, rtol=0, atol=1e-5, err_msg=key)


def test_the_init_equals_peft() -> None:
    """A is uniform within 1 / sqrt(in), as torch initialises a Linear, and B is zero."""
    config = PromptConfig(length=0, rank=8)
    new = functools.partial(prompts.init_member, lm=C, verbalizer=VERBALIZER, embed=jnp.zeros((C.vocab_size, C.dim)))
    tree = new(jax.random.key(0), config)
    assert prompts.shape_of(tree) == {
        "length": 0, "deep": True, "separators": 1, "steer": False, "rank": 8, "targets": low_rank.TARGETS
    }  # fmt: skip
    for target, (size, _) in C.kernels.items():
        a = np.asarray(tree[f"{target}_a"])
        assert 0.9 < np.abs(a).max() * size**0.5 <= 1
        assert abs(a.std() * (3 * size) ** 0.5 - 1) < 0.15
        assert not np.asarray(tree[f"{target}_b"]).any()
    fewer = new(jax.random.key(0), PromptConfig(length=3, rank=8, targets=("value", "out")))
    assert {"key", "value"} < set(fewer)
    np.testing.assert_array_equal(fewer["out_a"], tree["out_a"])
    plain = new(jax.random.key(0), PromptConfig(length=3))
    assert low_rank.targets_of(plain) == ()
    for name, leaf in plain.items():
        np.testing.assert_array_equal(leaf, fewer[name], err_msg="prompts start as without adapters")


# ---- merged, mixed


def test_a_merged_lm_equals_the_adapted_one() -> None:
    """W + scale A^T B in place of W, with the same prompts: scores of all label combinations, with cached steps."""
    config = PromptConfig(length=3, rank=2, alpha=3.0, separators=2, steer=True)
    bank, batch = tiny.bank(C, config, VERBALIZER, 1), rows()
    score = tiny.jit(functools.partial(decode.score, trees=[decode.label_tree(VERBALIZER, None)], config=C))
    nothing = low_rank.scaled(bank, 0.0)
    lm = tiny.merged(tiny.lm(C), jax.tree.map(lambda leaf: leaf[0], bank), config.scale)
    found = score(tiny.lm(C), low_rank.scaled(bank, config.scale), batch)
    # Relative tolerance, since float32 log probabilities down to -22 have no fifth decimal.
    np.testing.assert_allclose(found, score(lm, nothing, batch), rtol=1e-5, atol=1e-5)
    assert np.abs(found - score(tiny.lm(C), nothing, batch)).max() > 0.1


def test_greedy_decoding_uses_adapters() -> None:
    config = PromptConfig(length=0, rank=2, alpha=3.0)
    bank = low_rank.scaled(tiny.bank(C, config, VERBALIZER, 1), config.scale)
    greedy = functools.partial(decode.greedy, max_steps=3, verbalizer=VERBALIZER, config=C, constrained=True)
    decoded = np.asarray(tiny.jit(greedy)(tiny.lm(C), bank, rows()))
    plain, member = tiny.double(tiny.lm(C)), jax.tree.map(lambda leaf: leaf[0], tiny.double(bank))
    for row, units in zip(decoded, tiny.utterances(C, LENGTHS), strict=True):
        scores = tiny.outputs(plain, member, tiny.hidden(plain, member, C, units, row[:2]))[1:]
        assert np.where(VERBALIZER.allowed, scores, -np.inf).argmax(axis=1).tolist() == row.tolist()


MEMBERS = (
    PromptConfig(length=4),
    PromptConfig(length=0, rank=3, alpha=5.0),
    PromptConfig(length=2, rank=1, alpha=2.0, targets=("key", "ffn_out")),
    PromptConfig(length=0, rank=2, targets=("query", "value")),
)


def _mixed() -> tuple[list[Params], Params]:
    """Banks of one member of every kind, and their join."""
    own = [
        low_rank.scaled(tiny.bank(C, config, VERBALIZER, 1, seed=n), config.scale) for n, config in enumerate(MEMBERS)
    ]
    return own, prompts.join(own)


def test_prompts_and_adapters_of_different_ranks_share_a_batch() -> None:
    """Each row against the definition, with `prompt_id` and member-major."""
    own, joined = _mixed()
    assert joined["ffn_in_a"].shape == (4, C.layers, 3, C.dim)
    assert joined["key"].shape == (4, C.layers, 4, C.dim)
    batch, feeds = rows(4, lengths=(3, 8)), np.asarray([[4, 9]] * 8)
    lengths = [config.length for config in MEMBERS]
    run = tiny.jit(functools.partial(prompted_lm.run, config=C, queries=4, lengths=lengths))
    major = run(tiny.lm(C), joined, batch._replace(prompt_id=None), feeds).hidden
    order = np.random.default_rng(0).permutation(8)
    bank = prompts.projected(joined, tiny.lm(C), C, FLOAT32)
    mixed = run(tiny.lm(C), bank, jax.tree.map(lambda row: row[order], batch), feeds).hidden
    plain = tiny.double(tiny.lm(C))
    for row, n in enumerate(batch.prompt_id):
        member = jax.tree.map(lambda leaf: leaf[0], tiny.double(own[n]))
        expected = tiny.hidden(plain, member, C, tiny.utterances(C, (3, 8))[row % 2], feeds[row])
        assert relative(major[row], expected) < 1e-5
        assert relative(mixed[order.tolist().index(row)], expected) < 1e-5


def test_part_inverts_join() -> None:
    own, joined = _mixed()
    for n, (bank, config) in enumerate(zip(own, MEMBERS, strict=True)):
        found = prompts.part(joined, n, n + 1, VERBALIZER, config)
        assert found.keys() == bank.keys()
        jax.tree.map(np.testing.assert_array_equal, found, bank)
        assert prompts.shape_of(prompts.member(found, 0))["rank"] == config.rank


# ---- dropout


def test_dropout_of_a_member_is_the_same_alone_and_in_a_bank() -> None:
    """Loss and gradient depend on its rows and key, not on other members, their columns, or their rank."""
    config = PromptConfig(length=2, dropout=0.0, verbalizer_dropout=0.0, rank=2, lora_dropout=0.3, alpha=3.0)
    bank = tiny.bank(C, config, VERBALIZER, 2)
    other = tiny.bank(C, PromptConfig(length=2, rank=4), VERBALIZER, 1, seed=9)
    keys = jax.random.split(jax.random.key(7), 3)
    joined, scales = prompts.join([bank, other]), (config.scale, config.scale, 0.7)
    each, grads = measure(config, scales)(joined, rows(3, 19), keys)
    for n in range(2):
        member = jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], bank)
        alone, own = measure(config)(member, rows(), keys[n : n + 1])
        assert relative(alone[0], each[n]) < 1e-5
        found = prompts.part(grads, n, n + 1, VERBALIZER, config)
        for name, leaf in own.items():
            assert relative(found[name], leaf) < 1e-5, name
        others, _ = measure(config)(member, rows(), keys[2:])
        assert abs(others[0] - alone[0]) > 1e-3, "it drops something"
    assert not np.asarray(grads["out_a"])[:2, :, 2:].any(), "what fills up a lower rank stays as it is"
    assert not np.asarray(grads["out_b"])[:2, :, 2:].any()


def test_dropout_applies_to_the_input_only() -> None:
    """At the given rate, with rescaling: the mean of constant inputs is kept, and A B = 0 is not changed."""
    lora = low_rank.from_bank(tiny.bank(C, PromptConfig(length=0, rank=1), VERBALIZER, 1), None)
    ones = {**lora.a, "attention": jnp.full_like(lora.a["attention"], 1 / C.dim)}
    keys = jax.random.split(jax.random.key(0), 50)
    dropped = low_rank.with_dropout(lora._replace(a=ones), keys, jnp.arange(40), 0.25)
    layer = jax.tree.map(lambda leaf: leaf[0], dropped)
    low = np.asarray(layer.down("attention", jnp.ones((50, 40, C.dim)), 0, jnp.dtype("float32")))[..., 0]
    assert abs(low.mean() - 1) < 0.01
    assert abs(low.std() - (0.25 / 0.75 / C.dim) ** 0.5) < 0.01
    last = layer.down("attention", jnp.ones((50, 3, C.dim)), -3, jnp.dtype("float32"))
    np.testing.assert_array_equal(last[..., 0], low[:, -3:])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": -1}, "rank is -1, must be a positive integer"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"rank": 2, "alpha": 0.0}, "alpha is 0.0, must be a positive number"),
        ({"rank": 2, "targets": ()}, r"targets \(\) must be one or more of query, key"),
        ({"rank": 2, "targets": ("query", "query")}, ".* must be one or more"),
        (
            {"rank": 2, "targets": ("q_proj",)},
            ".* must be one or more of query, key, value, out, ffn_in, ffn_out, ffn_gate, in this",
        ),
        ({"rank": 2, "lora_dropout": 1.0}, "lora_dropout is 1.0"),
    ],
)
def test_invalid_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"prompt: {message}"):
        PromptConfig(**wrong)
