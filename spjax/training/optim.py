"""Optimizers: Adam with warm-up and decay, all of it member by member in a bank, and the reference's Adam."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spjax.training.masks import Flat


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """An Adam run.

    Attributes:
      lr: peak learning rate.
      warmup: share of all steps (in a bank: of a member's own) in which it rises from 0.
      decay: "cosine" to 0, or "constant".
      b1: first moment's memory.
      b2: second moment's memory.
      eps: added to the root of the second moment.
      eps_before_correction: add eps before bias correction (fairseq's convention) instead of after.
      weight_decay: decoupled (AdamW): times the learning rate, of every matrix; in a bank of all that a member trains.
      clip: largest gradient norm of a member; 0 for no clipping.
    """

    lr: float = 5e-3
    warmup: float = 0.05
    decay: str = "cosine"
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    eps_before_correction: bool = False
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.decay not in ("cosine", "constant"):
            raise ValueError(f"optim: decay is {self.decay!r}, must be cosine or constant")
        if not 0 < self.lr < math.inf or not 0 <= self.warmup < 1:
            raise ValueError(f"optim: lr {self.lr} must be positive and warmup {self.warmup} in [0, 1)")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim: {name} is {getattr(self, name)}, must lie in [0, 1)")
        for name in ("eps", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim: {name} is {getattr(self, name)}, must not be negative, nor infinite")


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step."""
    warmup = int(config.warmup * steps)
    if config.decay == "constant":
        return optax.warmup_constant_schedule(0.0 if warmup else config.lr, config.lr, warmup)
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else config.lr, config.lr, warmup, max(steps, warmup + 1))


def member_norms(grads: Flat) -> jax.Array:
    """Gradient norm of each member, float32 [N]. Leaves under `prompt/` have the bank axis, others belong to all."""

    def squares(path: str, leaf: jax.Array) -> jax.Array:
        axes = tuple(range(1, leaf.ndim)) if path.startswith("prompt/") else None
        return jnp.atleast_1d(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes))

    return jnp.sqrt(sum(squares(path, leaf) for path, leaf in grads.items() if leaf.ndim))


def clip_members(max_norm: float) -> optax.GradientTransformation:
    """Scale each member's gradient down to `max_norm`, whatever the other members of the bank do."""

    def update(grads: Flat, state: optax.OptState, params: Flat | None = None) -> tuple[Flat, optax.OptState]:
        del params
        arrays = {path: leaf for path, leaf in grads.items() if isinstance(leaf, jax.Array)}
        scale = jnp.minimum(1.0, max_norm / (member_norms(arrays) + 1e-6))

        def clip(path: str, leaf: jax.Array) -> jax.Array:
            own = scale.reshape(-1, *[1] * (leaf.ndim - 1)) if path.startswith("prompt/") else scale[0]
            return leaf * own

        return {path: clip(path, leaf) if path in arrays else leaf for path, leaf in grads.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class Pace(NamedTuple):
    """Where the members of a bank stand, [N] each: updates so far, peak learning rate, number of their schedule."""

    step: jax.Array
    lr: jax.Array
    schedule: jax.Array


def scale_members(config: OptimConfig, steps: Sequence[int], lrs: Sequence[float]) -> optax.GradientTransformation:
    """Each member's updates times its own learning rate, by its own count of updates.

    Args:
      config: warm-up and decay.
      steps: updates of each member's whole run, [N].
      lrs: peak learning rate of each member, [N].
    """
    lengths, number = np.unique(steps, return_inverse=True)
    shapes = [schedule(dataclasses.replace(config, lr=1.0), int(length)) for length in lengths]

    def init(params: Flat) -> Pace:
        del params
        return Pace(jnp.zeros(len(lrs), jnp.int32), jnp.asarray(lrs, jnp.float32), jnp.asarray(number, jnp.int32))

    def update(updates: Flat, state: Pace, params: Flat | None = None) -> tuple[Flat, Pace]:
        del params
        shares = jnp.stack([jax.vmap(shape)(state.step) for shape in shapes])
        rates = -state.lr * jnp.take_along_axis(shares, state.schedule[None], axis=0)[0]
        scaled = jax.tree.map(lambda leaf: leaf * rates.reshape(-1, *[1] * (leaf.ndim - 1)), updates)
        return scaled, state._replace(step=state.step + 1)

    return optax.GradientTransformation(init, update)


class Decay(NamedTuple):
    """Weight decay of the members of a bank, [N]."""

    rate: jax.Array


def decay_members(rates: Sequence[float]) -> optax.GradientTransformation:
    """Add each member's parameters, times its own rate, to its updates."""

    def update(updates: Flat, state: Decay, params: Flat | None = None) -> tuple[Flat, Decay]:
        add = lambda leaf, own: leaf + own * state.rate.reshape(-1, *[1] * (leaf.ndim - 1))  # noqa: E731
        return jax.tree.map(add, updates, params), state

    return optax.GradientTransformation(lambda params: Decay(jnp.asarray(rates, jnp.float32)), update)


def make(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates: one count for everything that is trained."""
    decay = optax.add_decayed_weights(config.weight_decay, mask=_matrices) if config.weight_decay else optax.identity()
    return _chain(config, _adam(config), decay, optax.scale_by_learning_rate(schedule(config, steps)))


def _matrices(params: Flat) -> Any:
    """Which leaves are matrices. Norm scales and biases are none, though those of stacked layers have two axes."""
    vectors = ("scale", "bias")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim > 1 and not str(path[-1].key).endswith(vectors), params
    )


def make_bank(
    config: OptimConfig, steps: Sequence[int], lrs: Sequence[float], decays: Sequence[float] | None = None
) -> optax.GradientTransformation:
    """The optimizer of a bank: every member is stepped as if it were alone, whenever it takes part.

    Every leaf of its state has the bank axis in front. Rows of it, with those of parameters and gradients, are the
    optimizer of these members.

    Args:
      config: Adam settings.
      steps: updates of each member's whole run, [N].
      lrs: peak learning rate of each member, [N].
      decays: weight decay of each member, [N]; None: all as `config` says.
    """
    adam, decays = _adam(config), [config.weight_decay] * len(lrs) if decays is None else decays
    each = optax.GradientTransformation(jax.vmap(adam.init), jax.vmap(adam.update))
    return _chain(
        config, each, decay_members(decays) if any(decays) else optax.identity(), scale_members(config, steps, lrs)
    )


def _adam(config: OptimConfig) -> optax.GradientTransformation:
    if not config.eps_before_correction:
        return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    # optax adds eps to sqrt(v / (1 - b2^t)); fairseq to sqrt(v), then corrects both.
    eps = lambda count: config.eps / jnp.sqrt(1 - config.b2 ** (count + 1.0))  # noqa: E731
    return optax.inject_hyperparams(optax.scale_by_adam, static_args=("b1", "b2"))(b1=config.b1, b2=config.b2, eps=eps)


def _chain(config: OptimConfig, *steps: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(clip_members(config.clip) if config.clip else optax.identity(), *steps)
