"""Prompt tuning of a bank on a toy task: independent members, early stopping, trained and kept parameters."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spjax.data import loader
from spjax.data.unit_set import UnitSet
from spjax.models import decode, low_rank, prompts, verbalizers
from spjax.models.config import Compute
from spjax.models.prompts import PromptConfig
from spjax.tasks import Slot, Task
from spjax.training import loop, losses, masks, optim, selection, sharding, train
from spjax.training.evaluator import Evaluator
from spjax.training.setting import Setting, first_params
from spjax.training.update import make_update
from tests import toy

pytestmark = pytest.mark.usefixtures("quick_compile")

OPTIM = optim.OptimConfig(lr=3e-2)
RUN = train.TrainConfig(seeds=(0, 1, 2), epochs=12, max_rows=8, buckets=1, checkpoint_every=4)
PARTS = "prompt/(sep|verbalizer)"  # key and value prompts are not trained
TRAIN, VALID = toy.unit_set("toy", 80, 0), toy.unit_set("toy", 24, 1)


def _setting(prompt: PromptConfig | None = None, loss: str = "slots") -> Setting:
    verbalizer = verbalizers.learnable(toy.TASK, 104)
    prompt = prompt or PromptConfig(length=3, separators=2, steer=True, dropout=0.1, verbalizer_dropout=0.1)
    tree = decode.label_tree(verbalizer, np.unique(TRAIN.classes, axis=0))
    return Setting(toy.LM, Compute(), prompt, losses.LossConfig(loss, noise=0.1), verbalizer, tree)


SETTING = _setting()


def _train(workdir: Path, run: train.TrainConfig = RUN, setting: Setting = SETTING, **more: Any) -> train.Trained:
    params = first_params(toy.tiny_lm(), setting, run.seeds)
    task_run = {"train_ids": np.arange(80), "valid_ids": np.arange(24), "metric": toy.exact_match, **more}
    task_runs = [train.TaskRun(setting, TRAIN, valid_set=VALID, **task_run)]
    return train.train(params, task_runs, run, OPTIM, workdir=str(workdir))


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, quick_compile: None) -> tuple[Path, train.Trained]:
    folder = tmp_path_factory.mktemp("bank")
    return folder, _train(folder)


def _logged(folder: Path, name: str) -> list[Any]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def test_the_task_is_learnt(bank: tuple[Path, train.Trained]) -> None:
    curve = np.asarray([line["train_loss"] for line in bank[1].history])
    assert (curve[-1] < 0.6 * curve[0]).all()
    assert min(bank[1].best_score) > 0.5  # chance level: 0.25


@pytest.mark.parametrize("n", [0, 2])
def test_a_member_of_a_bank_equals_itself_alone(bank: tuple[Path, train.Trained], tmp_path: Path, n: int) -> None:
    folder, together = bank
    alone = _train(tmp_path, dataclasses.replace(RUN, seeds=(n,)))
    found, expected = np.asarray(_logged(tmp_path, "train/loss"))[:, 0], np.asarray(_logged(folder, "train/loss"))[:, n]
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # over 120 updates
    for path, leaf in masks.flatten(alone.params["prompt"]).items():
        np.testing.assert_allclose(leaf[0], masks.flatten(together.params["prompt"])[path][n], atol=1e-5, err_msg=path)
    assert alone.best_epoch[0] == together.best_epoch[n]


@pytest.mark.slow
def test_a_sweep_is_a_bank(tmp_path: Path) -> None:
    """Different shapes, inits, rates and optimizers: each member equals itself alone, with dropout and noise."""
    run = dataclasses.replace(RUN, seeds=(0, 1), epochs=2)
    shapes = [{"length": 0, "rank": 3}, {"length": 5, "rank": 1, "lora_dropout": 0.2, "init": "zeros"}]
    settings = [_setting(PromptConfig(separators=2, dropout=0.2, alpha=1.0, **shape)) for shape in shapes]
    settings[1] = dataclasses.replace(settings[1], loss=losses.LossConfig(noise=0.0, label_smoothing=0.1))
    optimizers = [dataclasses.replace(OPTIM, lr=lr, weight_decay=30 * lr) for lr in (3e-3, 1e-2)]
    common = {"train_ids": np.arange(80), "valid_set": VALID, "valid_ids": np.arange(24), "metric": toy.exact_match}
    task_runs = [train.TaskRun(setting, TRAIN, optimizer=one, **common) for setting in settings for one in optimizers]
    starts = [first_params(toy.tiny_lm(), task_run.setting, run.seeds) for task_run in task_runs]
    params = {"lm": toy.tiny_lm(), "prompt": prompts.join([start["prompt"] for start in starts])}
    together = train.train(params, task_runs, run, OPTIM, workdir=str(tmp_path / "bank"))
    for number in (1, 2):
        task_run = dataclasses.replace(task_runs[number], optimizer=None)
        workdir = str(tmp_path / str(number))
        alone = train.train(starts[number], [task_run], run, optimizers[number % 2], workdir=workdir)
        found = train.task_run_params(together.params, task_runs, run, number)["prompt"]
        assert found.keys() == alone.params["prompt"].keys()
        for path, leaf in masks.flatten(alone.params["prompt"]).items():
            np.testing.assert_allclose(leaf, masks.flatten(found)[path], atol=1e-5, err_msg=path)
        members = slice(2 * number, 2 * number + 2)
        assert alone.best_score == together.best_score[members]
    assert not np.allclose(together.params["prompt"]["sep"][0], together.params["prompt"]["sep"][2])


def test_members_differ(bank: tuple[Path, train.Trained]) -> None:
    for leaf in jax.tree.leaves(bank[1].params["prompt"]):
        assert not np.allclose(leaf[0], leaf[1])


def test_the_lm_does_not_change(bank: tuple[Path, train.Trained]) -> None:
    jax.tree.map(np.testing.assert_array_equal, bank[1].params["lm"], toy.tiny_lm())


def test_a_checkpoint_has_trained_and_no_frozen_leaves(bank: tuple[Path, train.Trained]) -> None:
    (latest, *_) = sorted((bank[0] / "checkpoints").iterdir(), key=lambda path: -int(path.name))
    tree = json.loads((latest / "state" / "_METADATA").read_text())["tree_metadata"]
    arrays = [entry for entry in tree.values() if entry["value_metadata"]["value_type"] == "jax.Array"]
    paths = [[part["key"] for part in entry["key_metadata"]] for entry in arrays]
    assert {path[0] for path in paths} == {
        "trained", "optimizer", "step", "seeds", "active", "best", "best_score", "best_epoch"
    }  # fmt: skip
    assert {part for path in paths for part in path if "/" in str(part)} == {
        "prompt/key", "prompt/value", "prompt/sep", "prompt/sep_deep", "prompt/verbalizer"
    }  # fmt: skip
    size = sum(file.stat().st_size for file in latest.rglob("*") if file.is_file())
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(bank[1].params["prompt"]))
    assert size < 4 * trained + 100_000  # trained, best and two moments


def test_a_run_resumes_from_its_checkpoint(
    bank: tuple[Path, train.Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the first epoch and in the last but one: results are bit-identical."""

    class Killed(Exception):  # noqa: N818 - no error
        pass

    def dies(*args: Any) -> Any:
        for number, batch in enumerate(whole(*args)):
            if number == 3:
                calls.append(args)
                if len(calls) in (1, 11):
                    raise Killed
            yield batch

    whole, calls = loader.batches, []
    monkeypatch.setattr(loader, "batches", dies)
    for _ in range(2):
        with pytest.raises(Killed):
            _train(tmp_path)
    again = _train(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, bank[1].params)
    assert again.history == bank[1].history
    assert again.best_epoch == bank[1].best_epoch


def test_low_rank_adapters_are_learnt_kept_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a prompt; killed and resumed, results are bit-identical."""

    class Killed(Exception):  # noqa: N818 - no error
        pass

    def dies(*args: Any) -> Any:
        for number, batch in enumerate(whole(*args)):
            calls.append(number)
            if len(calls) == 25:
                raise Killed
            yield batch

    run = dataclasses.replace(RUN, seeds=(0,), epochs=3)
    setting = _setting(PromptConfig(length=0, separators=2, rank=2, alpha=2.0))
    whole, calls = loader.batches, []
    expected = _train(tmp_path / "whole", run, setting)
    assert expected.history[-1]["train_loss"][0] < 0.8 * expected.history[0]["train_loss"][0]
    for name, leaf in expected.params["prompt"].items():
        assert name in ("sep", "verbalizer", *low_rank.LEAVES)
        assert np.abs(leaf).max() > 0, name
    monkeypatch.setattr(loader, "batches", dies)
    with pytest.raises(Killed):
        _train(tmp_path / "cut", run, setting)
    again = _train(tmp_path / "cut", run, setting)
    jax.tree.map(np.testing.assert_array_equal, again.params, expected.params)
    assert again.history == expected.history


# ---- several tasks


WORD = verbalizers.learnable(Task("word", (Slot("word", ("a", "b", "c", "d", "e")),)), 104)
WORD_SETTING = dataclasses.replace(SETTING, verbalizer=WORD, tree=decode.label_tree(WORD, None))


def _words(count: int, longest: int) -> train.TaskRun:
    """Another task: other slots, fewer classes, other lengths."""
    random = np.random.default_rng(count)
    units = [[i % 5, *random.integers(50, 99, random.integers(0, longest)).tolist()] for i in range(count)]
    words = UnitSet.of(units, np.arange(count)[:, None] % 5)
    return train.TaskRun(WORD_SETTING, words, np.arange(count), words, np.arange(count), toy.exact_match)


def _both(task_runs: list[train.TaskRun], run: train.TrainConfig, workdir: Path) -> train.Trained:
    banks = []
    for one in task_runs:
        # Members of one seed start differently if their task runs differ, so that mixed up rows are noticed.
        scale = 1 + len(one.train_ids) / 1000
        bank = first_params(toy.tiny_lm(), one.setting, run.seeds)["prompt"]
        banks.append({name: leaf * scale for name, leaf in bank.items()})
    params = {"lm": toy.tiny_lm(), "prompt": prompts.join(jax.device_get(banks))}
    return train.train(params, task_runs, run, OPTIM, workdir=str(workdir))


TOY = train.TaskRun(SETTING, TRAIN, np.arange(80), VALID, np.arange(24), toy.exact_match)


def test_tasks_of_different_slots_and_classes_learn_in_one_bank(tmp_path: Path) -> None:
    """A small task with repeated passes learns too; padding rows of the smaller verbalizer do not change."""
    task_runs = [TOY, _words(20, 1)]
    run = dataclasses.replace(RUN, seeds=(3, 4), epochs=6, select="last", sampling=0.0)
    both = _both(task_runs, run, tmp_path)
    assert np.asarray([line["metric"] for line in both.history]).shape == (6, 4)
    assert min(both.history[-1]["metric"][2:]) == 1.0  # the word task is easy
    wide = both.params["prompt"]["verbalizer"]
    for members, task_run in zip((wide[:2], wide[2:]), task_runs, strict=True):
        assert (members[:, task_run.setting.verbalizer.outputs :] == 0).all()


@pytest.mark.slow
def test_tasks_of_different_size_learn_what_they_learn_alone(tmp_path: Path) -> None:
    """A member does not depend on lengths, buckets, slots, classes and number of batches of other tasks (1e-5).

    Dropout of prompts and outputs, noise, warm-up and decay are on: all go by a member's own updates.
    """
    task_runs = [TOY, _words(21, 24)]
    run = dataclasses.replace(RUN, seeds=(3, 4), epochs=2, buckets=2)
    both = _both(task_runs, run, tmp_path / "both")
    for number, task_run in enumerate(task_runs):
        alone = _both([task_run], run, tmp_path / str(number))
        found = train.task_run_params(both.params, task_runs, run, number)["prompt"]
        for path, leaf in masks.flatten(alone.params["prompt"]).items():
            np.testing.assert_allclose(masks.flatten(found)[path], leaf, atol=1e-5, err_msg=path)
        mine = slice(2 * number, 2 * number + 2)
        assert alone.best_score == both.best_score[mine]
        for one, line in zip(alone.history, both.history, strict=True):
            np.testing.assert_allclose(line["train_loss"][mine], one["train_loss"], rtol=1e-5)
    assert len(_logged(tmp_path / "both", "train/loss")) > len(_logged(tmp_path / "1", "train/loss"))


@pytest.mark.parametrize(
    "sampling", [pytest.param(0.0, marks=pytest.mark.slow), 0.5, pytest.param(1.0, marks=pytest.mark.slow)]
)
def test_sampling_sets_the_number_of_updates_of_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: float
) -> None:
    task_runs = [TOY, _words(20, 3)]  # 10 and 3 batches
    made, make = [], make_update

    def spied(*args: Any) -> Any:
        def update(state: Any, frozen: Any, batch: Any, members: Any = None) -> Any:
            state, metrics = inner(state, frozen, batch, members)
            jax.debug.callback(lambda updates: made.append(updates.tolist()), metrics["updates"], ordered=True)
            return state, metrics

        inner = make(*args)
        return update

    monkeypatch.setattr(train, "make_update", spied)
    _both(task_runs, dataclasses.replace(RUN, seeds=(0,), epochs=2, sampling=sampling), tmp_path)
    own = {0.0: 10, 0.5: 5, 1.0: 3}[sampling]
    assert np.sum(made, axis=0).tolist() == [20, 2 * own]


# ---- members that stopped


def _patient(number: int, valid_scores: list[float]) -> train.TaskRun:
    """A task run with given valid scores, which determine when its members stop."""
    scores = iter(valid_scores)
    return dataclasses.replace(_words(18 + number, 8), metric=lambda *_: next(scores))


@pytest.mark.parametrize("trainable", ["prompt/.*", pytest.param(PARTS, marks=pytest.mark.slow)])
def test_stopped_tasks_are_not_computed_and_others_learn_the_same_as_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainable: str
) -> None:
    valid_scores = [[0.5, 0.4], [0.1, 0.2, 0.3, 0.4, 0.5], [0.3, 0.2], [0.6, 0.7, 0.6]]
    run = dataclasses.replace(RUN, seeds=(7,), epochs=5, patience=1, max_rows=8, trainable=trainable)
    task_runs = [_patient(number, scores) for number, scores in enumerate(valid_scores)]
    widths, batches = [], loader.batches
    monkeypatch.setattr(loader, "batches", lambda *a: (widths.append([len(s.ids) for s in a[1]]), batches(*a))[1])
    found = _both(task_runs, run, tmp_path / "bank")
    assert found.best_epoch == [0, 4, 0, 1]
    assert {width for each in widths for width in each} == {1}
    trained = [len(each) for each in widths if len(each) > 1]  # an epoch's steps; evaluations have one each
    assert trained == [12, 12, 6, 3, 3]
    assert len(widths) - len(trained) == sum(map(len, valid_scores))  # nor are they evaluated
    nothing = [[n for n, loss in enumerate(line["train_loss"]) if loss is None] for line in found.history]
    assert nothing == [[], [], [0, 2], [0, 2, 3], [0, 2, 3]]
    assert nothing == [[n for n, score in enumerate(line["metric"]) if score is None] for line in found.history]
    monkeypatch.undo()
    alone = _both(
        [_patient(1, valid_scores[1])], run, tmp_path / "alone"
    )  # the one that continues when all others have stopped
    for path, leaf in masks.flatten(alone.params["prompt"]).items():
        np.testing.assert_allclose(masks.flatten(found.params["prompt"])[path][1], leaf[0], atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_a_run_whose_members_stop_resumes_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in an epoch in which some members have stopped: results are bit-identical."""
    task_runs = [TOY, _words(20, 12)]
    run = dataclasses.replace(RUN, seeds=(0, 1, 2), epochs=7, patience=1, checkpoint_every=2)
    expected = _both(task_runs, run, tmp_path / "whole")
    stopped = [sum(score is None for score in line["metric"]) for line in expected.history]
    assert 0 < stopped[-1] < 6, "in this toy some members stop and others continue"
    left = [sum(number < 6 for number in stopped) * 10 - 7]

    class Killed(Exception):  # noqa: N818 - no error
        pass

    def dies(*args: Any) -> Any:
        for batch in batches(*args):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            yield batch

    batches = loader.batches
    monkeypatch.setattr(loader, "batches", dies)
    with pytest.raises(Killed):
        _both(task_runs, run, tmp_path / "cut")
    again = _both(task_runs, run, tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, again.params, expected.params)
    assert again.history == expected.history


# ---- members that diverge


def _swept(*rates: float) -> list[train.TaskRun]:
    task_run = _words(20, 9)
    return [dataclasses.replace(task_run, optimizer=dataclasses.replace(OPTIM, lr=lr)) for lr in rates]


DIVERGING = dataclasses.replace(RUN, seeds=(0, 1), epochs=3, max_rows=8, checkpoint_every=2)


@pytest.mark.slow
def test_a_member_that_diverges_stops_and_the_others_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A sweep with a far too large learning rate; also killed after divergence, and resumed bit-identically."""
    task_runs = _swept(3e-2, 1e30)
    found = _both(task_runs, DIVERGING, tmp_path / "bank")
    assert len(found.history) == 3
    for n in (2, 3):
        assert (
            f"member {n} (seed {n - 2}, prompt length 3, learning rate 1e+30) diverged at epoch 1, step" in caplog.text
        )
    assert found.best_epoch[2:] == [-1, -1]
    assert found.best_score[2:] == [-np.inf, -np.inf]
    assert [line["metric"][2:] for line in found.history] == [[None, None]] * 3
    for leaf in jax.tree.leaves(found.params["prompt"]):
        assert np.isfinite(leaf).all()
    alone = _both(_swept(3e-2), DIVERGING, tmp_path / "alone")
    assert alone.best_epoch == found.best_epoch[:2]
    for path, leaf in masks.flatten(alone.params["prompt"]).items():
        np.testing.assert_allclose(masks.flatten(found.params["prompt"])[path][:2], leaf, atol=1e-5, err_msg=path)

    class Killed(Exception):  # noqa: N818 - no error
        pass

    def dies(*args: Any) -> Any:
        for number, batch in enumerate(batches(*args)):
            if number == 2:
                raise Killed  # once the first checkpoint is written
            yield batch

    batches = loader.batches
    monkeypatch.setattr(loader, "batches", dies)
    with pytest.raises(Killed):
        _both(task_runs, DIVERGING, tmp_path / "cut")
    monkeypatch.undo()
    again = _both(task_runs, DIVERGING, tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
    assert again.history == found.history


def test_the_other_seeds_of_a_task_continue_and_metrics_see_no_nan(tmp_path: Path) -> None:
    """One of two seeds starts from a verbalizer so large that its outputs overflow."""
    params = first_params(toy.tiny_lm(), SETTING, (0, 1))
    prompt = {**params["prompt"], "verbalizer": params["prompt"]["verbalizer"].at[1].set(1e38)}

    def metric(log_probs: np.ndarray, tree: decode.LabelTree, classes: np.ndarray) -> float:
        assert np.isfinite(log_probs).all()
        return toy.exact_match(log_probs, tree, classes)

    task_run = train.TaskRun(SETTING, TRAIN, np.arange(80), VALID, np.arange(24), metric)
    run = dataclasses.replace(RUN, seeds=(0, 1), epochs=2)
    found = train.train({**params, "prompt": prompt}, [task_run], run, OPTIM, workdir=str(tmp_path))
    assert found.best_epoch[0] >= 0
    assert found.best_epoch[1] == -1
    assert [line["metric"][1] for line in found.history] == [None, None]


def test_a_bank_without_members_left_has_diverged(tmp_path: Path) -> None:
    with pytest.raises(loop.DivergedError, match=r"training diverged at epoch 1, step .*learning rate"):
        _both(_swept(1e30), DIVERGING, tmp_path)


def test_of_epochs_with_equal_metrics_the_most_likely_labels_decide(tmp_path: Path) -> None:
    likelihoods = []

    def metric(log_probs: np.ndarray, tree: decode.LabelTree, classes: np.ndarray) -> float:
        rows = [tree.combinations.tolist().index(row) for row in classes.tolist()]
        likelihoods.append(np.mean(log_probs[np.arange(len(rows)), rows]))
        return 0.5

    kept = _train(tmp_path, dataclasses.replace(RUN, seeds=(0,), epochs=4), metric=metric)
    assert kept.best_epoch == [int(np.argmax(likelihoods))] != [0]


def test_a_nan_metric_is_never_the_best(tmp_path: Path) -> None:
    values = iter([np.nan, 0.2, np.nan, np.nan, np.nan, np.nan])
    run = dataclasses.replace(RUN, seeds=(0, 1), epochs=3)
    kept = _train(tmp_path, run, metric=lambda *_: next(values))
    assert kept.best_epoch == [-1, 0]
    assert kept.best_score == [-np.inf, pytest.approx(0.2)]
    assert [line["metric"] for line in kept.history] == [[None, 0.2], [None, None], [None, None]]


# ---- what is trained


@pytest.mark.parametrize(
    ("members", "trainable"),
    [
        ((2, 3), "prompt/.*"),
        ((0, 2), PARTS),
        *(
            pytest.param(members, trainable, marks=pytest.mark.slow)
            for members, trainable in (*((m, "prompt/.*") for m in (None, (0, 2), (1,), (3,))), ((2, 3), PARTS))
        ),
    ],
)
def test_inactive_members_never_change(members: tuple[int, ...] | None, trainable: str) -> None:
    """Index 3 is padding. Active members get the same result as in an update of the full bank."""
    params = first_params(toy.tiny_lm(), SETTING, RUN.seeds)
    trained, frozen = masks.split(masks.flatten(params), trainable)
    bank = optim.make_bank(dataclasses.replace(OPTIM, warmup=0.0), [9, 8, 7], [1e-2, 2e-2, 3e-2])
    tx = masks.masked(bank, trained, frozen)
    update = jax.jit(make_update(SETTING, tx))
    ids = np.stack([np.arange(8) + n for n in range(3)])
    start = {
        "trained": trained, "optimizer": tx.init({**trained, **frozen}),
        "step": jnp.asarray([4, 0, 2]), "seeds": jnp.arange(3, dtype=jnp.uint32),
        "active": jnp.ones(3, bool),
    }  # fmt: skip
    whole, everyone = update(start, frozen, loader.make_batch(TRAIN, ids, 16))
    if members is None:
        rows, who = ids, None
    else:
        rows, who = np.full((len(members), 8), -1), np.asarray(members)
        rows[who < 3] = ids[who[who < 3]]
    stopped = (np.arange(3) == 2) & (members in (None, (0, 2)))  # its rows are padding
    start["active"] = jnp.asarray(~stopped)
    rows[np.isin(np.arange(3) if members is None else who, np.flatnonzero(stopped))] = -1
    state, metrics = update(start, frozen, loader.make_batch(TRAIN, rows, 16), who)
    take_part = np.isin(np.arange(3), np.arange(3) if members is None else members) & ~stopped
    assert metrics["updates"].tolist() == take_part.tolist()
    np.testing.assert_allclose(metrics["loss"], np.where(take_part, everyone["loss"], 0), rtol=1e-5)
    for (path, leaf), old, new in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(start), jax.tree.leaves(whole), strict=True
    ):
        if len(leaf) and "active" not in str(path):
            np.testing.assert_array_equal(leaf[~take_part], old[~take_part], err_msg=str(path))
            np.testing.assert_allclose(leaf[take_part], new[take_part], atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("trainable", [".*", "prompt/(sep|verbalizer)|lm/layers/.*/bias"])
def test_the_mask_selects_what_is_trained(tmp_path: Path, trainable: str) -> None:
    config = dataclasses.replace(toy.LM, layers=1)
    setting = dataclasses.replace(_setting(PromptConfig(length=2, separators=1)), config=config)
    run = dataclasses.replace(RUN, seeds=(0,), epochs=1, trainable=trainable, select="last")
    params = first_params(toy.tiny_lm(config=config), setting, run.seeds)
    before = masks.flatten(params)
    task_run = train.TaskRun(setting, TRAIN, np.arange(80), VALID, np.arange(24), toy.exact_match)
    result = train.train(params, [task_run], run, OPTIM, workdir=str(tmp_path))
    trained, _ = masks.split(before, trainable)
    for path, leaf in masks.flatten(result.params).items():
        assert np.array_equal(leaf, before[path]) != (path in trained), path
    assert result.best_epoch == [0]


def test_seeds_cannot_share_an_lm_that_is_trained(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"trainable='\.\*' trains the LM, which 3 members share: give one task and one seed"
    ):
        _train(tmp_path, dataclasses.replace(RUN, trainable=".*"))


# ---- early stopping and keeping the best


@settings(max_examples=60)
@given(
    scores=st.lists(
        st.lists(st.tuples(*[st.sampled_from([-np.inf, 0.25, 0.5, 0.75])] * 2), min_size=2, max_size=2),
        min_size=1,
        max_size=9,
    ),
    patience=st.integers(0, 3),
)
def test_each_member_keeps_its_best_and_stops_by_patience(
    scores: list[list[tuple[float, float]]], patience: int
) -> None:
    """Against plain Python for each member. The parameter of a member is the number of its epoch."""
    mesh = sharding.make_mesh()
    state: dict[str, Any] = {
        "trained": {"prompt/sep": np.zeros((2, 1, 1), np.float32)},
        "best": {"prompt/sep": np.zeros((2, 1, 1), np.float32)},
        "active": np.ones(2, bool),
        "best_score": np.full((2, 2), -np.inf, np.float32),
        "best_epoch": np.full(2, -1, np.int32),
    }
    where = sharding.state_shardings(mesh, state)
    for epoch, score in enumerate(scores):
        state["trained"] = {
            "prompt/sep": np.where(
                np.asarray(state["active"])[:, None, None], epoch + 1.0, state["trained"]["prompt/sep"]
            )
        }
        state = selection.keep_best(state, epoch, np.asarray(score), patience, where)
    for n in range(2):
        best, kept, stopped, last = (-np.inf, np.inf), -1, None, 0
        for epoch, score in enumerate(row[n] for row in scores):
            if stopped is None:
                last = epoch + 1
                if score > best:
                    best, kept = score, epoch
                if patience and epoch - kept >= patience:
                    stopped = epoch
        assert float(state["best_score"][n, 0]) == best[0]
        assert int(state["best_epoch"][n]) == kept
        assert float(state["best"]["prompt/sep"][n, 0, 0]) == kept + 1
        assert float(state["trained"]["prompt/sep"][n, 0, 0]) == last
        assert bool(state["active"][n]) == (stopped is None)


# ---- evaluation


def _evaluator(run: train.TrainConfig, setting: Setting = SETTING) -> Evaluator:
    task_run = train.TaskRun(setting, TRAIN, np.arange(80), VALID, np.arange(24), toy.exact_match)
    return train.evaluator_for(task_run, run, VALID, np.arange(24), sharding.make_mesh())


def test_scores_do_not_depend_on_batches_or_on_the_bank() -> None:
    flat = masks.flatten(first_params(toy.tiny_lm(), SETTING, (5, 6)))
    wide = _evaluator(dataclasses.replace(RUN, seeds=(5, 6))).log_probs(flat)
    assert wide.shape == (2, 24, 4)
    np.testing.assert_allclose(np.exp(wide).sum(axis=2), 1, rtol=1e-5)
    narrow = _evaluator(dataclasses.replace(RUN, seeds=(5, 6), eval_rows=8, buckets=2)).log_probs(flat)
    np.testing.assert_allclose(narrow, wide, atol=1e-5)
    one = {path: leaf[1:] if path.startswith("prompt/") else leaf for path, leaf in flat.items()}
    np.testing.assert_allclose(_evaluator(dataclasses.replace(RUN, seeds=(6,))).log_probs(one)[0], wide[1], atol=1e-5)


@pytest.mark.parametrize("kind", ["slots", "reference"])
def test_the_valid_loss_is_that_of_the_full_split(kind: str) -> None:
    """Batches of 8, weighted by their counts, against one batch of all 24."""
    setting = _setting(loss=kind)
    params = first_params(toy.tiny_lm(), setting, (5,))
    batch = loader.make_batch(VALID, np.arange(24)[None], 16)
    whole = losses.member_losses(
        params["lm"], params["prompt"], batch, None, loss=setting.loss, prompt=setting.prompt,
        verbalizers=[setting.verbalizer], config=setting.config, compute=setting.compute,
    )  # fmt: skip
    found = _evaluator(dataclasses.replace(RUN, seeds=(5,), eval_rows=8), setting).loss(masks.flatten(params))
    np.testing.assert_allclose(found, whole, rtol=1e-5)


@pytest.mark.parametrize(("lower_is_better", "best"), [(True, 1), (False, 2)])
def test_the_best_epoch_is_by_the_tasks_metric(tmp_path: Path, lower_is_better: bool, best: int) -> None:
    values = iter([0.3, 0.1, 0.4])
    run = dataclasses.replace(RUN, seeds=(0,), epochs=3)
    kept = _train(tmp_path, run, metric=lambda *_: next(values), lower_is_better=lower_is_better)
    assert kept.best_epoch == [best]
    assert [line["metric"] for line in kept.history] == [[0.3], [0.1], [0.4]]


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 12])
def test_a_batch_may_hold_any_number_of_rows(tmp_path: Path, rows: int) -> None:
    run = dataclasses.replace(RUN, seeds=(0,), epochs=1, max_rows=rows, eval_rows=rows)
    logged = _logged(tmp_path, "train/loss") if _train(tmp_path, run) else []
    assert len(logged) >= 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"select": "best"}, "select"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"passes": 0}, "passes"),
        ({"select": "last", "patience": 2}, "patience is 2, but select='last'"),
    ],
)
def test_invalid_settings_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"train: {message}"):
        train.TrainConfig(**wrong)
