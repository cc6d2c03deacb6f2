"""Costs of our programs on a TPU slice, compiled ahead of time on a machine without TPUs.

    pip install -e '.[tpu]'
    python -m benchmarks.tpu_aot --config=configs/fsc.py --topology=v5e:16x16 --lm=151M --bank=16 --out=aot.jsonl
    python -m benchmarks.tpu_aot --show=aot.jsonl

libtpu, a package on PyPI, contains the TPU compiler, which needs no TPU. The programs are the real ones: the training
step of `spjax.training.train`, the evaluation's scores, HuBERT up to layer 6, and the predictor's scores, made for the
mesh of all chips (the latter two for one chip, as in use) from shapes only. For each, the report has a chip's memory,
matrix products, memory traffic and collectives (benchmarks/hlo.py documents how they are counted), and a time:

- `roofline`: every instruction takes the maximum of its products at the chip's peak and its bytes at the memory
  bandwidth; collectives are added without overlap. Work of the vector unit is not counted.
- `compiler`: the sum of the compiler's cycle estimates of the instructions, without collectives.

A training step must sum across data shards only the gradients of the prompts and nothing of a frozen weight; any other
compiled step is an error.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from benchmarks import common, hlo
from spjax.models.config import UnitLMConfig

# The published unit LM, and the layer sizes of OPT-1.3B and OPT-6.7B (Zhang et al. 2022, table 1).
LMS = {
    "151M": UnitLMConfig(),
    "1.3B": UnitLMConfig(dim=2048, layers=24, heads=32, ffn_dim=8192),
    "7B": UnitLMConfig(dim=4096, layers=32, heads=32, ffn_dim=16384),
}


class Chip(NamedTuple):
    """Peaks of a chip, from the tables at cloud.google.com/tpu/docs/v5e and /v5p (read November 2026).

    Attributes:
      flops: bfloat16 FLOP/s.
      memory: bytes of main memory.
      bandwidth: of main memory, bytes/s.
      link: bytes/s of one link in one direction: the chip's bidirectional bandwidth over its links and two.
      axes: of the torus.
      clock: Hz: the peak over the multiply-adds of all its matrix units (128 x 128 each) in a cycle.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    axes: int
    clock: float


CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 400e9 / 4 / 2, 2, 197e12 / (4 * 128**2 * 2)),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 1200e9 / 6 / 2, 3, 459e12 / (8 * 128**2 * 2)),
}
HOP = 1e-6  # seconds of latency to a neighbouring chip
HUBERT_LAYER = 6
SECONDS = 2.5  # length of HuBERT's waveforms, about that of FSC's
PREDICTOR_ROWS = 64  # of the predictor's largest batch

Compile = Callable[[], Any]  # returns the compiled program
FLAGS = flags.FlagValues()  # separate from those of spjax.main


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the programs and of the slice.

    Attributes:
      topology: of the slice, such as `v5e:2x2`.
      lm: one of LMS.
      bank: N.
      rows: utterances of a batch on each data shard.
      columns: T.
      model: number of chips that compute a layer together (tensor parallelism).
      shards: number of chips over which the LM is sharded, with layers gathered one by one; 0: all.
      remat: rematerialise activations in the backward pass.
    """

    topology: str
    lm: str
    bank: int
    rows: int
    columns: int
    model: int
    shards: int
    remat: bool


def _abstract(tree: Any, where: Any) -> Any:
    """Returns shapes of arrays with shardings: one sharding for all, or a tree of them."""
    import jax

    put = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    if isinstance(where, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: put(leaf, where), tree)
    return jax.tree.map(put, tree, where)


def make_setting(config: Any, lm: UnitLMConfig) -> Any:
    """Makes the training setup of a config (`spjax.training.train.Setting`); FSC has the 31 combinations of its data.

    Raises:
      ValueError: a config whose verbalizer or labels depend on its records.
    """
    from benchmarks import decoding
    from spjax.evaluation import decode
    from spjax.jobs.prompting import prompt_settings
    from spjax.models import verbalizers
    from spjax.tasks import TASKS
    from spjax.training import train

    if config.task not in TASKS or config.verbalizer != "learnable":
        raise ValueError(
            f"task {config.task!r} with verbalizer {config.verbalizer!r}: without records, only tasks of "
            f"{', '.join(TASKS)} with the learnable verbalizer work: give --config.task and --config.verbalizer"
        )
    settings, task = prompt_settings(config), TASKS[config.task]
    verbalizer = verbalizers.learnable(task, lm.vocab_size)
    tree = decode.label_tree(verbalizer, decoding.combinations() if task.name == "fsc" else None)
    return train.Setting(lm, settings.compute, settings.prompt, settings.loss, verbalizer, tree)


def abstract_lm(config: UnitLMConfig) -> Any:
    """Returns the shapes of a unit LM's weights, float32."""
    import jax

    from spjax.models import unit_lm

    return jax.eval_shape(lambda: unit_lm.init(jax.random.key(0), config))


def abstract_training(config: Any, setting: Any, mesh: Any, bank: int) -> tuple[Any, Any, Any]:
    """Returns (optimizer, state, frozen leaves) with the shardings of `spjax.training.train.train`, as shapes."""
    import jax
    import jax.numpy as jnp

    from spjax.jobs.prompting import prompt_settings
    from spjax.training import masks, optim, sharding, train

    settings = prompt_settings(config)
    params = jax.eval_shape(lambda lm: train.first_params(lm, setting, tuple(range(bank))), abstract_lm(setting.config))
    trained, frozen = masks.split(masks.flatten(params), settings.run.trainable)
    rates = [settings.optimizer.lr] * bank
    tx = masks.masked(optim.make_bank(settings.optimizer, [1000] * bank, rates), trained, frozen)
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


def abstract_batch(mesh: Any, rows: int, columns: int, slots: int) -> Any:
    """Returns the shapes of a batch of `rows` utterances, sharded over the mesh."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from spjax.training.sharding import BATCH
    from spjax.types import Batch

    one = lambda kind, *dims: jax.ShapeDtypeStruct((rows, *dims), kind)  # noqa: E731
    int32, float32 = np.int32, np.float32
    batch = Batch(
        one(int32, columns), one(int32), one(int32), one(int32, slots), one(int32), one(float32), one(int32)
    )  # fmt: skip
    return _abstract(batch, NamedSharding(mesh, PartitionSpec(BATCH)))


def programs(config: Any, size: Size, lm: UnitLMConfig | None = None) -> dict[str, Compile]:
    """Returns functions that compile each program for the slice, by name.

    Args:
      config: of a prompt tuning job.
      size: sizes of the slice and of the programs.
      lm: architecture to use instead of `size.lm`.

    Raises:
      ValueError: a bank that does not divide the batch, chips that do not divide, an unknown config or topology.
    """
    import jax
    import numpy as np

    from spjax.evaluation import decode
    from spjax.models import prompts
    from spjax.models.hubert_config import HubertConfig
    from spjax.serving.frozen import KINDS, quantize
    from spjax.serving.scoring import Programs, Shape
    from spjax.speech2unit import hubert
    from spjax.storage.encoders import hubert_shapes
    from spjax.training import masks, sharding, train

    devices = _devices(size.topology)
    mesh = sharding.make_mesh(size.model, size.shards, devices)
    alone = jax.sharding.SingleDeviceSharding(devices[0])
    rows = size.rows * sharding.batch_shards(mesh)
    if rows % size.bank:
        raise ValueError(f"a bank of {size.bank} cannot share {rows} utterances ({size.rows} a data shard) evenly")
    setting = make_setting(config, lm or LMS[size.lm])
    common_settings: dict[str, Any] = {"config": setting.config, "compute": setting.compute}
    batch = abstract_batch(mesh, rows, size.columns, setting.verbalizer.num_slots)

    def training() -> Any:
        tx, state, frozen = abstract_training(config, setting, mesh, size.bank)
        update, where = train.make_update(setting, tx, mesh=mesh), sharding.state_shardings(mesh, state)
        return (
            jax.jit(update, donate_argnums=0, out_shardings=(where, None)).lower(state, frozen, batch, None).compile()
        )

    def evaluation() -> Any:
        _, state, frozen = abstract_training(config, setting, mesh, size.bank)

        def answer(flat: masks.Flat, batch: Any) -> jax.Array:
            params = masks.unflatten(sharding.layerwise(mesh, flat))
            local = sharding.member_major(mesh, batch, size.bank)
            return decode.score(params["lm"], params["prompt"], local, [setting.tree], **common_settings)

        return jax.jit(answer).lower({**state["trained"], **frozen}, batch).compile()

    def encoder() -> Any:
        sizes = HubertConfig()
        shapes = hubert_shapes(sizes)
        late = [f"layers/{number}/" for number in range(HUBERT_LAYER, sizes.layers)]
        flat: Any = {
            path: jax.ShapeDtypeStruct(shape, np.float32)
            for path, shape in shapes.items()
            if not path.startswith(tuple(late))
        }
        frames = sizes.frames(int(SECONDS * 16000))
        waves = max(1, hubert.BATCH_FRAMES // frames)
        samples = (frames - 1) * sizes.hop + sizes.field
        row = lambda kind, *dims: jax.ShapeDtypeStruct((waves, *dims), kind)  # noqa: E731
        norm = hubert.ChannelNorm(row(np.float32, sizes.conv_dim), row(np.float32, sizes.conv_dim))
        given = _abstract((masks.unflatten(flat), row(np.float32, samples), row(np.int32), norm), alone)
        run = jax.jit(lambda params, waves, lengths, norm: hubert.features(
            params, sizes, waves, lengths, HUBERT_LAYER, norm=norm
        ))  # fmt: skip
        return run.lower(*given).compile()

    def predictor() -> Any:
        kind = setting.compute.dtype
        weights = jax.eval_shape(lambda tree: quantize(tree, kind), abstract_lm(setting.config))
        bank = jax.eval_shape(
            lambda lm: prompts.projected(
                train.first_params(lm, setting, tuple(range(size.bank)))["prompt"], lm, setting.config, KINDS[kind]
            ),
            weights,
        )
        made = Programs(setting.config, kind, [setting.tree] * size.bank, None)
        return made.get(Shape(PREDICTOR_ROWS, size.columns), *_abstract((weights, bank), alone))

    return {"train": training, "evaluate": evaluation, "hubert": encoder, "predict": predictor}


def sent(costs: hlo.Costs, model: int) -> tuple[list[hlo.Collective], list[hlo.Collective]]:
    """Splits collectives into those among chips that share a layer, and those across data shards.

    Args:
      costs: of a program for a mesh (data, model), partitions numbered row by row.
      model: chips that share a layer.
    """
    within: list[hlo.Collective] = []
    across: list[hlo.Collective] = []
    for one in costs.collectives:
        shards = one.groups // model
        (within if (shards == shards[:, :1]).all() else across).append(one)
    return within, across


def check_frozen(across: Sequence[hlo.Collective], trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> float:
    """Checks that only gradients of the prompts are summed across data shards; returns all bytes summed over theirs.

    Sharded kernels may be gathered, one layer at a time; others must not be communicated.

    Args:
      across: collectives of a training step that cross data shards.
      trained: leaves by path, with shapes and dtypes.
      frozen: leaves by path, with shapes and shardings.

    Raises:
      AssertionError: more is summed, or an array of the shape of a frozen kernel, of all layers or one, is
        communicated.
    """
    plain = lambda dims: tuple(sorted(n for n in dims if n > 1))  # noqa: E731 - ignores the order of axes
    kernels = {path: leaf for path, leaf in frozen.items() if path.endswith("kernel")}
    split = {
        path
        for path, leaf in kernels.items()
        if "shard" in leaf.sharding.spec and leaf.sharding.mesh.shape["shard"] > 1
    }
    layers, stacks = (
        {plain(dims[drop:]): path in split for path, leaf in kernels.items() for dims in (leaf.shape, *_parts(leaf))}
        for drop in (1, 0)
    )
    may = lambda kind, dims: kind == "all-gather" and layers[dims]  # noqa: E731
    found = [
        (one.kind, dims)
        for one in across
        for dims in map(plain, one.arrays)
        if dims in stacks or (dims in layers and not may(one.kind, dims))
    ]
    assert not found, f"a training step sends arrays {found} across data shards, shaped like frozen kernels"
    least = sum(leaf.size * leaf.dtype.itemsize for leaf in trained.values())
    sums = [one for one in across if one.kind in ("all-reduce", "reduce-scatter")]
    summed, most = sum(one.bytes * one.times for one in sums), sorted(sums, key=lambda one: -one.bytes * one.times)[:3]
    assert summed <= 1.1 * least + 2**16, (
        f"a training step sums {summed:,.0f} bytes across data shards, the prompts' gradients take {least:,}; most of "
        f"it: {'; '.join(f'{one.times} {one.kind} of {one.arrays} for {one.origin}' for one in most)}"
    )
    return summed / least


def _parts(leaf: Any) -> list[tuple[int, ...]]:
    """Returns the shapes in which a leaf may be communicated: sharded, or sharded only by `model` or by `shard`."""
    spec, mesh = leaf.sharding.spec, leaf.sharding.mesh

    def divided(by: str) -> tuple[int, ...]:
        axes = itertools.zip_longest(leaf.shape, spec[: len(leaf.shape)])
        return tuple(size // mesh.shape[by] if axis == by else size for size, axis in axes)

    return [leaf.sharding.shard_shape(leaf.shape), divided("model"), divided("shard")]


def link_seconds(one: hlo.Collective, chip: Chip) -> float:
    """Estimates the seconds of a collective: a ring over one link, one way, and a hop for each chip of the torus."""
    members = one.groups.shape[1]
    share = (members - 1) / members
    rounds = {"all-reduce": 2 * share, "reduce-scatter": members - 1, "collective-permute": 1}.get(one.kind, share)
    hops = chip.axes * (members ** (1 / chip.axes) - 1) * (2 if one.kind == "all-reduce" else 1)
    return one.bytes * rounds / chip.link + hops * HOP


def described(compiled: Any, size: Size, chip: Chip, model: int) -> dict[str, Any]:
    """Returns the costs of a compiled program on a chip, as JSON."""
    memory = compiled.memory_analysis()
    costs = hlo.costs(hlo.parse(compiled.as_text()))
    within, across = sent(costs, model)
    over = lambda value: sum(one.times * value(one) for one in costs.work)  # noqa: E731
    found: dict[str, Any] = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "flops": over(lambda one: one.flops),
        "passes": over(lambda one: one.passes),
        "bytes": over(lambda one: one.bytes),
        "collectives": [
            {"kind": one.kind, "bytes": one.bytes, "times": one.times, "among": one.groups.shape[1], "across": far}
            for far, some in ((False, within), (True, across))
            for one in some
        ],
        "products s": over(lambda one: one.passes / chip.flops),
        "memory s": over(lambda one: one.bytes / chip.bandwidth),
        "links s": sum(one.times * link_seconds(one, chip) for one in costs.collectives),
        "compiler s": over(lambda one: one.cycles / chip.clock),
    }
    longest = over(lambda one: max(one.passes / chip.flops, one.bytes / chip.bandwidth))
    found["roofline s"] = longest + found["links s"]
    found["fits"] = sum(found[name] for name in ("arguments", "outputs", "temporaries", "code")) <= chip.memory
    return found


def measure(config: Any, size: Size, names: Sequence[str], lm: UnitLMConfig | None = None) -> Iterator[dict[str, Any]]:
    """Yields a row for each program: sizes, costs, seconds to compile; or the compiler's error if it does not fit.

    Args:
      config: of a prompt tuning job.
      size: sizes of the slice and of the programs.
      names: of the programs.
      lm: architecture to use instead of `size.lm`.

    Raises:
      ValueError: an unknown program or chip, and as `programs`.
      AssertionError: a training step sends more than gradients of prompts across data shards.
    """
    import jax

    from spjax.training import sharding

    kind = size.topology.partition(":")[0]
    if kind not in CHIPS:
        raise ValueError(f"topology {size.topology!r} has no chip of {', '.join(CHIPS)}: give one such as v5e:2x2")
    made = programs(config, size, lm)
    if unknown := set(names) - made.keys():
        raise ValueError(f"programs {', '.join(sorted(unknown))} are unknown: choose from {', '.join(made)}")
    for name in tqdm(names, desc=f"{size.topology} {size.lm} bank {size.bank}", unit="program", file=sys.stderr):
        model = size.model if name in ("train", "evaluate") else 1
        row: dict[str, Any] = {
            "program": name,
            **dataclasses.asdict(size),
            "jax": jax.__version__,
            "libtpu": metadata.version("libtpu"),
            "date": datetime.now(UTC).date().isoformat(),
        }
        began = time.perf_counter()
        try:
            compiled = made[name]()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield {**row, "fits": False, "refused": " ".join(str(error).split())[:300]}
            continue
        row["seconds to compile"] = round(time.perf_counter() - began, 1)
        row |= described(compiled, size, CHIPS[kind], model)
        if name == "train":
            setting = make_setting(config, lm or LMS[size.lm])
            mesh = sharding.make_mesh(size.model, size.shards, _devices(size.topology))
            _, state, frozen = abstract_training(config, setting, mesh, size.bank)
            _, across = sent(hlo.costs(hlo.parse(compiled.as_text())), model)
            row["summed of prompts"] = check_frozen(across, state["trained"], frozen)
        yield row


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
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


HEADS = (
    "program", "slice", "LM", "bank", "batch a shard", "model", "shards", "remat", "arguments GiB", "temporaries GiB",
    "of memory", "TFLOP", "passes a FLOP", "GB moved", "sent within a layer", "sent across data",
    "products ms", "memory ms", "links ms", "roofline ms", "compiler ms", "libtpu",
)  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the rows of `measure` as a Markdown table."""
    return common.table([HEADS, *map(_cells, rows)])


def _cells(row: Mapping[str, Any]) -> list[str]:
    shape = f"{row['rows']} × {row['columns']}"
    if row["program"] == "predict":
        shape = f"{PREDICTOR_ROWS} × {row['columns']}"
    if row["program"] == "hubert":
        shape = f"{SECONDS:g} s a wave"
    meshed = row["program"] in ("train", "evaluate")
    model = str(row["model"]) if meshed else "one chip"
    shards = {0: "all", 1: ""}.get(row["shards"], str(row["shards"])) if meshed else ""
    named = row["program"] != "hubert"
    head = [
        row["program"], row["topology"], row["lm"] if named else "", str(row["bank"]) if named else "",
        shape, model, shards, "yes" if row["remat"] and row["program"] == "train" else "",
    ]  # fmt: skip
    if "refused" in row:
        return [*head, "", "", "**does not fit**", *[""] * 10, row["libtpu"]]
    chip = CHIPS[row["topology"].partition(":")[0]]
    used = sum(row[name] for name in ("arguments", "outputs", "temporaries", "code")) / chip.memory
    return [
        *head,
        f"{row['arguments'] / 2**30:.2f}",
        f"{row['temporaries'] / 2**30:.2f}",
        f"{used:.0%}" if row["fits"] else f"**{used:.0%}**",
        f"{row['flops'] / 1e12:.2f}",
        f"{row['passes'] / row['flops']:.2f}",
        f"{row['bytes'] / 1e9:.1f}",
        _collectives(row, across=False),
        _collectives(row, across=True),
        *(f"{1e3 * row[name]:.1f}" for name in ("products s", "memory s", "links s", "roofline s", "compiler s")),
        row["libtpu"],
    ]


def _collectives(row: Mapping[str, Any], across: bool) -> str:
    kinds: dict[str, tuple[int, float]] = {}
    for one in row["collectives"]:
        if one["across"] == across:
            times, size = kinds.get(one["kind"], (0, 0.0))
            kinds[one["kind"]] = times + one["times"], size + one["times"] * one["bytes"]
    return ", ".join(f"{times} {kind}, {size / 1e6:.3g} MB" for kind, (times, size) in kinds.items())


def define_flags() -> None:
    """Defines the command's flags in FLAGS."""
    take: dict[str, Any] = {"flag_values": FLAGS}
    config_flags.DEFINE_config_file(
        "config", None, "A prompt tuning job: a file in configs/.", lock_config=True, **take
    )
    flags.DEFINE_string("topology", "v5e:2x2", "The slice: v5e:2x2, v5e:16x16, v5p:2x2x1 ...", **take)
    flags.DEFINE_enum("lm", "151M", list(LMS), "Size of the unit LM.", **take)
    flags.DEFINE_integer("bank", 1, "Members of the bank.", lower_bound=1, **take)
    flags.DEFINE_integer("rows", 64, "Utterances of a batch on each data shard.", lower_bound=1, **take)
    flags.DEFINE_integer("columns", 64, "Source columns of a batch.", lower_bound=8, **take)
    flags.DEFINE_list("programs", "train,evaluate,hubert,predict", "Programs to compile.", **take)
    flags.DEFINE_string("out", None, "Append the results to this file, one line of JSON a program.", **take)
    flags.DEFINE_bool("help", False, "Show this help.", **take)
    flags.DEFINE_string("show", None, "Compile nothing; print the table of such a file.", **take)


def main(argv: Sequence[str]) -> None:
    """Compiles the programs that the flags select, and prints the report."""
    define_flags()
    try:
        unexpected = FLAGS(argv)[1:]
    except flags.Error as error:
        sys.exit(f"error: {error}")
    if FLAGS.help or unexpected:
        print(__doc__, FLAGS.get_help(), *(f"error: unexpected {one!r}" for one in unexpected), sep="\n")
        sys.exit(len(unexpected))
    if FLAGS.show:
        print(table([json.loads(line) for line in Path(FLAGS.show).read_text().splitlines()]))
        return
    if FLAGS.config is None:
        sys.exit("error: give --config=configs/fsc.py, or --show=FILE")
    if wrong := wrong_compiler():
        sys.exit(f"error: {wrong}")
    import jax

    jax.config.update("jax_platforms", "cpu")  # do not look for a TPU
    config = FLAGS.config
    size = Size(
        FLAGS.topology,
        FLAGS.lm,
        FLAGS.bank,
        FLAGS.rows,
        FLAGS.columns,
        config.model_parallel,
        config.weight_shards,
        config.compute.remat,
    )
    rows = []
    try:
        for row in measure(config, size, FLAGS.programs):
            rows.append(row)
            if FLAGS.out:
                with Path(FLAGS.out).open("a") as file:
                    file.write(json.dumps(row) + "\n")
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv)
