"""Checkpoints of a run: trained leaves, optimizer, position and history; latest and best are kept."""

from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers


def open_checkpoints(workdir: str) -> ocp.CheckpointManager:
    """The run's checkpoints: written in the background, the latest and the best by `score` (higher is better) kept."""
    keep = managers.AnyPreservationPolicy(
        [
            managers.LatestN(n=1),
            managers.BestN(get_metric_fn=lambda metrics: metrics["score"], n=1, keep_checkpoints_without_metrics=False),
        ]
    )
    options = ocp.CheckpointManagerOptions(preservation_policy=keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(epath.Path(workdir).resolve() / "checkpoints", options=options)


def save(manager: ocp.CheckpointManager, step: int, state: Any, meta: dict[str, Any], score: float | None) -> None:
    """Write the state (arrays) and meta (JSON) of a step, in the background."""
    if manager.latest_step() == step:
        return
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    manager.save(step, args=args, metrics=None if score is None else {"score": score}, force=True)


def restore(manager: ocp.CheckpointManager, state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]] | None:
    """State and meta of a step, the latest by default, laid out as `state` is; None where there is none.

    Raises:
      ValueError: the checkpoint holds another run's state (another model, bank or trainable mask).
    """
    step = manager.latest_step() if step is None else step
    if step is None:
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
    try:
        loaded = manager.restore(step, args=args)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{manager.directory}: step {step} does not fit this config ({str(error).splitlines()[0]}); "
            "use another --workdir, or remove this one to start again"
        ) from error
    return loaded.state, loaded.meta
