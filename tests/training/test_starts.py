"""Prompts initialised from utterances act like these utterances in front of the input."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spjax.data import loader
from spjax.data.unit_set import UnitSet
from spjax.models import decode, prompted_lm, prompts, streams, unit_lm, verbalizers
from spjax.models.config import Compute, ProsodyConfig, UnitLMConfig
from spjax.models.prompts import PromptConfig
from spjax.training import losses, masks, pooling, sharding, starts, train
from spjax.training.setting import Setting, first_params
from spjax.types import Params, Streams
from tests import toy

pytestmark = pytest.mark.usefixtures("quick_compile")

PROSODY = ProsodyConfig(f0_edges=(-0.2, 0.0, 0.2))
RUN = train.TrainConfig(seeds=(3, 5), buckets=1, max_rows=8)
MESH = sharding.make_mesh()
PLACED = masks.unflatten(sharding.layerwise(MESH, masks.flatten(toy.tiny_lm())))


def _task_run(
    init: str, length: int, units: UnitSet, deep: bool = True, config: UnitLMConfig = toy.LM
) -> train.TaskRun:
    verbalizer = verbalizers.learnable(toy.TASK, 104)
    prompt = PromptConfig(length=length, separators=2, deep=deep, init=init)
    tree = decode.label_tree(verbalizer, None)
    setting = Setting(config, Compute(), prompt, losses.LossConfig(), verbalizer, tree)
    every = np.arange(len(units))
    return train.TaskRun(setting, units, every, units, every, toy.exact_match)


def _columns(task_run: train.TaskRun, lm: Params, ids: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Inputs of the key and value projections [L, n, D] at a column of each utterance."""
    units, setting = task_run.train_set.take(ids), task_run.setting
    plan = train.evaluation_plan(task_run, RUN, units, np.arange(len(ids)), MESH)
    return pooling.layer_inputs(
        lm, setting.config, units, plan, MESH, setting.compute, columns, deep=setting.prompt.deep
    )  # fmt: skip


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "input"])
@pytest.mark.parametrize("prosody", [None, PROSODY], ids=["units", "streams"])
def test_a_prompt_from_an_utterance_equals_the_utterance_in_front(deep: bool, prosody: ProsodyConfig | None) -> None:
    """Against the LM on one row: opening token and units of one utterance, then of another."""
    config = dataclasses.replace(toy.LM, prosody=prosody)
    lm, units = jax.tree.map(jnp.asarray, toy.tiny_lm(config=config)), toy.unit_set("toy", 4, 0)
    # No bias is 0, so that a missing one is noticed.
    lm["layers"] = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), lm["layers"]
    )
    if prosody:
        rng, size = np.random.default_rng(0), len(units.units)
        f0 = rng.normal(size=size).astype(np.float32) / 5
        units = dataclasses.replace(units, durations=rng.integers(1, 9, size).astype(np.int32), f0=f0)
    whole = int(units.lengths[0]) + 1
    task_run = _task_run("utterances", whole, units, deep, config)
    found = _columns(task_run, lm, np.zeros(whole, int), np.arange(whole))
    real = {"key": found, "value": found} if deep else {"input": found[0]}
    bank = first_params(lm, task_run.setting, (0,), real=[real])["prompt"]
    batch = loader.make_batch(units, np.asarray([[1]]), int(units.lengths[1]))
    run = functools.partial(prompted_lm.run, fed_back=np.zeros((1, 0), np.int32), config=config, queries=2)
    acts = jax.jit(run)(lm, bank, batch)

    first = loader.make_batch(units, np.asarray([[0]]), int(units.lengths[0]))
    rows = [np.concatenate([one.source, one.last[:, None]], axis=1) for one in (first, batch)]
    beside: list[Any] = [None, None]
    if prosody:
        beside = [Streams(*(known[:, :-1] for known in one.streams)) for one in (first, batch)]
    table = unit_lm.sinusoids(config.first_position + 32, config.dim)[config.first_position :]
    both = [
        unit_lm.embed_tokens(lm, row) + streams.embed(lm, config, some) + table[: row.shape[1]]
        for row, some in zip(rows, beside, strict=True)
    ]
    length = rows[1].shape[1]
    of_tail = None
    if prosody:  # the first separator has the last segment's prosody, the others none
        last = (known[:, -1:] for known in batch.streams)
        of_tail = Streams(
            *(np.append(known, [[no]], axis=1) for known, no in zip(last, streams.NO_SPEECH, strict=True))
        )
    separators = bank["sep"] * config.dim**0.5 + streams.embed(lm, config, of_tail) + table[length : length + 2]
    x = jnp.concatenate([*both, separators], axis=1)
    seen = jnp.tril(jnp.ones((1, x.shape[1], x.shape[1]), bool))
    expected, _ = jax.jit(lambda lm, x: unit_lm.extend(lm, config, (x,), unit_lm.empty_prefix(config), seen))(lm, x)
    np.testing.assert_allclose(acts.hidden, expected[:, -2:], atol=1e-5)


@pytest.mark.parametrize("init", ["utterances", "class_means"])
def test_a_start_depends_on_its_seed_only(init: str) -> None:
    """Not on other seeds, or other tasks' utterances in the set; another seed has another start."""
    units = toy.unit_set("toy", 40, 0)
    task_run = dataclasses.replace(_task_run(init, 9, units), train_ids=np.arange(5, 35))
    both = starts.from_utterances(PLACED, task_run, RUN, MESH)
    (alone,) = starts.from_utterances(PLACED, task_run, dataclasses.replace(RUN, seeds=(5,)), MESH)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), both[1], alone)
    assert both[0]["key"].shape == (2, 9, 32)
    assert not np.allclose(both[0]["key"], both[1]["key"], atol=0.1)
    for one in both:  # no two positions of a member are equal in all layers: they would stay equal
        apart = np.abs(one["key"][:, :, None] - one["key"][:, None]).max(axis=(0, 3))
        assert (apart + np.eye(9) > 1e-4).all()


def test_positions_are_columns_of_train_utterances() -> None:
    units = toy.unit_set("toy", 6, 0)
    task_run = dataclasses.replace(_task_run("utterances", 12, units), train_ids=np.asarray([1, 4]))
    ids = np.repeat([1, 4], units.lengths[[1, 4]])
    columns = np.concatenate([np.arange(1, units.lengths[i] + 1) for i in (1, 4)])
    every = _columns(task_run, PLACED, ids, columns)
    for one in starts.from_utterances(PLACED, task_run, RUN, MESH):
        np.testing.assert_array_equal(one["key"], one["value"])
        for p in range(12):
            apart = np.abs(every - np.asarray(one["key"])[:, None, p]).max(axis=(0, 2))
            assert apart.min() < 1e-5


def test_class_means_cycle_through_the_classes() -> None:
    """With one utterance per class, the mean over drawn utterances is the mean over its units."""
    units = UnitSet.of([[7, 8, 9], [20, 21], [30, 31, 32, 33], [40]], [[0, 2], [0, 3], [0, 4], [1, 2]])
    units = units.take(np.asarray([0, 1, 2, 3]))
    task_run = _task_run("class_means", 5, dataclasses.replace(units, classes=np.arange(4)[:, None]))
    means = _columns(task_run, PLACED, np.arange(4), np.full(4, -1))
    each = _columns(task_run, PLACED, np.full(3, 0), np.arange(1, 4))
    np.testing.assert_allclose(means[:, 0], each.mean(axis=1), atol=1e-5)
    for one in starts.from_utterances(PLACED, task_run, RUN, MESH):
        apart = np.abs(means[:, :, None] - np.asarray(one["key"])[:, None]).max(axis=(0, 3))
        classes = apart.argmin(axis=0)
        assert apart.min(axis=0).max() < 1e-5
        assert sorted(classes[:4]) == [0, 1, 2, 3]
        assert classes[4] == classes[0]


def test_starts_differ_in_the_prompt_only() -> None:
    units = toy.unit_set("toy", 6, 0)
    banks = {}
    for init in prompts.STARTS:
        task_run = _task_run(init, 3, units)
        real = starts.from_utterances(PLACED, task_run, RUN, MESH) if init in prompts.REAL_STARTS else None
        banks[init] = first_params(toy.tiny_lm(), task_run.setting, RUN.seeds, real=real)["prompt"]
    for init, bank in banks.items():
        np.testing.assert_array_equal(bank["sep"], banks["normal"]["sep"])
        np.testing.assert_array_equal(bank["verbalizer"], banks["normal"]["verbalizer"])
        assert (init == "normal") == np.array_equal(bank["value"], banks["normal"]["value"])
    np.testing.assert_array_equal(banks["zeros"]["key"], banks["normal"]["key"])
    assert not banks["zeros"]["value"].any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"init": "random"}, "init is 'random', must be one of normal, units, zeros, utterances, class_means"),
     ({"init": "zeros", "deep": False}, "init is 'zeros', which needs deep prompts")],
)  # fmt: skip
def test_invalid_starts_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptConfig(**wrong)


def test_a_start_from_utterances_is_never_replaced_by_another() -> None:
    with pytest.raises(ValueError, match="init 'utterances' needs train utterances"):
        first_params(toy.tiny_lm(), _task_run("utterances", 3, toy.unit_set("toy", 4, 0)).setting, (0,))
