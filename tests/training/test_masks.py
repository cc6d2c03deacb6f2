"""Trained and frozen parameters, and the optimizer state of the frozen ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spjax.training import masks, optim
from tests import toy


def _flat(members: int = 2) -> masks.Flat:
    prompt = {"key": jnp.ones((members, 2, 4, 32)), "sep": jnp.ones((members, 1, 32))}
    return masks.flatten({"lm": toy.tiny_lm(), "prompt": prompt})


def test_flatten_is_undone() -> None:
    tree = {"lm": {"embed": 1, "layers": {"key": {"kernel": 2}}}, "prompt": {"sep": 3}}
    flat = masks.flatten(tree)
    assert flat == {"lm/embed": 1, "lm/layers/key/kernel": 2, "prompt/sep": 3}
    assert masks.unflatten(flat) == tree


@pytest.mark.parametrize(
    ("regex", "count"), [("prompt/.*", 2), (".*", 2 + 19), ("prompt/sep", 1), (r"lm/layers/.*/bias", 8)]
)
def test_the_regex_must_match_whole_paths(regex: str, count: int) -> None:
    flat = _flat()
    trained, frozen = masks.split(flat, regex)
    assert len(trained) == count
    assert {**trained, **frozen}.keys() == flat.keys()
    assert not trained.keys() & frozen.keys()


def test_a_regex_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainable='prompt' matches no parameter; there are: lm/embed, .*prompt/sep"):
        masks.split(_flat(), "prompt")


@pytest.mark.parametrize("eps_before", [False, True])
def test_the_optimizer_has_no_state_for_frozen_leaves(eps_before: bool) -> None:
    trained, frozen = masks.split(_flat(), "prompt/.*")
    config = optim.OptimConfig(eps_before_correction=eps_before, weight_decay=0.1)
    state = masks.masked(optim.make(config, 10), trained, frozen).init({**trained, **frozen})
    sizes = [leaf.size for leaf in jax.tree.leaves(state)]
    assert sum(size for size in sizes if size > 1) == 2 * sum(leaf.size for leaf in trained.values())
    assert sum(size == 1 for size in sizes) < 8  # counts, learning rates


def test_an_update_changes_only_trained_leaves_and_needs_no_frozen_gradient() -> None:
    trained, frozen = masks.split(_flat(), "prompt/.*")
    tx = masks.masked(optim.make(optim.OptimConfig(warmup=0.0), 10), trained, frozen)
    state = tx.init({**trained, **frozen})
    grads = {path: jnp.full(leaf.shape, 0.1) for path, leaf in trained.items()}
    new, _ = masks.apply_gradients(tx, state, trained, frozen, grads)
    assert new.keys() == trained.keys()
    for path, leaf in new.items():
        assert not np.any(np.asarray(leaf) == np.asarray(trained[path])), path
