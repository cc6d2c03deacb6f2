"""Devices: the mesh, where each parameter lies, and how a batch gets there. No other room knows about devices."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spjax.models.config import UnitLMConfig
from spjax.models.split_kernel import SplitKernel
from spjax.storage import unit_lms
from spjax.types import Batch

# A mesh has three axes. A batch is split over `data` and `shard`; kernels of the LM lie in pieces over `shard`, and are
# put together layer by layer; a layer is computed in parts over `model`. Members of a bank lie where their rows do, if
# they divide so, and whole everywhere else.
BATCH = ("data", "shard")
# The first rule whose regex matches a path wins; every parameter must match one. Attention is split by heads and
# the feed-forward by its width, so that a layer needs one sum over `model` after `out` and one after `ffn_out`.
RULES: tuple[tuple[str, P], ...] = (
    (r"prompt/.*", P(BATCH)),
    (r"lm/(embed|streams/.*|heads/.*)", P()),
    (r"lm/layers/(query|key|value|ffn_in)/kernel", P(None, "shard", "model")),
    (r"lm/layers/(query|key|value|ffn_in)/bias", P(None, "model")),
    (r"lm/layers/(out|ffn_out)/kernel", P(None, "model", "shard")),
    (r"lm/layers/(out|ffn_out)/bias", P()),
    (r"lm/.*norm/(scale|bias)", P()),
)


def make_mesh(model: int = 1, shards: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices as (data, shard, model).

    Args:
      model: how many compute a layer together, each a part of it.
      shards: among how many that compute different utterances the LM's kernels are divided; 0: among all.
      devices: by default all that there are; others to compile for a machine that is elsewhere.

    Raises:
      ValueError: the devices do not divide so.
    """
    count = jax.device_count() if devices is None else len(devices)
    if model < 1 or shards < 0:
        raise ValueError(
            f"mesh: model_parallel={model} must be at least 1, and weight_shards={shards} at least 0 (all)"
        )
    if count % model:
        raise ValueError(f"mesh: {count} devices do not divide into groups of model_parallel={model}")
    groups = count // model
    shards = groups if shards == 0 else shards
    if groups % shards:
        raise ValueError(
            f"mesh: {count} devices by model_parallel={model} make {groups}, which do not divide by "
            f"weight_shards={shards}"
        )
    axes = ("data", "shard", "model")
    return jax.make_mesh((groups // shards, shards, model), axes, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Among how many a batch is split."""
    return int(mesh.shape["data"] * mesh.shape["shard"])


def own_rows(mesh: Mesh) -> tuple[list[int], int]:
    """Which of the equal runs of a batch's rows this process reads, and how many runs there are.

    Several where the process's devices do not follow one another in the mesh, as on a slice whose hosts have squares of
    chips; the same as another process where their devices compute a layer together.
    """
    groups = mesh.devices.reshape(batch_shards(mesh), -1)
    own = [n for n, group in enumerate(groups) if any(one.process_index == jax.process_index() for one in group)]
    return own, len(groups)


def spec_of(path: str) -> P:
    """Where the parameter of this path lies.

    Raises:
      ValueError: no rule matches.
    """
    for pattern, spec in RULES:
        if re.fullmatch(pattern, path):
            return spec
    raise ValueError(f"sharding: no rule for parameter {path!r}; add one to spjax/training/sharding.py")


def shardings(mesh: Mesh, flat: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """NamedSharding of every parameter, by its path.

    Raises:
      ValueError: no rule for a path, or a parameter that does not divide so.
    """
    found = {path: NamedSharding(mesh, _spec(mesh, path, leaf)) for path, leaf in flat.items()}
    for path, leaf in flat.items():
        if path.startswith("prompt/"):
            continue
        for size, axis in zip(np.shape(leaf), found[path].spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                name = {"shard": "weight_shards", "model": "model_parallel"}[axis]
                raise ValueError(f"{path} {np.shape(leaf)} does not divide by {name}={mesh.shape[axis]}")
    return found


def _spec(mesh: Mesh, path: str, leaf: Any) -> P:
    """As `spec_of`; a bank that does not divide lies whole everywhere."""
    spec = spec_of(path)
    return spec if spec != P(BATCH) or np.shape(leaf)[0] % batch_shards(mesh) == 0 else P()


def member_major(mesh: Mesh | None, batch: Batch, members: int) -> Batch:
    """A batch whose rows are N members' after each other, as many of each, said to be so where devices divide alike.

    They do where a device has rows of whole members, or of one. What is computed for a member then stays there, while
    rows that name their member look it up; elsewhere devices would have to send rows to do without names.
    """
    shards = 1 if mesh is None else batch_shards(mesh)
    return batch._replace(prompt_id=None) if members % shards == 0 or shards % members == 0 else batch


def layerwise(mesh: Mesh, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by path as the LM takes them: with kernels that the mesh divides as `SplitKernel`."""
    if mesh.shape["shard"] == 1:
        return dict(flat)

    def wrapped(path: str, leaf: Any) -> Any:
        spec = spec_of(path)
        if "shard" not in spec:
            return leaf
        layer = P(*(None if axis == "shard" else axis for axis in spec[1:]))
        return SplitKernel(leaf, NamedSharding(mesh, layer))

    return {path: wrapped(path, leaf) for path, leaf in flat.items()}


def check_lm(mesh: Mesh, lm: UnitLMConfig) -> None:
    """Raise ValueError where an LM of these sizes cannot be divided so, before anything is made."""
    if lm.heads % mesh.shape["model"]:
        raise ValueError(f"an LM of {lm.heads} heads does not divide by model_parallel={mesh.shape['model']}")
    shapes = unit_lms.unit_lm_shapes(lm)
    shardings(mesh, {f"lm/{path}": jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})


def place_frozen(mesh: Mesh, flat: Mapping[str, Any], operand: Any) -> dict[str, Any]:
    """Leaves that do not change, on the devices.

    Args:
      mesh: the devices.
      flat: leaves by path, on the host.
      operand: type that kernels are rounded to, once instead of in every step.
    """
    rounded = {path: leaf.astype(operand) if path.endswith("kernel") else leaf for path, leaf in flat.items()}
    return place(rounded, shardings(mesh, rounded))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Shardings of a training state: a leaf under a parameter's path lies as the parameter does, others everywhere."""

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for part in path:
            key = getattr(part, "key", None)
            if isinstance(key, str) and "/" in key and np.ndim(leaf):
                return NamedSharding(mesh, _spec(mesh, key, leaf))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(of, state)


def place(tree: Any, where: Any) -> Any:
    """Host arrays that every process holds alike, or global arrays, as global arrays laid out by `where`."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1 or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, where)


def shard_rows(mesh: Mesh, batch: Any) -> Any:
    """A host's rows of a batch as its share of the global batch."""
    sharding = NamedSharding(mesh, P(BATCH))
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
