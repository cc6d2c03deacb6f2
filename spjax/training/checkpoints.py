"""Orbax checkpoints of a run: trained leaves, optimizer state, position and history. Only the latest is kept."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from spjax.io import places
from spjax.types import Json, State


@contextlib.contextmanager
def opened(workdir: str) -> Iterator[ocp.CheckpointManager]:
    """Open the checkpoint manager of a workdir; exiting waits for a checkpoint that is being written.

    Raises:
      OSError: the last checkpoint could not be written.
    """
    options = ocp.CheckpointManagerOptions(preservation_policy=managers.LatestN(n=1), cleanup_tmp_directories=True)
    manager = ocp.CheckpointManager(epath.Path(places.absolute(workdir)) / "checkpoints", options=options)
    try:
        yield manager
    finally:
        with _translate_errors(manager):
            manager.close()


def save(manager: ocp.CheckpointManager, position: int, state: State, meta: Json) -> None:
    """Write state (arrays) and metadata (JSON) in the background; `position` is the checkpoint's number.

    Raises:
      OSError: this or the previous checkpoint could not be written.
    """
    if manager.latest_step() == position:
        return
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    with _translate_errors(manager):
        manager.save(position, args=args, force=True)


def wait(manager: ocp.CheckpointManager) -> None:
    """Wait for a checkpoint that is being written.

    Raises:
      OSError: it could not be written.
    """
    with _translate_errors(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def _translate_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Orbax and TensorStore may wrap an OSError, such as a full disk, in a ValueError or RuntimeError.
        disk = any(sign in repr(error) + repr(error.__cause__) for sign in _DISK) or isinstance(error, OSError)
        fix = "free disk space or check the disk" if disk else "fix the cause"
        raise OSError(
            f"{manager.directory}: a checkpoint could not be written ({_brief(error)}). The last complete one is kept: "
            f"{fix}, then run the same command to resume from it"
        ) from error


# Messages of file-system errors.
_DISK = [os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS)]


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)


def restore(manager: ocp.CheckpointManager, state: State) -> tuple[State, Json] | None:
    """Restore state and metadata of the latest checkpoint, with the shardings of `state`; None if there is none.

    Raises:
      ValueError: the checkpoint is damaged or has a different tree (another model, bank or trainable mask).
    """
    position = manager.latest_step()
    if position is None:
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
    try:
        loaded = manager.restore(position, args=args)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{manager.directory}/{position} is damaged or does not fit this config ({_brief(error)}); "
            "use another --workdir, or remove this one to start again"
        ) from error
    return loaded.state, loaded.meta
