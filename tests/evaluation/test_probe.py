"""The linear probe on states of which only one layer has information about the label."""

from __future__ import annotations

import json

import numpy as np
import pytest

from spjax.evaluation.probe import STRENGTHS, probe_baseline
from spjax.tasks import Slot, Task

TASK = Task("two", (Slot("first", ("a", "b", "c")), Slot("second", ("x", "y"))), metric="exact_match")


def splits(informed: int = 1, layers: int = 3) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """States [L, n, 8] and classes [n, 2] of each split: layer `informed` has a direction for every class."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(5, 8))
    states, classes = {}, {}
    for split, n in (("train", 120), ("valid", 60), ("test", 60)):
        of = np.stack([rng.integers(0, 3, n), rng.integers(3, 5, n)], axis=1)
        every = rng.normal(size=(layers, n, 8)).astype(np.float32)
        every[informed] = 100 + 3 * every[informed] + 10 * directions[of].sum(axis=1)
        states[split], classes[split] = every, of
    return states, classes


@pytest.mark.parametrize("informed", [0, 2])
def test_the_informative_layer_is_chosen_on_valid(informed: int):
    states, classes = splits(informed)
    found = probe_baseline(TASK, states, classes)
    assert found["layer"] == informed + 1
    assert found["test"] > 0.8
    assert set(found["variants"]) == {"per_slot", "joint"}
    assert {variant["strength"] for variant in found["variants"].values()} <= set(STRENGTHS)
    per_slot, joint = (found["variants"][name]["parameters"] for name in ("per_slot", "joint"))
    assert (per_slot, joint) == (3 * 9 + 9, 6 * 9), "of two labels, one is what the other is not"
    json.dumps(found, allow_nan=False)


def test_choices_do_not_look_at_test():
    states, classes = splits()
    fair = probe_baseline(TASK, states, classes)
    rng = np.random.default_rng(1)
    spoilt = probe_baseline(TASK, states, classes | {"test": rng.permutation(classes["test"])})
    assert spoilt["test"] < fair["test"]
    for name in ("layer", "chosen", "valid"):
        assert spoilt[name] == fair[name]
    for name, variant in fair["variants"].items():
        assert variant["strength"] == spoilt["variants"][name]["strength"]


def test_an_empty_split_is_refused():
    states, classes = splits()
    empty = {"valid": states["valid"][:, :0]}, {"valid": classes["valid"][:0]}
    with pytest.raises(ValueError, match="valid split has no utterances"):
        probe_baseline(TASK, states | empty[0], classes | empty[1])
