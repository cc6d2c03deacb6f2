"""Costs of our programs on a TPU slice, compiled ahead of time on a machine without TPUs.

    pip install -e '.[tpu]'
    python -m benchmarks.tpu_aot --config=configs/fsc.py --topology=v5e:16x16 --lm=151M --bank=16 --out=aot.jsonl
    python -m benchmarks.tpu_aot --show=aot.jsonl

libtpu, a package on PyPI, contains the TPU compiler, which needs no TPU. The programs are the real ones: the training
step of `spjax.training.train`, the evaluation's scores, HuBERT up to layer 6, and the predictor's scores, made for the
mesh of all chips (the latter two for one chip, as in use) from shapes only. For each, the report has the compiler's
account of a chip's memory, XLA's count of FLOPs and bytes, in which a loop (such as that over layers) counts once, and
the collectives in its text. A training step that communicates an array of the shape of a frozen kernel is an error.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_flags
from tqdm import tqdm

from benchmarks import common, decoding
from spjax.config import PromptJob, parse
from spjax.encoders import hubert
from spjax.models import decode, prompts, unit_lm, verbalizers
from spjax.models.config import UnitLMConfig
from spjax.models.hubert_config import HubertConfig
from spjax.serving.frozen import KINDS, quantize
from spjax.serving.scoring import Programs, Shape
from spjax.tasks import TASKS
from spjax.training import masks, optim, sharding
from spjax.training.setting import Setting, first_params
from spjax.training.update import make_update
from spjax.types import Batch

# The published unit LM, and the layer sizes of OPT-1.3B and OPT-6.7B (Zhang et al. 2022, table 1); then Slam and TWIST,
# which have the blocks of Qwen2.5-0.5B, OPT-1.3B and LLaMA-7B, and 500 units.
_GATED: dict[str, Any] = {
    "vocab_size": 504, "norm": "rms", "norm_eps": 1e-6, "positions": "rotary", "out_bias": False, "ffn_bias": False,
    "activation": "swiglu", "scale_embedding": False,
}  # fmt: skip
LMS = {
    "151M": UnitLMConfig(),
    "1.3B": UnitLMConfig(dim=2048, layers=24, heads=32, ffn_dim=8192),
    "7B": UnitLMConfig(dim=4096, layers=32, heads=32, ffn_dim=16384),
    "slam-358M": UnitLMConfig(dim=896, layers=24, heads=14, kv_heads=2, ffn_dim=4864, **_GATED),
    "twist-1.3B": UnitLMConfig(
        vocab_size=504,
        dim=2048,
        layers=24,
        heads=32,
        ffn_dim=8192,
        positions="learned",
        max_positions=2048,
        scale_embedding=False,
    ),
    "twist-7B": UnitLMConfig(dim=4096, layers=32, heads=32, ffn_dim=11008, qkv_bias=False, tied=False, **_GATED),
}
GIB = 2**30
# Main memory of a chip, from cloud.google.com/tpu/docs/v5e and /v5p (read November 2026).
MEMORY = {"v5e": 16 * GIB, "v5p": 95 * GIB}
HUBERT_LAYER = 6
SECONDS = 2.5  # length of HuBERT's waveforms, about that of FSC's
PREDICTOR_ROWS = 64  # of the predictor's largest batch
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
Compile = Callable[[], Any]  # returns the compiled program
Row = dict[str, Any]
Sent = list[tuple[str, tuple[int, ...]]]  # kind of a collective and dimensions of an array that it returns


class Size(NamedTuple):
    """Sizes of the programs.

    Attributes:
      topology: of the slice, such as `v5e:2x2`.
      lm: one of LMS.
      bank: N.
      rows: utterances of a batch on each data shard.
      columns: T.
    """

    topology: str
    lm: str
    bank: int
    rows: int
    columns: int


def _abstract_lm(config: UnitLMConfig) -> Any:
    return jax.eval_shape(lambda: unit_lm.init(jax.random.key(0), config))


def _abstract(tree: Any, where: Any) -> Any:
    """Returns shapes of arrays with shardings: one sharding for all, or a tree of them."""
    put = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    if isinstance(where, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: put(leaf, where), tree)
    return jax.tree.map(put, tree, where)


def make_setting(job: PromptJob, lm: UnitLMConfig) -> Any:
    """Makes the training setup of a job (`spjax.training.setting.Setting`); FSC has the 31 combinations of its data.

    Raises:
      ValueError: a job whose verbalizer or labels depend on its records.
    """
    if job.task not in TASKS or job.verbalizer != "learnable":
        raise ValueError(
            f"task {job.task!r} with verbalizer {job.verbalizer!r}: without records, only tasks of "
            f"{', '.join(TASKS)} with the learnable verbalizer work: give --config.task and --config.verbalizer"
        )
    task = TASKS[job.task]
    verbalizer = verbalizers.learnable(task, lm.vocab_size)
    tree = decode.label_tree(verbalizer, decoding.combinations() if task.name == "fsc" else None)
    return Setting(lm, job.compute, job.prompt, job.loss, verbalizer, tree)


def abstract_training(job: PromptJob, setting: Any, mesh: Any, bank: int) -> tuple[Any, Any, Any]:
    """Returns (optimizer, state, frozen leaves) with the shardings of `spjax.training.train.train`, as shapes."""
    first = lambda lm: first_params(lm, setting, tuple(range(bank)))  # noqa: E731
    params = jax.eval_shape(first, _abstract_lm(setting.config))
    trained, frozen = masks.split(masks.flatten(params), job.train.trainable)
    rates = [job.optim.lr] * bank
    tx = masks.masked(optim.make_bank(job.optim, [1000] * bank, rates), trained, frozen)
    each = lambda kind: jax.ShapeDtypeStruct((bank,), kind)  # noqa: E731
    state = {
        "trained": trained,
        "optimizer": jax.eval_shape(tx.init, {**trained, **frozen}),
        "step": each(jnp.int32),
        "seeds": each(jnp.uint32),
        "active": each(bool),
        "best": trained,
        "best_score": jax.ShapeDtypeStruct((bank, 2), jnp.float32),
        "best_epoch": each(jnp.int32),
    }
    kernel = setting.compute.operand
    narrow = {
        path: jax.ShapeDtypeStruct(leaf.shape, kernel if path.endswith("kernel") else leaf.dtype)
        for path, leaf in frozen.items()
    }
    state = _abstract(state, sharding.state_shardings(mesh, state))
    return tx, state, _abstract(narrow, sharding.shardings(mesh, frozen))


def programs(job: PromptJob, size: Size, lm: UnitLMConfig | None = None) -> tuple[dict[str, Compile], Any]:
    """Returns functions that compile each program for the slice, by name; and the frozen leaves of training, as shapes.

    Args:
      job: prompts or adapters to train.
      size: sizes of the slice and of the programs.
      lm: architecture to use instead of `size.lm`.

    Raises:
      ValueError: a bank that does not divide the batch, chips that do not divide, an unknown task or topology.
    """
    devices = _devices(size.topology)
    mesh = sharding.make_mesh(job.model_parallel, job.weight_shards, devices)
    alone = jax.sharding.SingleDeviceSharding(devices[0])
    rows = size.rows * sharding.batch_shards(mesh)
    if rows % size.bank:
        raise ValueError(f"a bank of {size.bank} cannot share {rows} utterances ({size.rows} a data shard) evenly")
    setting = make_setting(job, lm or LMS[size.lm])
    tx, state, frozen = abstract_training(job, setting, mesh, size.bank)
    dims = {"source": (rows, size.columns), "classes": (rows, setting.verbalizer.num_slots)}
    integers = [jax.ShapeDtypeStruct(dims.get(name, (rows,)), jnp.int32) for name in Batch._fields]
    batch = Batch(*integers)._replace(weight=jax.ShapeDtypeStruct((rows,), jnp.float32), streams=None)
    batch = _abstract(batch, NamedSharding(mesh, PartitionSpec(sharding.BATCH)))

    def training() -> Any:
        update, where = make_update(setting, tx, mesh=mesh), sharding.state_shardings(mesh, state)
        step = jax.jit(update, donate_argnums=0, out_shardings=(where, None))
        return step.lower(state, frozen, batch, None).compile()

    def evaluation() -> Any:
        def answer(flat: masks.Flat, batch: Any) -> jax.Array:
            params = masks.unflatten(sharding.layerwise(mesh, flat))
            local = sharding.member_major(mesh, batch, size.bank)
            parts = params["lm"], params["prompt"], local, [setting.tree]
            return decode.score(*parts, config=setting.config, compute=setting.compute)

        return jax.jit(answer).lower({**state["trained"], **frozen}, batch).compile()

    def encoder() -> Any:
        sizes = HubertConfig()
        late = tuple(f"layers/{number}/" for number in range(HUBERT_LAYER, sizes.layers))
        shapes = {path: shape for path, shape in sizes.shapes.items() if not path.startswith(late)}
        flat: Any = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
        frames = sizes.frames(int(SECONDS * 16000))
        waves = max(1, hubert.BATCH_FRAMES // frames)
        samples = (frames - 1) * sizes.hop + sizes.field
        row = lambda kind, *dims: jax.ShapeDtypeStruct((waves, *dims), kind)  # noqa: E731
        norm = hubert.ChannelNorm(row(np.float32, sizes.conv_dim), row(np.float32, sizes.conv_dim))
        given = _abstract((masks.unflatten(flat), row(np.float32, samples), row(np.int32), norm), alone)
        run = lambda tree, waves, lengths, norm: hubert.features(  # noqa: E731
            tree, sizes, waves, lengths, HUBERT_LAYER, norm=norm
        )
        return jax.jit(run).lower(*given).compile()

    def predictor() -> Any:
        kind = setting.compute.dtype

        def bank_of(lm: Any) -> Any:
            prompt = first_params(lm, setting, tuple(range(size.bank)))["prompt"]
            return prompts.projected(prompt, lm, setting.config, KINDS[kind])

        weights = jax.eval_shape(lambda tree: quantize(tree, kind), _abstract_lm(setting.config))
        bank = jax.eval_shape(bank_of, weights)
        made = Programs(setting.config, kind, [setting.tree] * size.bank, None)
        return made.get(Shape(PREDICTOR_ROWS, size.columns), *_abstract((weights, bank), alone))

    return {"train": training, "evaluate": evaluation, "hubert": encoder, "predict": predictor}, frozen


def collectives(text: str) -> Sent:
    """Returns the collectives in `compiled.as_text()`: kind and dimensions of each array; those in a loop once."""
    line = re.compile(rf"^.*? = (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(?:-start)?\(", re.MULTILINE)
    return [
        (kind, tuple(int(n) for n in dims.split(",") if n))
        for results, kind in line.findall(text)
        for dims in re.findall(r"\w+\[([\d,]*)\]", results)
    ]


def check_frozen(sent: Sent, frozen: Mapping[str, Any]) -> None:
    """Checks that no frozen weight, nor its gradient, is communicated; sharded ones may be gathered layer by layer.

    Args:
      sent: collectives of a training step.
      frozen: leaves by path, with shapes and shardings.

    Raises:
      AssertionError: an array of the shape of a frozen kernel, of all layers or one, is communicated.
    """
    plain = lambda dims: tuple(sorted(n for n in dims if n > 1))  # noqa: E731 - ignores the order of axes
    stacks: set[tuple[int, ...]] = set()
    layers: dict[tuple[int, ...], bool] = {}  # whether a layer of this shape may be gathered
    for path, leaf in frozen.items():
        if re.search("/layers/.*/kernel", path):
            split = "shard" in leaf.sharding.spec and leaf.sharding.mesh.shape["shard"] > 1
            for dims in _parts(leaf):
                stacks.add(plain(dims))
                layers[plain(dims[1:])] = split
    found = [
        (kind, dims)
        for kind, dims in sent
        if plain(dims) in stacks or (plain(dims) in layers and not (kind == "all-gather" and layers[plain(dims)]))
    ]
    assert not found, f"a training step sends arrays {found}, shaped like frozen kernels"


def _parts(leaf: Any) -> list[tuple[int, ...]]:
    """Returns the shapes in which a leaf may be communicated: whole, or sharded by `model`, by `shard` or by both."""
    mesh, axes = leaf.sharding.mesh, [*leaf.sharding.spec, *[None] * leaf.ndim]
    return [
        tuple(size // mesh.shape[axis] if axis in by else size for size, axis in zip(leaf.shape, axes, strict=False))
        for by in ((), ("model",), ("shard",), ("model", "shard"))
    ]


def described(compiled: Any, memory: int, sent: Sent) -> dict[str, Any]:
    """Returns the costs of a compiled program on a chip with `memory` bytes."""
    account, costs = compiled.memory_analysis(), compiled.cost_analysis()
    used = account.argument_size_in_bytes + account.output_size_in_bytes - account.alias_size_in_bytes
    used += account.temp_size_in_bytes + account.generated_code_size_in_bytes
    counts = collections.Counter(kind for kind, _ in sent)
    return {
        "arguments GiB": f"{account.argument_size_in_bytes / GIB:.3g}",
        "temporaries GiB": f"{account.temp_size_in_bytes / GIB:.3g}",
        "of memory": f"{used / memory:.1%}",
        "TFLOP (XLA)": f"{costs['flops'] / 1e12:.3g}",
        "GB (XLA)": f"{costs['bytes accessed'] / 1e9:.3g}",
        "collectives": ", ".join(f"{count} {kind}" for kind, count in counts.items()),
    }


def measure(
    job: PromptJob, size: Size, names: Sequence[str], lm: UnitLMConfig | None = None
) -> Iterator[dict[str, Any]]:
    """Yields a row for each program: sizes, costs, seconds to compile; or the compiler's error if it does not fit.

    Raises:
      ValueError: an unknown program or chip, and as `programs`.
      AssertionError: a training step communicates frozen weights.
    """
    kind = size.topology.partition(":")[0]
    if kind not in MEMORY:
        raise ValueError(f"topology {size.topology!r} has no chip of {', '.join(MEMORY)}: give one such as v5e:2x2")
    made, frozen = programs(job, size, lm)
    if unknown := set(names) - made.keys():
        raise ValueError(f"programs {', '.join(sorted(unknown))} are unknown: choose from {', '.join(made)}")
    for name in tqdm(names, desc=f"{size.topology} {size.lm} bank {size.bank}", unit="program", file=sys.stderr):
        row: Row = {"program": name, **size._asdict()}
        row |= {"model": job.model_parallel, "shards": job.weight_shards, "remat": job.compute.remat}
        row |= {"libtpu": metadata.version("libtpu"), "date": datetime.now(UTC).date().isoformat()}
        try:
            compiled = made[name]()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield {**row, "of memory": "does not fit", "refused": " ".join(str(error).split())[:300]}
            continue
        sent = collectives(compiled.as_text())
        if name == "train":
            check_frozen(sent, frozen)
        yield {**row, **described(compiled, MEMORY[kind], sent)}


def wrong_compiler() -> str | None:
    """Returns a message if the installed libtpu is missing or not the version that jax requires, else None."""
    fix = "pip install -e '.[tpu]'"
    if importlib.util.find_spec("libtpu") is None:
        return f"libtpu, which compiles for TPUs, is not installed: {fix}"
    wanted = re.search(r"libtpu==([\d.]+)", " ".join(metadata.requires("jax") or []))
    found = metadata.version("libtpu")
    if wanted and not f"{found}.".startswith(wanted[1].rstrip(".") + "."):
        jax = f"jax {metadata.version('jax')}"
        return f"libtpu {found} may produce programs that {jax} cannot read; it requires {wanted[1]}*: {fix}"
    return None


def _devices(topology: str) -> Any:
    """Returns the device descriptions of a slice that this machine does not have."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no cloud metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the rows of `measure` as a Markdown table; empty where a row has no such value."""
    heads = list(dict.fromkeys(name for row in rows for name in row))
    return common.table([heads, *([str(row.get(name, "")) for name in heads] for row in rows)])


def main(argv: Sequence[str]) -> None:
    """Compiles the programs that the flags select, and prints the report."""
    given = flags.FlagValues()
    take: dict[str, Any] = {"flag_values": given}
    config_flags.DEFINE_config_file("config", None, "A prompt tuning job: a file in configs/.", **take)
    flags.DEFINE_string("topology", "v5e:2x2", "The slice: v5e:2x2, v5e:16x16, v5p:2x2x1 ...", **take)
    flags.DEFINE_enum("lm", "151M", list(LMS), "Size of the unit LM.", **take)
    flags.DEFINE_integer("bank", 1, "Members of the bank.", lower_bound=1, **take)
    flags.DEFINE_integer("rows", 64, "Utterances of a batch on each data shard.", lower_bound=1, **take)
    flags.DEFINE_integer("columns", 64, "Source columns of a batch.", lower_bound=8, **take)
    flags.DEFINE_list("programs", "train,evaluate,hubert,predict", "Programs to compile.", **take)
    flags.DEFINE_string("out", None, "Append the results to this file, one line of JSON a program.", **take)
    flags.DEFINE_bool("help", False, "Show this help.", **take)
    flags.DEFINE_string("show", None, "Compile nothing; print the table of such a file.", **take)
    try:
        unexpected = given(argv)[1:]
    except flags.Error as error:
        sys.exit(f"error: {error}")
    if given.help or unexpected:
        print(__doc__, given.get_help(), *(f"error: unexpected {one!r}" for one in unexpected), sep="\n")
        sys.exit(len(unexpected))
    if given.show:
        print(table([json.loads(line) for line in Path(given.show).read_text().splitlines()]))
        return
    if given.config is None:
        sys.exit("error: give --config=configs/fsc.py, or --show=FILE")
    if wrong := wrong_compiler():
        sys.exit(f"error: {wrong}")
    jax.config.update("jax_platforms", "cpu")  # do not look for a TPU
    size = Size(given.topology, given.lm, given.bank, given.rows, given.columns)
    rows = []
    try:
        job = parse(given.config)
        if not isinstance(job, PromptJob):
            sys.exit("error: --config must train prompts or adapters, such as configs/fsc.py")
        for row in measure(job, size, given.programs):
            rows.append(row)
            if given.out:
                with Path(given.out).open("a") as file:
                    file.write(json.dumps(row) + "\n")
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv)
