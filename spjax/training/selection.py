"""The best epoch of every member of a bank, and early stopping."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from spjax.training import sharding
from spjax.types import State

_log = logging.getLogger(__name__)


def keep_best(
    state: State, epoch: int, score: np.ndarray, patience: int, where: Mapping[str, NamedSharding | State]
) -> State:
    """Update the best parameters of active members, and deactivate those without progress.

    Args:
      state: of `train.train`.
      epoch: index of the epoch.
      score: [N, 2], where higher is better and column 1 breaks ties of column 0; -inf: not better.
      patience: epochs without a better score after which a member is deactivated; 0: never.
      where: shardings of the state.
    """
    small = sharding.fetch({name: state[name] for name in ("active", "best_score", "best_epoch")})
    (new, tie), (best, best_tie) = score.astype(np.float32).T, small["best_score"].T
    better = small["active"] & ((new > best) | (np.isfinite(new) & (new == best) & (tie > best_tie)))
    best_epoch = np.where(better, epoch, small["best_epoch"]).astype(np.int32)
    active = small["active"] & ((epoch - best_epoch < patience) if patience else True)
    for n in np.flatnonzero(small["active"] & ~active):
        _log.info(
            "member %d stops: %s", n, f"best epoch {best_epoch[n] + 1}" if best_epoch[n] >= 0 else "no epoch kept"
        )

    def pick(path: str) -> jax.Array:
        trained, kept = state["trained"][path], state["best"][path]
        chosen = better.reshape(-1, *[1] * (trained.ndim - 1)) if path.startswith("prompt/") else better[0]
        return jnp.where(chosen, trained, kept)

    changed = {
        "best": {path: pick(path) for path in state["best"]},
        "active": active,
        "best_score": np.where(better[:, None], score, small["best_score"]).astype(np.float32),
        "best_epoch": best_epoch,
    }
    return {**state, **sharding.place(changed, {name: where[name] for name in changed})}
