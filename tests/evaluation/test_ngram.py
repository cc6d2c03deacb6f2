"""The n-gram baseline on synthetic units where the right answer is known."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from spjax.data.unit_set import UnitSet
from spjax.data.write_records import Utterance, write_unit_records
from spjax.evaluation import ngram
from spjax.tasks import Slot, Task

TWO = Task("two", (Slot("first", ("a", "b", "c")), Slot("second", ("x", "y"))), metric="exact_match")
SPOOF = Task("spoof", (Slot("kind", ("real", "fake")),), metric="eer")
ONE = Task("one", (Slot("only", ("a", "b", "c")),))


def units_of_classes(task: Task, n: int, seed: int, combinations: list[tuple[int, ...]] | None = None) -> UnitSet:
    """Noise, with one informative unit per label: single digits, which the default tokeniser drops."""
    rng = np.random.default_rng(seed)
    combinations = combinations or [(0, 3), (0, 4), (1, 3), (2, 4)]
    classes = [combinations[i % len(combinations)][: len(task.slots)] for i in range(n)]
    units = []
    for of in classes:
        one = rng.integers(10, 100, size=12)
        one[rng.permutation(12)[: len(of)]] = of
        units.append(one)
    return UnitSet.of(units, classes)


def splits(task: Task) -> tuple[UnitSet, UnitSet, UnitSet]:
    return tuple(units_of_classes(task, n, seed) for n, seed in ((240, 0), (60, 1), (80, 2)))


def test_learns_from_single_digit_units():
    result = ngram.ngram_baseline(TWO, *splits(TWO), progress=False)
    assert set(result["variants"]) == {"per_slot", "joint"}
    assert result["train_utterances"] == 240
    for variant in result["variants"].values():
        assert variant["valid"]["exact_match"] > 0.9
        assert variant["test"]["exact_match"] > 0.9
        assert variant["test"]["accuracy/first"] >= variant["test"]["exact_match"]
    chosen = result["variants"][result["chosen"]]
    assert (result["valid"], result["test"]) == (chosen["valid"]["headline"], chosen["test"]["headline"])
    json.dumps(result, allow_nan=False)


def test_choices_are_made_on_valid_only():
    train, valid, test = splits(TWO)
    rng = np.random.default_rng(0)
    scrambled = UnitSet.of([test.units_of(i) for i in range(len(test))], rng.permutation(test.classes))
    fair = ngram.ngram_baseline(TWO, train, valid, test, progress=False)
    spoilt = ngram.ngram_baseline(TWO, train, valid, scrambled, progress=False)
    assert spoilt["test"] < fair["test"]
    for name, variant in fair["variants"].items():
        assert variant["strength"] == spoilt["variants"][name]["strength"]
        assert variant["valid"] == spoilt["variants"][name]["valid"]
    assert fair["chosen"] == spoilt["chosen"]


def faint(task: Task, combinations: list[tuple[int, ...]], seed: int) -> UnitSet:
    """A label only makes its unit more frequent, so that the regularisation matters."""
    rng = np.random.default_rng(seed)
    classes = [combinations[i % len(combinations)] for i in range(120)]
    tells = rng.random((120, 10)) < 0.15
    noise = rng.integers(0, 40, (120, 10))
    units = [np.where(tell, rng.choice(of, 10), other) for tell, of, other in zip(tells, classes, noise, strict=True)]
    return UnitSet.of(units, classes)


@pytest.mark.parametrize("task", [TWO, SPOOF], ids=lambda task: task.name)
def test_strength_is_the_best_on_valid(task):
    """The highest exact match, the lowest EER."""
    combinations = [(0, 3), (0, 4), (1, 3), (2, 4)] if task is TWO else [(0,), (1,)]
    sets = [faint(task, combinations, seed) for seed in range(3)]
    strengths = (100.0, 1.0, 0.01)
    single = {s: ngram.ngram_baseline(task, *sets, strengths=[s], progress=False)["variants"] for s in strengths}
    together = ngram.ngram_baseline(task, *sets, strengths=strengths, progress=False)
    best = min if task is SPOOF else max
    for name, variant in together["variants"].items():
        scores = {strength: one[name]["valid"]["headline"] for strength, one in single.items()}
        assert len(set(scores.values())) > 1  # the choice matters
        assert variant["valid"]["headline"] == best(scores.values())
        assert variant == single[variant["strength"]][name]
    assert together["valid"] == best(variant["valid"]["headline"] for variant in together["variants"].values())


def test_joint_predicts_only_combinations_in_train():
    """If slots are fully dependent in train, the joint model predicts nothing else."""
    seen = [(0, 3), (1, 4)]
    train, valid = (units_of_classes(TWO, n, seed, seen) for n, seed in ((60, 0), (20, 1)))
    torn = UnitSet.of([[0, 4, 50], [1, 3, 50]], [(0, 4), (1, 3)])  # the units of one label of each
    scores = ngram.ngram_baseline(TWO, train, valid, torn, progress=False)["variants"]["joint"]["test"]
    assert scores["exact_match"] == 0
    assert scores["accuracy"] == 0.5  # one slot of each is correct, whichever it is


def test_one_slot_has_no_joint_variant():
    result = ngram.ngram_baseline(ONE, *splits(ONE), progress=False)
    assert list(result["variants"]) == ["per_slot"]
    assert result["test"] > 0.9


def test_fewer_utterances_give_lower_scores():
    train, valid, test = splits(TWO)
    few = ngram.ngram_baseline(TWO, train.take(np.arange(16)), valid, test, progress=False)
    assert few["train_utterances"] == 16
    assert few["test"] < ngram.ngram_baseline(TWO, train, valid, test, progress=False)["test"]


def test_labels_absent_from_train_are_never_predicted():
    train = units_of_classes(ONE, 40, 0, [(0,)])  # one label: nothing to separate
    _, valid, test = splits(ONE)
    result = ngram.ngram_baseline(ONE, train, valid, test, progress=False)
    assert result["test"] == np.mean(test.classes[:, 0] == 0)


def test_empty_splits_are_named():
    train, valid, test = splits(ONE)
    nothing = dataclasses.replace(test, offsets=test.offsets[:1], classes=test.classes[:0], ids=[])
    with pytest.raises(ValueError, match="train split has no utterances"):
        ngram.ngram_baseline(ONE, nothing, valid, test, progress=False)
    with pytest.raises(ValueError, match="test split has no utterances"):
        ngram.ngram_baseline(ONE, train, valid, nothing, progress=False)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "two"
    written = {
        name: [Utterance(name + one, split.units_of(i), split.classes[i]) for i, one in enumerate(split.ids)]
        for name, split in zip(("train", "valid", "test"), splits(TWO), strict=True)
    }
    write_unit_records(folder, TWO, written)
    return folder


def test_command_line(records, tmp_path, capsys):
    ngram.main([f"--data={records}", f"--json={tmp_path / 'floor.json'}"])
    result = json.loads((tmp_path / "floor.json").read_text())
    expected = ngram.ngram_baseline(TWO, *splits(TWO), progress=False)
    assert result == {"task": "two", "metric": "exact_match", **expected}
    printed = capsys.readouterr().out
    assert "two, 240 train utterances" in printed
    assert f"chosen on valid: test {expected['test']:.4f}" in printed


def test_command_line_few_shot(records, tmp_path, capsys):
    ngram.main([f"--data={records}", "--few-shot=2,20", "--draws=2", f"--json={tmp_path / 'floor.json'}"])
    result = json.loads((tmp_path / "floor.json").read_text())["few_shot"]
    assert {size: [draw["train_utterances"] for draw in draws] for size, draws in result.items()} == {
        "2": [8, 8],
        "20": [80, 80],
    }
    assert result["2"][0] != result["2"][1]  # two draws, not one twice
    assert "two, 20 per label combination, 2 draws" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--few-shot=ten"], ["--few-shot=0"], ["--few-shot=5", "--draws=0"]])
def test_command_line_refuses(records, flags, capsys):
    with pytest.raises(SystemExit):
        ngram.main([f"--data={records}", *flags])
    assert "--few-shot" in capsys.readouterr().err


def test_absent_records_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*none is not a complete directory of unit records"):
        ngram.main([f"--data={tmp_path / 'none'}"])
