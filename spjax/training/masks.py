"""Select trained parameters by a regex over parameter paths; all others are frozen and have no optimizer state.

Parameters are flat dicts, `{"lm/layers/key/kernel": array, ...}`. The mask, sharding rules and checkpoints share these
paths.
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
    """Flatten a nested tree to `{path: leaf}`, path components joined by `/`."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, jax.Array]) -> Params:
    """Invert `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def split(flat: Flat, trainable: str) -> tuple[Flat, Flat]:
    """Split into (trained, frozen) leaves; a leaf is trained if the regex matches its full path.

    Raises:
      ValueError: the regex matches no path.
    """
    trained = {path: leaf for path, leaf in flat.items() if re.fullmatch(trainable, path)}
    if not trained:
        raise ValueError(f"trainable={trainable!r} matches no parameter; there are: {', '.join(sorted(flat))}")
    return trained, {path: leaf for path, leaf in flat.items() if path not in trained}


def masked(tx: optax.GradientTransformation, trained: Flat, frozen: Flat) -> optax.GradientTransformation:
    """Restrict an optimizer to the trained leaves; frozen leaves get zero updates and no state."""
    labels = {**dict.fromkeys(trained, "trained"), **dict.fromkeys(frozen, "frozen")}
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def apply_gradients(
    tx: optax.GradientTransformation, state: optax.OptState, trained: Flat, frozen: Flat, grads: Flat
) -> tuple[Flat, optax.OptState]:
    """Update the trained leaves. Gradients of frozen leaves are scalar zeros, so that no arrays are allocated."""
    zeros = {path: jnp.zeros(()) for path in frozen}
    updates, state = tx.update({**grads, **zeros}, state, {**trained, **frozen})
    return optax.apply_updates(trained, {path: updates[path] for path in trained}), state
