"""Adam with warm-up and decay, applied to each member of a bank separately, and fairseq's variant of Adam."""

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
    """Adam settings.

    Attributes:
      lr: peak learning rate.
      warmup: fraction of the updates (in a bank: of the member's updates) with linear warm-up from 0.
      decay: "cosine" to 0, or "constant".
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the square root of the second moment.
      eps_before_correction: add eps before bias correction (fairseq's convention) instead of after.
      weight_decay: decoupled (AdamW). Applied to matrices; in a bank to all trained leaves of a member.
      clip: maximum gradient norm of a member; 0: no clipping.
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
                raise ValueError(f"optim: {name} is {getattr(self, name)}, must be in [0, 1)")
        for name in ("eps", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim: {name} is {getattr(self, name)}, must be finite and at least 0")


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, for a run of `steps` updates."""
    warmup = int(config.warmup * steps)
    if config.decay == "constant":
        return optax.warmup_constant_schedule(0.0 if warmup else config.lr, config.lr, warmup)
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else config.lr, config.lr, warmup, max(steps, warmup + 1))


def member_norms(grads: Flat) -> jax.Array:
    """Gradient norm of each member, float32 [N]. Leaves under `prompt/` have the bank axis; others are shared."""

    def squares(path: str, leaf: jax.Array) -> jax.Array:
        axes = tuple(range(1, leaf.ndim)) if path.startswith("prompt/") else None
        return jnp.atleast_1d(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes))

    return jnp.sqrt(sum(squares(path, leaf) for path, leaf in grads.items() if leaf.ndim))


def clip_members(max_norm: float) -> optax.GradientTransformation:
    """Clip each member's gradient to `max_norm` independently of the other members."""

    def update(grads: Flat, state: optax.OptState, params: Flat | None = None) -> tuple[Flat, optax.OptState]:
        del params
        arrays = {path: leaf for path, leaf in grads.items() if isinstance(leaf, jax.Array)}
        scale = jnp.minimum(1.0, max_norm / (member_norms(arrays) + 1e-6))

        def clip(path: str, leaf: jax.Array) -> jax.Array:
            member_scale = scale.reshape(-1, *[1] * (leaf.ndim - 1)) if path.startswith("prompt/") else scale[0]
            return leaf * member_scale

        return {path: clip(path, leaf) if path in arrays else leaf for path, leaf in grads.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class ScheduleState(NamedTuple):
    """State of `scale_members`, [N] each: updates so far, peak learning rate, index of the schedule."""

    step: jax.Array
    lr: jax.Array
    schedule: jax.Array


def scale_members(config: OptimConfig, steps: Sequence[int], lrs: Sequence[float]) -> optax.GradientTransformation:
    """Scale each member's updates by its learning rate, at its own step count.

    Args:
      config: warm-up and decay.
      steps: total updates of each member, [N].
      lrs: peak learning rate of each member, [N].
    """
    lengths, number = np.unique(steps, return_inverse=True)
    shapes = [schedule(dataclasses.replace(config, lr=1.0), int(length)) for length in lengths]

    def init(params: Flat) -> ScheduleState:
        del params
        return ScheduleState(
            jnp.zeros(len(lrs), jnp.int32), jnp.asarray(lrs, jnp.float32), jnp.asarray(number, jnp.int32)
        )

    def update(updates: Flat, state: ScheduleState, params: Flat | None = None) -> tuple[Flat, ScheduleState]:
        del params
        shares = jnp.stack([jax.vmap(shape)(state.step) for shape in shapes])
        rates = -state.lr * jnp.take_along_axis(shares, state.schedule[None], axis=0)[0]
        scaled = jax.tree.map(lambda leaf: leaf * rates.reshape(-1, *[1] * (leaf.ndim - 1)), updates)
        return scaled, state._replace(step=state.step + 1)

    return optax.GradientTransformation(init, update)


class DecayState(NamedTuple):
    """State of `decay_members`: weight decay of each member, [N]."""

    rate: jax.Array


def decay_members(rates: Sequence[float]) -> optax.GradientTransformation:
    """Add weight decay to each member's updates, with a separate rate for each member, [N]."""

    def update(updates: Flat, state: DecayState, params: Flat | None = None) -> tuple[Flat, DecayState]:
        add = lambda leaf, param: leaf + param * state.rate.reshape(-1, *[1] * (leaf.ndim - 1))  # noqa: E731
        return jax.tree.map(add, updates, params), state

    return optax.GradientTransformation(lambda params: DecayState(jnp.asarray(rates, jnp.float32)), update)


def make(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Make the optimizer of a single run of `steps` updates."""
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
    """Make the optimizer of a bank, which updates each member independently.

    All leaves of its state have a leading bank axis, so rows of state, parameters and gradients can be updated alone.

    Args:
      config: Adam settings.
      steps: total updates of each member, [N].
      lrs: peak learning rate of each member, [N].
      decays: weight decay of each member, [N]; None: `config.weight_decay` for all.
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
