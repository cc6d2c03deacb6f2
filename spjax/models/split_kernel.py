"""Sharded kernels of an LM that does not fit on one device: all-gathered layer by layer where they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax.sharding import NamedSharding

F = TypeVar("F", bound=Callable[..., Any])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitKernel:
    """A kernel that is sharded over devices.

    Attributes:
      sharded: [L, in, out], or one layer of it.
      full: sharding of a layer [in, out] after the all-gather.
    """

    sharded: jax.Array
    full: NamedSharding = dataclasses.field(metadata={"static": True})


def gathered(weights: Any) -> Any:
    """All-gather the sharded kernels of a layer's weights; other weights are returned unchanged."""
    gather = lambda leaf: jax.lax.with_sharding_constraint(leaf.sharded, leaf.full) if _split(leaf) else leaf  # noqa: E731
    return jax.tree.map(gather, weights, is_leaf=_split)


def recomputed(run: F, weights: Any, everything: bool = False) -> F:
    """Wrap `run` so that the backward pass all-gathers kernels again instead of keeping them.

    Args:
      run: function of layer weights and other pytrees.
      weights: its weights; if none is sharded, `run` is returned unchanged.
      everything: rematerialise all of `run`.
    """
    split = any(isinstance(leaf, SplitKernel) for leaf in jax.tree.leaves(weights, is_leaf=_split))
    if not (split or everything):
        return run
    # Save neither the gathered kernel nor its cast; with checkpoint names the input of the named value would be saved.
    saveable = lambda primitive, *_, **__: primitive.name not in ("sharding_constraint", "convert_element_type")  # noqa: E731
    return cast(F, jax.checkpoint(run, policy=None if everything else saveable))


def _split(leaf: Any) -> bool:
    return isinstance(leaf, SplitKernel)
