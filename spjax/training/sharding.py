"""Devices: the mesh, where each parameter lies, and how a batch gets there. No other room knows about devices."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spjax.training.masks import Flat

# The first rule whose regex matches a path's end wins; every parameter must match one. Attention is split by heads and
# the feed-forward by its width, so that a layer needs one sum over `model` after `out` and one after `ffn_out`.
RULES: tuple[tuple[str, P], ...] = (
    (r"prompt/.*", P()),
    (r"lm/(embed|streams/.*|heads/.*)", P()),
    (r"lm/layers/(query|key|value|ffn_in)/kernel", P(None, None, "model")),
    (r"lm/layers/(query|key|value|ffn_in)/bias", P(None, "model")),
    (r"lm/layers/(out|ffn_out)/kernel", P(None, "model", None)),
    (r"lm/layers/(out|ffn_out)/bias", P()),
    (r"lm/.*norm/(scale|bias)", P()),
)


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices as (data, model).

    Args:
      model: how many share a layer.
      devices: by default all that there are; others to compile for a machine that is elsewhere.

    Raises:
      ValueError: the devices do not divide by `model`.
    """
    count = jax.device_count() if devices is None else len(devices)
    if model < 1 or count % model:
        raise ValueError(f"mesh: {count} devices do not divide into groups of model={model}")
    shape = (count // model, model)
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def spec_of(path: str) -> P:
    """Where the parameter of this path lies.

    Raises:
      ValueError: no rule matches.
    """
    for pattern, spec in RULES:
        if re.fullmatch(pattern, path):
            return spec
    raise ValueError(f"sharding: no rule for parameter {path!r}; add one to spjax/training/sharding.py")


def shardings(mesh: Mesh, flat: Flat) -> dict[str, NamedSharding]:
    """NamedSharding of every parameter, by its path."""
    return {path: NamedSharding(mesh, spec_of(path)) for path in flat}


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Shardings of a training state: a leaf under a parameter's path lies as the parameter does, others everywhere."""

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for part in path:
            key = getattr(part, "key", None)
            if isinstance(key, str) and "/" in key and np.ndim(leaf):
                return NamedSharding(mesh, spec_of(key))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(of, state)


def place(tree: Any, where: Any) -> Any:
    """Host arrays that every process holds alike, as global arrays laid out by `where`."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, where)


def shard_rows(mesh: Mesh, batch: Any) -> Any:
    """A host's rows of a batch as its share of the global batch, split over `data`."""
    sharding = NamedSharding(mesh, P("data"))
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def fetch(tree: Any) -> Any:
    """Replicated or row-sharded arrays as numpy, whole on every host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def whole(x: jax.Array) -> np.ndarray:
        return np.asarray(x) if x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def first_does(what: str, work: Callable[[], object]) -> None:
    """Process 0 does `work` while the others wait; where it fails, all fail.

    Args:
      what: names the work in the others' message.
      work: of process 0.

    Raises:
      ValueError: in the other processes, where process 0 failed; there its own error is raised.
    """
    error: BaseException | None = None
    if jax.process_index() == 0:
        try:
            work()
        except Exception as reason:  # raised below, once the others know
            error = reason
    failed = error is not None
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(failed)))
    if error is not None:
        raise error
    if failed:
        raise ValueError(f"process 0 could not make {what}: it says why")
