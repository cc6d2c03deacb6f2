"""One mask says what trains: a regex over parameter paths. Everything else is frozen, and costs nothing.

Parameters are handled flat, `{"lm/layers/key/kernel": array, ...}`: the mask, the sharding rules and the checkpoint
speak of the same paths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from spjax.types import Params

Flat = dict[str, jax.Array]


def flatten(params: Params) -> Flat:
    """Nested tree to `{path: leaf}`, parts of a path joined by `/`."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, jax.Array]) -> Params:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def split(flat: Flat, trainable: str) -> tuple[Flat, Flat]:
    """(trained, frozen) leaves; trained are those whose whole path matches the regex.

    Raises:
      ValueError: the regex matches nothing.
    """
    trained = {path: leaf for path, leaf in flat.items() if re.fullmatch(trainable, path)}
    if not trained:
        raise ValueError(f"trainable={trainable!r} matches no parameter; there are: {', '.join(sorted(flat))}")
    return trained, {path: leaf for path, leaf in flat.items() if path not in trained}


def masked(tx: optax.GradientTransformation, trained: Flat, frozen: Flat) -> optax.GradientTransformation:
    """The optimizer for the trained leaves; frozen ones have no state and are set to zero updates."""
    labels = {**dict.fromkeys(trained, "trained"), **dict.fromkeys(frozen, "frozen")}
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def apply_gradients(
    tx: optax.GradientTransformation, state: optax.OptState, trained: Flat, frozen: Flat, grads: Flat
) -> tuple[Flat, optax.OptState]:
    """One update of the trained leaves. A frozen leaf's gradient is a scalar zero: its array never exists."""
    nothing = {path: jnp.zeros(()) for path in frozen}
    updates, state = tx.update({**grads, **nothing}, state, {**trained, **frozen})
    return optax.apply_updates(trained, {path: updates[path] for path in trained}), state
