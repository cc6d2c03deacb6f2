"""Device mesh, parameter and batch shardings, and collectives. Other packages do not handle devices."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spjax.models.config import UnitLMConfig
from spjax.models.split_kernel import SplitKernel
from spjax.types import Batch, PyTree

# Mesh axes: batches are sharded over `data` and `shard`; kernels of the LM over `shard`, and all-gathered layer by
# layer; the computation of a layer over `model` (tensor parallelism). A bank is sharded like the batch if the number of
# members is divisible by the shards, and replicated otherwise.
BATCH = ("data", "shard")
# The first matching regex applies; every parameter must match one. Attention is split by heads and the feed-forward by
# its width, so that a layer needs two all-reduces over `model`: after `out` and after `ffn_out`.
RULES: tuple[tuple[str, P], ...] = (
    (r"prompt/.*", P(BATCH)),
    (r"lm/(embed|embed_in/kernel|embed_out/kernel|positions|streams/.*|heads/.*)", P()),
    (r"lm/layers/(query|key|value|ffn_in|ffn_gate)/kernel", P(None, "shard", "model")),
    (r"lm/layers/(query|key|value|ffn_in|ffn_gate)/bias", P(None, "model")),
    (r"lm/layers/(out|ffn_out)/kernel", P(None, "model", "shard")),
    (r"lm/layers/(out|ffn_out)/bias", P()),
    (r"lm/.*norm/(scale|bias)", P()),
)


def make_mesh(model: int = 1, shards: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a device mesh with axes (data, shard, model).

    Args:
      model: devices that compute one layer together (tensor parallelism).
      shards: data-parallel devices over which the LM's kernels are sharded; 0: all of them.
      devices: by default all devices; pass others to compile ahead of time for another machine.

    Raises:
      ValueError: the number of devices is not divisible as requested.
    """
    count = jax.device_count() if devices is None else len(devices)
    if model < 1 or shards < 0:
        raise ValueError(
            f"mesh: model_parallel={model} must be at least 1, and weight_shards={shards} at least 0 (all)"
        )
    if count % model:
        raise ValueError(f"mesh: {count} devices are not divisible by model_parallel={model}")
    groups = count // model
    shards = groups if shards == 0 else shards
    if groups % shards:
        raise ValueError(
            f"mesh: {count} devices / model_parallel={model} = {groups} is not divisible by weight_shards={shards}"
        )
    axes = ("data", "shard", "model")
    return jax.make_mesh((groups // shards, shards, model), axes, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Number of shards of a batch."""
    return int(mesh.shape["data"] * mesh.shape["shard"])


def local_shards(mesh: Mesh) -> tuple[list[int], int]:
    """Batch shards that this process reads, and the total number of batch shards.

    The shards of a process are not contiguous where its devices are not contiguous in the mesh, as on a TPU slice whose
    hosts own square blocks of chips. Processes whose devices compute a layer together read the same shards.
    """
    groups = mesh.devices.reshape(batch_shards(mesh), -1)
    own = [n for n, group in enumerate(groups) if any(one.process_index == jax.process_index() for one in group)]
    return own, len(groups)


def spec_of(path: str) -> P:
    """PartitionSpec of the parameter at `path`.

    Raises:
      ValueError: no rule matches.
    """
    for pattern, spec in RULES:
        if re.fullmatch(pattern, path):
            return spec
    raise ValueError(f"sharding: no rule for parameter {path!r}; add one to spjax/training/sharding.py")


def shardings(mesh: Mesh, flat: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> dict[str, NamedSharding]:
    """NamedSharding of every parameter, by path.

    Raises:
      ValueError: no rule matches a path, or a dimension is not divisible by its mesh axis.
    """
    found = {path: NamedSharding(mesh, _spec(mesh, path, leaf)) for path, leaf in flat.items()}
    for path, leaf in flat.items():
        if path.startswith("prompt/"):
            continue
        for size, axis in zip(np.shape(leaf), found[path].spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                name = {"shard": "weight_shards", "model": "model_parallel"}[axis]
                raise ValueError(f"{path} {np.shape(leaf)} is not divisible by {name}={mesh.shape[axis]}")
    return found


def _spec(mesh: Mesh, path: str, leaf: jax.Array | jax.ShapeDtypeStruct) -> P:
    """`spec_of`, but a bank that is not divisible by the batch shards is replicated."""
    spec = spec_of(path)
    return spec if spec != P(BATCH) or np.shape(leaf)[0] % batch_shards(mesh) == 0 else P()


def member_major(mesh: Mesh | None, batch: Batch, members: int) -> Batch:
    """Drop `prompt_id` from a member-major batch where no device needs rows of a member that is on another device.

    That holds where each device has all rows of its members, or rows of a single member. Without `prompt_id` a member's
    tensors are repeated for its rows instead of gathered by index.

    Args:
      mesh: device mesh; None: one device.
      batch: the same number of rows for each member, one member after another.
      members: N.
    """
    shards = 1 if mesh is None else batch_shards(mesh)
    return batch._replace(prompt_id=None) if members % shards == 0 or shards % members == 0 else batch


def layerwise(mesh: Mesh, flat: Mapping[str, jax.Array]) -> dict[str, PyTree]:
    """Parameters by path, with kernels that are sharded over `shard` wrapped in `SplitKernel`."""
    if mesh.shape["shard"] == 1:
        return dict(flat)

    def wrapped(path: str, leaf: jax.Array) -> jax.Array | SplitKernel:
        spec = spec_of(path)
        if "shard" not in spec:
            return leaf
        layer = P(*(None if axis == "shard" else axis for axis in spec[1:]))
        return SplitKernel(leaf, NamedSharding(mesh, layer))

    return {path: wrapped(path, leaf) for path, leaf in flat.items()}


def check_lm(mesh: Mesh, lm: UnitLMConfig) -> None:
    """Raise ValueError if an LM of these sizes cannot be sharded over the mesh; allocates nothing."""
    for heads, what in ((lm.heads, "heads"), (lm.key_heads, "key and value heads")):
        if heads % mesh.shape["model"]:
            raise ValueError(f"an LM of {heads} {what} is not divisible by model_parallel={mesh.shape['model']}")
    shardings(mesh, {f"lm/{path}": jax.ShapeDtypeStruct(shape, np.float32) for path, shape in lm.shapes.items()})


def place_frozen(mesh: Mesh, flat: Mapping[str, jax.Array], operand: jax.typing.DTypeLike) -> dict[str, jax.Array]:
    """Place frozen parameters on the devices.

    Args:
      mesh: device mesh.
      flat: host arrays by path.
      operand: dtype that kernels are cast to, once instead of in every step.
    """
    rounded = {path: leaf.astype(operand) if path.endswith("kernel") else leaf for path, leaf in flat.items()}
    return place(rounded, shardings(mesh, rounded))


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """Shardings of a training state: leaves under a parameter path follow the parameter, others are replicated."""

    def of(path: tuple[object, ...], leaf: jax.Array) -> NamedSharding:
        for part in path:
            key = getattr(part, "key", None)
            if isinstance(key, str) and "/" in key and np.ndim(leaf):
                return NamedSharding(mesh, _spec(mesh, key, leaf))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(of, state)


def place(tree: PyTree, where: PyTree) -> PyTree:
    """Make global arrays with the shardings `where` from global arrays, or from host arrays equal in all processes."""

    def put(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1 or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, where)


def shard_rows(mesh: Mesh, batch: PyTree) -> PyTree:
    """Assemble the global batch from each process's rows."""
    sharding = NamedSharding(mesh, P(BATCH))
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def fetch(tree: PyTree) -> PyTree:
    """Copy replicated or row-sharded arrays to every host, as full numpy arrays."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def gather(x: jax.Array) -> np.ndarray:
        return np.asarray(x) if x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(gather, tree)


def on_process_zero(what: str, work: Callable[[], object]) -> None:
    """Run `work` on process 0 while the other processes wait; if it fails, all raise.

    Args:
      what: names the result in the error message of the other processes.
      work: called on process 0 only.

    Raises:
      ValueError: on the other processes if process 0 failed. Process 0 raises the original error.
    """
    error: BaseException | None = None
    if jax.process_index() == 0:
        try:
            work()
        except Exception as reason:  # raised below, after the broadcast
            error = reason
    failed = error is not None
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(failed)))
    if error is not None:
        raise error
    if failed:
        raise ValueError(f"process 0 could not make {what}: see its message")
