"""Checkpoints of a run: trained leaves, optimizer, position and history; the latest is kept."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from spjax.storage import places


@contextlib.contextmanager
def opened(workdir: str) -> Iterator[ocp.CheckpointManager]:
    """The run's checkpoints: written in the background, the latest one kept.

    Leaving the block waits for the one that is being written.

    Raises:
      OSError: that one could not be written.
    """
    options = ocp.CheckpointManagerOptions(preservation_policy=managers.LatestN(n=1), cleanup_tmp_directories=True)
    manager = ocp.CheckpointManager(epath.Path(places.absolute(workdir)) / "checkpoints", options=options)
    try:
        yield manager
    finally:
        with _told(manager):
            manager.close()


def save(manager: ocp.CheckpointManager, position: int, state: Any, meta: dict[str, Any]) -> None:
    """Write the state (arrays) and meta (JSON) of a position in training, in the background.

    Raises:
      OSError: this or the last one could not be written.
    """
    if manager.latest_step() == position:
        return
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    with _told(manager):
        manager.save(position, args=args, force=True)


def wait(manager: ocp.CheckpointManager) -> None:
    """Wait until the checkpoint that is being written is complete.

    Raises:
      OSError: it could not be written.
    """
    with _told(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def _told(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # A full disk is an OSError, or one that Orbax and TensorStore pass on as a ValueError or RuntimeError.
        disk = any(sign in repr(error) + repr(error.__cause__) for sign in _DISK) or isinstance(error, OSError)
        way = "make room" if disk else "mend that"
        raise OSError(
            f"{manager.directory}: a checkpoint could not be written ({_brief(error)}). The last complete one is kept: "
            f"{way}, and the same command continues from it"
        ) from error


# What the file system says, in the words of errno.
_DISK = [os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS)]


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)


def restore(manager: ocp.CheckpointManager, state: Any) -> tuple[Any, dict[str, Any]] | None:
    """State and meta of the latest position, laid out as `state` is; None where there is none.

    Raises:
      ValueError: the checkpoint holds another run's state (another model, bank or trainable mask).
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
