"""Paired comparisons: coverage of the intervals, and refusal of invalid pairs."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from spjax.evaluation import compare, metrics, outcome, report
from spjax.tasks import Slot, Task

WORD = Task("word", (Slot("word", ("yes", "no", "maybe")),))
INTENT = Task("intent", (Slot("action", ("on", "off")), Slot("object", ("lamp", "heat", "music"))), "exact_match")
PARTS = Task("parts", INTENT.slots, "accuracy")
SPOOF = Task("spoof", (Slot("kind", ("bonafide", "spoof")),), "eer")


def members(task: Task, errors: float, seeds=(0, 1, 2), n: int = 60, ids=None, shift: int = 0) -> list[outcome.Member]:
    """Members with `errors` wrong utterances each, different for each seed and `shift`."""
    found = []
    for seed in seeds:
        rng = np.random.default_rng((seed, shift))
        wrong = rng.random(n) < errors
        true, predicted, probabilities = [], [], []
        for k, slot in enumerate(task.slots):
            size = len(slot.labels)
            truth = np.arange(n) % size
            answer = np.where(wrong, (truth + 1) % size, truth)
            chances = np.full((n, size), 0.1 / max(size - 1, 1))
            chances[np.arange(n), answer] = 0.9
            true.append(truth + task.slot_offsets[k])
            predicted.append(answer + task.slot_offsets[k])
            probabilities.append(chances / chances.sum(axis=1, keepdims=True))
        names = ids or [f"test/{i:03d}.wav" for i in range(n)]
        answers = outcome.Predictions(names, np.stack(true, 1), np.stack(predicted, 1), probabilities)
        found.append(outcome.Member(seed, 1, 0.5, [outcome.CurvePoint(1, 1.0, 0.5)], answers))
    return found


def scored(task: Task, errors: float, **how) -> compare.Scored:
    """A report like one of `read_scored`, without files."""
    some = members(task, errors, **how)
    values = [
        metrics.score(task, m.predictions.true, m.predictions.predicted, m.predictions.probabilities) for m in some
    ]
    mean, half = metrics.mean_interval([value["headline"] for value in values])
    results = {
        "task": task.name, "metric": task.metric, "split": "test", "lower_is_better": task.metric == "eer",
        "slots": {slot.name: list(slot.labels) for slot in task.slots}, "baselines": {"ngram": {"test": 0.4}},
        "headline": {"mean": mean, "half_width_95": half, "values": [value["headline"] for value in values]},
        "members": [{"seed": m.seed, "metrics": v} for m, v in zip(some, values, strict=True)],
    }  # fmt: skip
    return compare.Scored(results, [m.predictions for m in some])


# ---- the intervals


def test_the_interval_over_seeds_has_95_percent_coverage() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        low, high = compare.over_seeds((0.3 + 0.1 * rng.standard_normal(5)).tolist())
        inside += low <= 0.3 <= high
    assert 0.935 < inside / 2000 < 0.965


def test_the_interval_over_utterances_has_95_percent_coverage() -> None:
    """Differences of means over five seeds: multiples of 0.2 between -1 and 1."""
    rng = np.random.default_rng(1)
    inside = 0
    for number in range(600):
        difference = (rng.binomial(5, 0.7, 200) - rng.binomial(5, 0.6, 200)) / 5
        low, high = compare.over_utterances(difference, draws=1000, seed=number)
        inside += low <= 0.1 <= high
    assert 0.92 < inside / 600 < 0.975


def test_the_bootstrap_equals_drawing_single_utterances() -> None:
    rng = np.random.default_rng(2)
    difference = rng.choice([-1.0, 0.0, 0.25, 1.0], 80, p=[0.1, 0.5, 0.2, 0.2])
    drawn = difference[rng.integers(80, size=(40_000, 80))].mean(axis=1)
    assert compare.over_utterances(difference, 40_000) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.005)


def test_pairing_narrows_the_interval() -> None:
    """Two variants with errors on the same utterances: pairing detects a small gain, unpaired draws do not."""
    rng = np.random.default_rng(3)
    hard = rng.random(400) < 0.4
    theirs = np.where(hard, 0.0, 1.0)
    ours = theirs.copy()
    ours[np.flatnonzero(hard)[:12]] = 1
    low, _ = compare.over_utterances(ours - theirs)
    assert low > 0
    shuffled, _ = compare.over_utterances(ours - rng.permutation(theirs))
    assert shuffled < 0


def test_no_difference_at_all_does_not_exclude_zero() -> None:
    same = compare.gain(scored(WORD, 0.2), scored(WORD, 0.2))
    assert same["mean"] == 0
    assert same["over_seeds"] == same["over_utterances"] == {"low": 0.0, "high": 0.0, "excludes_zero": False}


@hypothesis.given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=1, max_size=50), st.integers(0, 9))
def test_swapping_sides_flips_the_sign(values: list[float], seed: int) -> None:
    one = compare.over_utterances(np.asarray(values), draws=200, seed=seed)
    assert min(values) - 1e-9 <= one[0] <= one[1] <= max(values) + 1e-9
    assert compare.over_utterances(np.asarray(values), draws=200, seed=seed) == one
    if len(values) > 1:
        low, high = compare.over_seeds(values)
        assert compare.over_seeds([-v for v in values]) == pytest.approx((-high, -low))


@pytest.mark.parametrize("bad", [np.zeros(0), np.zeros((2, 2)), np.asarray([0.0, np.nan])])
def test_invalid_differences_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be \\[n\\]"):
        compare.over_utterances(bad)


# ---- gains


@pytest.mark.parametrize("task", [WORD, INTENT, PARTS], ids=lambda task: task.name)
def test_a_gain_is_the_difference_of_the_metric_and_of_the_answers(task: Task) -> None:
    ours, theirs = scored(task, 0.1, shift=1), scored(task, 0.4)
    found = compare.gain(ours, theirs)
    heads = [[m["metrics"]["headline"] for m in one.results["members"]] for one in (ours, theirs)]
    assert found["values"] == pytest.approx(np.subtract(*heads))
    assert found["mean"] == pytest.approx(np.mean(heads[0]) - np.mean(heads[1]))
    assert found["over_utterances"]["low"] < found["mean"] < found["over_utterances"]["high"]
    assert found["over_seeds"]["excludes_zero"]
    assert found["over_utterances"]["excludes_zero"]
    back = compare.gain(theirs, ours)
    assert back["mean"] == pytest.approx(-found["mean"])
    assert back["over_utterances"]["excludes_zero"]


def test_the_sign_follows_the_metric() -> None:
    found = compare.gain(scored(SPOOF, 0.1, shift=1), scored(SPOOF, 0.4))
    assert found["mean"] > 0.2
    assert found["over_seeds"]["low"] > 0
    assert found["over_utterances"] is None  # the EER is not a mean over utterances


def test_a_single_seed_has_no_interval_over_seeds() -> None:
    found = compare.gain(scored(WORD, 0.1, seeds=(4,), shift=1), scored(WORD, 0.5, seeds=(4,)))
    assert found["over_seeds"] is None
    assert found["over_utterances"]["excludes_zero"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (scored(WORD, 0.1, seeds=(0, 1)), r"seeds \[0, 1, 2\] and \[0, 1\]"),
        (scored(WORD, 0.1, seeds=(0, 2, 1)), r"seeds \[0, 1, 2\] and \[0, 2, 1\]"),
        (scored(WORD, 0.1, n=59), "60 utterances in one report, 59"),
        (scored(WORD, 0.1, ids=[f"test/{59 - i:03d}.wav" for i in range(60)]), "utterance 0 of seed 0 is 'test/000"),
        (scored(Task("word", INTENT.slots), 0.1), "slots"),
        (scored(Task("words", WORD.slots), 0.1), "task: 'word' and 'words'"),
        (scored(Task("word", WORD.slots, "exact_match"), 0.1), "metric: 'accuracy' and 'exact_match'"),
    ],
)
def test_invalid_pairs_are_refused(other: compare.Scored, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare.gain(scored(WORD, 0.1), other)


def test_other_labels_of_the_same_utterances_are_refused() -> None:
    ours, theirs = scored(WORD, 0.1), scored(WORD, 0.1)
    theirs.answers[1].true[7] = (theirs.answers[1].true[7] + 1) % 3
    with pytest.raises(ValueError, match=r"utterance 'test/007\.wav' has different labels"):
        compare.gain(ours, theirs)


# ---- from reports to a page


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports of two variants on two tasks, as written by a job."""
    folder = tmp_path_factory.mktemp("reports")
    for number, (name, errors) in enumerate((("plain", 0.5), ("better", 0.1))):
        for task in (WORD, INTENT):
            ngram = {"test": 0.4, "chosen": "joint", "variants": {}}
            baselines = {"ngram": ngram} if name == "plain" else None
            some = members(task, errors, shift=number)
            report.write_report(folder / name / task.name, task=task, members=some, baselines=baselines)
    return folder


def places(folder: Path) -> dict[str, dict[str, Path]]:
    return {name: {task.name: folder / name / task.name for task in (WORD, INTENT)} for name in ("plain", "better")}


def test_a_comparison_agrees_with_the_reports(reports: Path) -> None:
    found = compare.write_comparison(reports, places(reports), "plain", draws=500)
    assert json.loads((reports / "comparison.json").read_text()) == found
    for name in ("word", "intent"):
        result = found["tasks"][name]
        head = json.loads((reports / "better" / name / "results.json").read_text())["headline"]
        assert result["variants"]["better"]["mean"] == head["mean"]
        assert result["variants"]["better"]["half_width_95"] == head["half_width_95"]
        assert result["ngram"] == 0.4
        assert result["seeds"] == [0, 1, 2]
        assert "gain" not in result["variants"]["plain"]
        assert result["variants"]["better"]["gain"]["over_seeds"]["excludes_zero"]
    page = (reports / "summary.md").read_text()
    gain = found["tasks"]["word"]["variants"]["better"]["gain"]
    (row,) = [line for line in page.splitlines() if line.startswith("| word | better")]
    assert f"{100 * gain['mean']:+.2f}" in row
    assert f"{100 * gain['over_utterances']['low']:+.2f} to" in row
    assert row.endswith("| yes |")
    assert "[plain](plain/summary.md) (baseline)" in page
    assert "40.00" in page


def test_a_comparison_is_deterministic(reports: Path) -> None:
    one = compare.write_comparison(reports, places(reports), "plain", draws=500)
    assert compare.write_comparison(reports, places(reports), "plain", draws=500) == one


def test_an_interval_that_includes_zero_is_shown_in_the_page(reports: Path) -> None:
    found = compare.write_comparison(reports, places(reports), "plain", draws=500)
    result = found["tasks"]["word"]["variants"]["better"]["gain"]
    result["over_seeds"] |= {"low": -0.1, "excludes_zero": False}
    (row,) = [line for line in compare.summary(found).splitlines() if line.startswith("| word | better")]
    assert row.endswith("| over utterances only |")
    result["over_utterances"] |= {"low": -0.1, "excludes_zero": False}
    (row,) = [line for line in compare.summary(found).splitlines() if line.startswith("| word | better")]
    assert row.endswith("| no |")


def test_a_variant_without_a_task_is_refused(reports: Path) -> None:
    some = places(reports)
    del some["better"]["intent"]
    with pytest.raises(ValueError, match="variant 'better' has no report of 'intent', which 'plain' has"):
        compare.write_comparison(reports, some, "plain")


def test_reports_that_are_not_a_pair_are_named(reports: Path, tmp_path: Path) -> None:
    report.write_report(tmp_path, task=WORD, members=members(WORD, 0.1, seeds=(5, 6)))
    some = places(reports)
    some["better"]["word"] = tmp_path
    with pytest.raises(ValueError, match=r"word, better against plain: the reports have seeds \[5, 6\]"):
        compare.write_comparison(reports, some, "plain")


@pytest.mark.parametrize("content", ["{", "{}", '{"members": [{"seed": 0}]}'])
def test_a_damaged_report_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json is not a report"):
        compare.read_scored(tmp_path)
