"""Kernels of an LM that does not fit a chip: in pieces on several, put together layer by layer where they are used."""

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
    """A kernel whose pieces lie on different devices.

    Attributes:
      pieces: [L, in, out], or a layer of it, in pieces.
      whole: how a layer [in, out] lies once it is put together.
    """

    pieces: jax.Array
    whole: NamedSharding = dataclasses.field(metadata={"static": True})


def gathered(weights: Any) -> Any:
    """A layer's weights with every split kernel put together; others as they are."""
    whole = lambda leaf: jax.lax.with_sharding_constraint(leaf.pieces, leaf.whole) if _split(leaf) else leaf  # noqa: E731
    return jax.tree.map(whole, weights, is_leaf=_split)


def recomputed(run: F, weights: Any, everything: bool = False) -> F:
    """`run` with what `gathered` puts together in it put together once more on the way back, and not kept for that.

    Args:
      run: takes layers' weights and other arrays, of pytrees.
      weights: those that it is for; where none is split, nothing is done again.
      everything: compute all of `run` again, and keep nothing.
    """
    split = any(isinstance(leaf, SplitKernel) for leaf in jax.tree.leaves(weights, is_leaf=_split))
    if not (split or everything):
        return run
    # Neither the constraint itself may be kept nor its rounding; a name on either would leave its input to be.
    kept = lambda primitive, *_, **__: primitive.name not in ("sharding_constraint", "convert_element_type")  # noqa: E731
    return cast(F, jax.checkpoint(run, policy=None if everything else kept))


def _split(leaf: Any) -> bool:
    return isinstance(leaf, SplitKernel)
