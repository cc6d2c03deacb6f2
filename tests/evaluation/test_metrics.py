"""Metrics against scikit-learn, hand-computed cases and invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from spjax.evaluation import metrics
from spjax.tasks import TASKS, Slot, Task

FSC = TASKS["fsc"]
BINARY = Task("vad", (Slot("kind", ("speech", "background")),), metric="eer")

seeds = st.integers(0, 2**32 - 1)


def random_run(task: Task, n: int, rng: np.random.Generator, noise: float = 3.0):
    """(true, predicted [n, K] over all slots, K probabilities [n, C_k])."""
    true, predicted, probabilities = [], [], []
    for k, slot in enumerate(task.slots):
        size = len(slot.labels)
        answer = rng.integers(size, size=n)
        logits = rng.normal(size=(n, size)) * noise + 3 * np.eye(size)[answer]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        true.append(answer + task.slot_offsets[k])
        predicted.append(p.argmax(1) + task.slot_offsets[k])
        probabilities.append(p)
    return np.stack(true, 1), np.stack(predicted, 1), probabilities


# ---- EER


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([4, 3, 2, 1], [1, 1, 0, 0], 0.0),  # separated
        ([4, 3, 2, 1], [0, 0, 1, 1], 1.0),  # separated in the wrong order
        ([1, 1, 1, 1], [1, 0, 1, 0], 0.5),  # one tie: half of each class on either side
        ([4, 3, 2, 1], [1, 0, 1, 0], 0.5),
        ([6, 5, 4, 3, 2, 1], [1, 1, 0, 1, 0, 0], 1 / 3),
        ([3, 2, 2, 1], [1, 1, 0, 0], 0.25),  # the tie is a diagonal from (0, .5) to (.5, 0)
        ([2, 1, 1, 1], [1, 1, 0, 0], 1 / 3),  # (0, .5) to (1, 0) crosses the other diagonal in 1/3
        ([np.inf, 1, -np.inf, -np.inf], [1, 1, 0, 0], 0.0),
    ],
)
def test_eer_by_hand(scores, positive, expected):
    assert metrics.equal_error_rate(np.array(scores), np.array(positive, bool)) == pytest.approx(expected, abs=1e-12)


@st.composite
def scored(draw):
    """Scores on a coarse grid, so that ties are common, and both classes."""
    n = draw(st.integers(2, 40))
    scores = np.array(draw(st.lists(st.integers(-8, 8), min_size=n, max_size=n)), float)
    positive = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    assume(0 < positive.sum() < n)
    return scores, positive


@settings(deadline=None)
@given(scored())
def test_eer_is_on_scikit_learns_roc(case):
    scores, positive = case
    rate = metrics.equal_error_rate(scores, positive)
    far, hit, _ = sk.roc_curve(positive, scores, drop_intermediate=False)
    # Intersection of the piecewise linear ROC with miss = false alarm, by bisection.
    share = np.linspace(0, 1, 20001)
    x = np.interp(share * (len(far) - 1), np.arange(len(far)), far)
    miss = 1 - np.interp(share * (len(far) - 1), np.arange(len(far)), hit)
    assert rate == pytest.approx(x[np.abs(x - miss).argmin()], abs=5e-3)


@settings(deadline=None)
@given(scored(), st.randoms(use_true_random=False))
def test_eer_invariants(case, random):
    scores, positive = case
    rate = metrics.equal_error_rate(scores, positive)
    order = np.array(random.sample(range(len(scores)), len(scores)))
    assert 0 <= rate <= 1
    assert metrics.equal_error_rate(scores[order], positive[order]) == rate
    assert metrics.equal_error_rate(np.exp(scores / 3), positive) == pytest.approx(rate)  # only the order matters
    assert metrics.equal_error_rate(-scores, ~positive) == pytest.approx(rate)  # either class may be the positive one
    assert metrics.equal_error_rate(-scores, positive) == pytest.approx(1 - rate)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-8, 8), st.integers(0, 3)), min_size=1, max_size=20))
def test_eer_of_a_better_than_random_scorer_is_at_most_half(pairs):
    """Better: at every threshold positives are accepted at least as often as negatives."""
    negatives = np.array([value for value, _ in pairs], float)
    scores = np.concatenate([negatives, negatives + [ahead for _, ahead in pairs]])
    rate = metrics.equal_error_rate(scores, np.arange(len(scores)) >= len(pairs))
    assert 0 <= rate <= 0.5 + 1e-12


def test_eer_refuses_invalid_input():
    with pytest.raises(ValueError, match="3 positive and 0 negative"):
        metrics.equal_error_rate(np.arange(3.0), np.ones(3, bool))
    with pytest.raises(ValueError, match="NaN at example 1"):
        metrics.equal_error_rate(np.array([0, np.nan, 1]), np.array([True, False, True]))
    with pytest.raises(ValueError, match="booleans"):
        metrics.equal_error_rate(np.arange(2.0), np.array([0, 1]))
    with pytest.raises(ValueError, match="both be"):
        metrics.equal_error_rate(np.arange(3.0), np.array([True, False]))


# ---- intervals


def test_mean_interval_by_hand():
    mean, half = metrics.mean_interval([0.8, 0.9, 1.0])
    assert mean == pytest.approx(0.9)
    assert half == pytest.approx(4.302652729911275 * 0.1 / 3**0.5)  # t table: 97.5 %, 2 degrees of freedom
    assert metrics.mean_interval([0.7]) == (pytest.approx(0.7), None)
    assert metrics.mean_interval([0.7, 0.7]) == (pytest.approx(0.7), 0.0)


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [float("inf")]])
def test_mean_interval_refuses(values):
    with pytest.raises(ValueError, match="mean_interval"):
        metrics.mean_interval(values)


def test_mean_interval_has_its_nominal_coverage():
    rng = np.random.default_rng(0)
    runs = [metrics.mean_interval(rng.normal(size=4)) for _ in range(2000)]
    assert np.mean([abs(mean) <= half for mean, half in runs]) == pytest.approx(0.95, abs=0.015)


def test_wilson_by_hand():
    assert metrics.wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert metrics.wilson_interval(0, 10)[0] == 0
    assert metrics.wilson_interval(10, 10)[1] == pytest.approx(1)


@settings(deadline=None)
@given(st.integers(1, 5000), st.data())
def test_wilson_contains_the_rate_and_is_symmetric(total, data):
    correct = data.draw(st.integers(0, total))
    low, high = metrics.wilson_interval(correct, total)
    assert 0 <= low <= correct / total + 1e-12
    assert correct / total - 1e-12 <= high <= 1
    assert metrics.wilson_interval(total - correct, total) == pytest.approx((1 - high, 1 - low))


# ---- all scores of a run


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 40), st.sampled_from(["fsc", "gsc"]))
def test_a_perfect_run_scores_one(seed, n, name):
    true, _, probabilities = random_run(TASKS[name], n, np.random.default_rng(seed))
    result = metrics.score(TASKS[name], true, true, probabilities)
    assert all(value == pytest.approx(1) for value in result.values())


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(2, 40))
def test_scores_do_not_depend_on_the_order_of_utterances(seed, n):
    rng = np.random.default_rng(seed)
    for task in (FSC, BINARY):
        true, predicted, probabilities = random_run(task, n, rng)
        assume(len(np.unique(true[:, 0])) > 1)
        order = rng.permutation(n)
        result = metrics.score(task, true, predicted, probabilities)
        shuffled = metrics.score(task, true[order], predicted[order], [p[order] for p in probabilities])
        assert shuffled == pytest.approx(result)
        assert all(0 <= value <= 1 for value in result.values())
        assert result["exact_match"] <= result["accuracy"] + 1e-12


def test_scores_by_hand():
    # action, object, location: right, wrong object, wrong object and location
    true = np.array([[0, 6, 20], [1, 7, 21], [2, 8, 22]])
    predicted = np.array([[0, 6, 20], [1, 8, 21], [2, 9, 23]])
    flat = [np.full((3, len(slot.labels)), 1 / len(slot.labels)) for slot in FSC.slots]
    result = metrics.score(FSC, true, predicted, flat)
    assert result["headline"] == result["exact_match"] == pytest.approx(1 / 3)
    assert result["accuracy/action"] == 1
    assert result["accuracy/object"] == pytest.approx(1 / 3)
    assert result["accuracy/location"] == pytest.approx(2 / 3)
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["macro_f1/object"] == pytest.approx(1 / 4)  # none 1, music 0, lights 0, and volume, never true, 0
    assert result["weighted_f1/object"] == pytest.approx(1 / 3)
    assert "eer" not in result


def test_headline_is_the_tasks_metric():
    true, predicted, probabilities = random_run(BINARY, 200, np.random.default_rng(0))
    result = metrics.score(BINARY, true, predicted, probabilities)
    expected = metrics.equal_error_rate(probabilities[0][:, 1], true[:, 0] == 1)  # the other label is positive
    assert result["headline"] == result["eer"] == pytest.approx(expected)
    weighted = Task("mustard", BINARY.slots, metric="weighted_f1")
    assert metrics.score(weighted, true, predicted, probabilities)["headline"] == pytest.approx(
        sk.f1_score(true[:, 0], predicted[:, 0], average="weighted")
    )


def test_saturated_probabilities_keep_their_order_in_the_eer():
    """1 - 1e-20 rounds to 1: only the other label's probability distinguishes such utterances."""
    other = np.array([1e-30, 1e-20, 1e-10, 1e-5])
    probabilities = [np.stack([1 - other, other], 1)]
    true = np.array([[0], [0], [1], [1]])
    assert metrics.score(BINARY, true, np.zeros((4, 1), int), probabilities)["eer"] == 0


def test_one_class_only():
    true = np.zeros((5, 1), int)
    probabilities = [np.full((5, 2), 0.5)]
    with pytest.raises(ValueError, match="5 positive and 0 negative"):
        metrics.score(BINARY, true, true, probabilities)
    task = Task("gender", BINARY.slots)
    assert "eer" not in metrics.score(task, true, true, probabilities)


def test_score_refuses_invalid_input():
    true, predicted, probabilities = random_run(FSC, 6, np.random.default_rng(1))

    def refuses(message, task=FSC, true=true, predicted=predicted, probabilities=probabilities):
        with pytest.raises(ValueError, match=message):
            metrics.score(task, true, predicted, probabilities)

    refuses(r"classes_true: shape \(6, 2\)", true=true[:, :2])
    refuses("classes_true: dtype float64", true=true.astype(float))
    refuses(
        r"joint_pred: row 0 has class \d+ in slot 'object', whose classes are 6..19", predicted=predicted * [1, 0, 1]
    )
    refuses(r"\(6, 3\) and joint_pred \(5, 3\) differ", predicted=predicted[:5])
    refuses("no examples", true=true[:0], predicted=predicted[:0], probabilities=[p[:0] for p in probabilities])
    refuses("3 slots, but got 2", probabilities=probabilities[:2])
    refuses(r"slot 'action': shape \(6, 5\)", probabilities=[probabilities[0][:, :5], *probabilities[1:]])
    nan = probabilities[1].copy()
    nan[4, 2] = np.nan
    refuses("slot 'object': row 4 is not finite", probabilities=[probabilities[0], nan, probabilities[2]])
    refuses("row 0 is not a distribution", probabilities=[np.log(p) for p in probabilities])
    refuses("row 0 is not a distribution", probabilities=[3 * p for p in probabilities])


def test_a_task_refuses_an_impossible_metric():
    with pytest.raises(ValueError, match="unknown metric 'f2'"):
        Task("x", FSC.slots, metric="f2")
    with pytest.raises(ValueError, match="eer is defined for a single slot of two labels"):
        Task("x", FSC.slots, metric="eer")


def test_score_takes_1251_classes():
    task = Task("speaker", (Slot("speaker", tuple(f"id{i}" for i in range(1251))),))
    true, predicted, probabilities = random_run(task, 300, np.random.default_rng(2))
    result = metrics.score(task, true, predicted, probabilities)
    assert result["accuracy"] == pytest.approx(sk.accuracy_score(true[:, 0], predicted[:, 0]))
    assert result["macro_f1"] == pytest.approx(
        sk.f1_score(true[:, 0], predicted[:, 0], average="macro", zero_division=0)
    )
