"""Pretraining a unit LM: next-unit prediction on unit records, utterances packed into rows.

As in GSLM, an utterance `</s> u1 .. uT` predicts `u1 .. uT </s>`. In a packed row each utterance attends to itself
only, and its positions start at 0. A multi-stream LM (pGSLM) has one column more, since its streams lag the units by a
column: `<s> u1 .. uT </s>` predicts `u1 .. uT </s>` and the duration and f0 of each column's input unit.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from spjax import vocab
from spjax.data.unit_set import UnitSet
from spjax.models import streams, unit_lm
from spjax.models.config import Compute, UnitLMConfig
from spjax.training import loop, masks, optim, sharding, speed
from spjax.training.masks import Flat
from spjax.types import Json, Params, Rows, State, Streams

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run.

    Attributes:
      epochs: passes over the units.
      row_length: W, columns of a packed row; longer utterances are cut into pieces of this length.
      rows: rows of a batch.
      noise: fraction of the input units replaced by random units (targets, durations and f0 are not changed).
      dedup: remove duplicate sequences (equal units and streams).
      seed: of weights, data order and noise.
      checkpoint_every: updates between checkpoints.
      stream_weights: loss weights of duration and f0 in a multi-stream LM; the unit loss has weight 1.
      f0_bins: number of f0 bins of a discrete multi-stream LM whose config has no f0_edges; quantiles of the train set.
      profile: number of updates in the profiler trace (docs/profiling.md); 0: no trace.
    """

    epochs: int = 10
    row_length: int = 128
    rows: int = 64
    noise: float = 0.0
    dedup: bool = True
    seed: int = 0
    checkpoint_every: int = 250
    stream_weights: tuple[float, float] = (0.5, 0.5)
    f0_bins: int = 32
    profile: int = 0

    def __post_init__(self) -> None:
        for name, least in {"epochs": 1, "row_length": 1, "rows": 1, "checkpoint_every": 1, "profile": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"pretrain: {name} is {getattr(self, name)}, must be at least {least}")
        if not 2 <= self.f0_bins <= 1024:
            raise ValueError(f"pretrain: f0_bins is {self.f0_bins}, must be in 2..1024")
        if len(self.stream_weights) != 2 or not all(0 <= weight < math.inf for weight in self.stream_weights):
            raise ValueError(f"pretrain: stream_weights {self.stream_weights} must be two finite numbers of at least 0")
        if not 0 <= self.noise < 1:
            raise ValueError(f"pretrain: noise is {self.noise}, must be in [0, 1)")


class PackedRows(NamedTuple):
    """Packed rows [rows, W], on host or device; or a single sequence [n].

    Attributes:
      inputs: int32 tokens.
      targets: int32 tokens; PAD: no target.
      segment: int32, index of the sequence in its row, from 1; 0: padding.
      position: int32, index in the sequence.
      streams: input streams of a multi-stream LM, which lag the units by a column; None for a unit LM.
      stream_targets: streams to predict; an f0 of F0_BOS marks columns without a target. None for a unit LM.
    """

    inputs: Rows
    targets: Rows
    segment: Rows
    position: Rows
    streams: Streams | None = None
    stream_targets: Streams | None = None


class LossSums(NamedTuple):
    """Losses summed over a batch, in nats; absolute errors in frames and log f0 for continuous streams.

    Attributes:
      unit: over `units` predicted units.
      duration, f0: over `segments` predicted segments; all 0 for a unit LM.
    """

    unit: jax.Array
    duration: jax.Array
    f0: jax.Array
    units: jax.Array
    segments: jax.Array


def utterances(sets: list[UnitSet], row_length: int, dedup: bool) -> list[PackedRows]:
    """Make sequences of the utterances of several sets, in order, cut to at most `row_length` columns.

    Sets with durations and f0 give sequences of a multi-stream LM.
    """
    sequences = [_sequence(units, i) for units in sets for i in range(len(units))]
    if dedup:
        unique = {b"".join(x.tobytes() for x in jax.tree.leaves(sequence)): sequence for sequence in sequences}
        _log.info("pretraining: %d of %d sequences are distinct", len(unique), len(sequences))
        sequences = list(unique.values())
    long = sum(len(sequence.inputs) > row_length for sequence in sequences)
    if long:
        _log.info("pretraining: %d utterances over %d units were cut into pieces", long, row_length - 1)
    return [piece for sequence in sequences for piece in _cut(sequence, row_length)]


def _sequence(units: UnitSet, i: int) -> PackedRows:
    tokens = units.units_of(i).astype(np.int32) + vocab.UNIT_OFFSET
    if units.streams is None:
        return _columns(np.concatenate([[vocab.EOS], tokens, [vocab.EOS]]))
    segments = Streams(*(flat[units.offsets[i] : units.offsets[i + 1]] for flat in units.streams))
    # As in pGSLM, the end token has prosody targets too: duration 0 and f0 0 (unvoiced).
    targets = Streams(np.concatenate([[0], segments.duration, [0]]), np.concatenate([[vocab.F0_BOS], segments.f0, [0]]))
    inputs = Streams(*(np.concatenate([[first], x[:-1]]) for x, first in zip(targets, (0, vocab.F0_PAD), strict=True)))
    dtypes = Streams(np.int32, np.float32)
    inputs, targets = (Streams(*map(np.ndarray.astype, one, dtypes)) for one in (inputs, targets))
    return _columns(np.concatenate([[vocab.BOS], tokens, [vocab.EOS, vocab.PAD]]))._replace(
        streams=inputs, stream_targets=targets
    )


def _columns(tokens: np.ndarray) -> PackedRows:
    tokens = tokens.astype(np.int32)
    place = np.arange(len(tokens) - 1, dtype=np.int32)
    return PackedRows(tokens[:-1], tokens[1:], np.ones_like(place), place)


def _cut(sequence: PackedRows, row_length: int) -> Iterator[PackedRows]:
    for start in range(0, len(sequence.inputs), row_length):
        piece = jax.tree.map(lambda x: x[start : start + row_length], sequence)  # noqa: B023
        yield piece._replace(position=piece.position - start)


def pack(sequences: list[PackedRows], row_length: int, seed: int) -> PackedRows:
    """Pack sequences into rows by best fit, in a random order."""
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # by free columns
    rows: list[list[PackedRows]] = []
    for i in np.random.default_rng(seed).permutation(len(sequences)):
        sequence = sequences[i]
        size = len(sequence.inputs)
        space = next((s for s in range(size, row_length + 1) if open_rows[s]), None)
        if space is None:
            rows.append([])
            row, space = len(rows) - 1, row_length
        else:
            row = open_rows[space].pop()
        rows[row].append(sequence._replace(segment=sequence.segment * (len(rows[row]) + 1)))
        if space > size:
            open_rows[space - size].append(row)

    def place(fill: int | float, *pieces: np.ndarray) -> np.ndarray:
        packed = np.full((len(rows), row_length), fill, pieces[0].dtype)
        for r, start, piece in zip(row_of, starts, pieces, strict=True):
            packed[r, start : start + len(piece)] = piece
        return packed

    placed = [piece for together in rows for piece in together]
    row_of = [r for r, together in enumerate(rows) for _ in together]
    starts = [start for row in rows for start in itertools.accumulate((len(x.inputs) for x in row[:-1]), initial=0)]
    padding = PackedRows(vocab.PAD, vocab.PAD, 0, 0)
    if placed[0].streams is not None:
        padding = padding._replace(streams=Streams(0, vocab.F0_PAD), stream_targets=Streams(0, vocab.F0_BOS))
    return jax.tree.map(place, padding, *placed)


def batches(rows: PackedRows, size: int) -> Iterator[PackedRows]:
    """Yield batches of `size` rows; the last one is padded with rows of segment 0."""
    for start in range(0, len(rows.inputs), size):
        part = jax.tree.map(lambda column: column[start : start + size], rows)  # noqa: B023
        missing = size - len(part.inputs)
        yield jax.tree.map(lambda column: np.pad(column, ((0, missing), (0, 0))), part) if missing else part  # noqa: B023


def losses(
    params: Params,
    config: UnitLMConfig,
    rows: PackedRows,
    compute: Compute,
    noise: float = 0.0,
    key: jax.Array | None = None,
) -> LossSums:
    """Sum the losses of packed rows, in float32.

    Args:
      params: LM weights.
      config: LM architecture.
      rows: [rows, W] each, with streams for a multi-stream LM.
      compute: operand dtype and rematerialisation.
      noise: fraction of the input units to replace by random units.
      key: random key of the noise; None: no noise.
    """
    inputs = rows.inputs
    if noise and key is not None:
        hit_key, unit_key = jax.random.split(key)
        hit = jax.random.bernoulli(hit_key, noise, inputs.shape) & (inputs >= vocab.UNIT_OFFSET)
        random = jax.random.randint(unit_key, inputs.shape, vocab.UNIT_OFFSET, config.vocab_size)
        inputs = jnp.where(hit, random, inputs)
    same = rows.segment[:, :, None] == rows.segment[:, None, :]
    mask = same & jnp.tril(jnp.ones((inputs.shape[1],) * 2, bool))
    hidden = unit_lm.hidden_states(
        params, config, inputs, compute, streams=rows.streams, position=rows.position, mask=mask
    )
    logits = unit_lm.unembed(params, hidden, compute)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)
    real = (rows.segment > 0) & (rows.targets != vocab.PAD)
    unit, units = jnp.sum(jnp.where(real, nll, 0)), jnp.sum(real)
    if config.prosody is None or rows.stream_targets is None:
        return LossSums(unit, jnp.zeros(()), jnp.zeros(()), units, jnp.zeros((), int))
    has_target = (rows.segment > 0) & jnp.isfinite(rows.stream_targets.f0)
    predicted = streams.heads(params, hidden, compute)
    each = streams.losses(config.prosody, predicted, rows.stream_targets)
    duration, f0 = (jnp.sum(jnp.where(has_target, x, 0)) for x in each)
    return LossSums(unit, duration, f0, units, jnp.sum(has_target))


def check_rows(run: PretrainConfig, mesh: Mesh) -> None:
    """Raise ValueError if a batch is not divisible by the number of batch shards."""
    shards = sharding.batch_shards(mesh)
    if run.rows % shards:
        raise ValueError(f"pretrain: rows={run.rows} must be a multiple of the {shards} devices that share a batch")


def pretrain(
    config: UnitLMConfig,
    run: PretrainConfig,
    optimizer: optim.OptimConfig,
    compute: Compute,
    *,
    train: list[UnitSet],
    valid: dict[str, UnitSet],
    workdir: str,
    model_parallel: int = 1,
    weight_shards: int = 1,
) -> tuple[Params, list[Json]]:
    """Train a unit LM or a multi-stream LM from scratch.

    Args:
      config: LM architecture.
      run: batching and length of the run.
      optimizer: AdamW settings.
      compute: operand dtype and rematerialisation.
      train: unit sets; labels are not used. They must have streams if and only if `config` has prosody.
      valid: unit sets by name, on which perplexity and stream losses are reported.
      workdir: checkpoints and logs; a run found there is resumed.
      model_parallel, weight_shards: see `sharding.make_mesh`.

    Returns:
      The weights after the last epoch (the learning rate decays to 0, so no earlier epoch is selected), float32 on the
      host; and the metrics of every epoch.

    Raises:
      ValueError: rows are not divisible by the devices, or streams of a set do not match the LM.
      DivergedError, Interrupted: as `loop.fit`.
    """
    mesh = sharding.make_mesh(model_parallel, weight_shards)
    check_rows(run, mesh)
    if any((units.streams is None) != (config.prosody is None) for units in (*train, *valid.values())):
        raise ValueError("pretrain: a multi-stream LM needs sets with durations and f0, a unit LM sets without them")
    # Utterances of a row do not attend to each other, so it is enough to pack once and shuffle rows.
    rows = pack(utterances(train, run.row_length, run.dedup), run.row_length, run.seed)
    held_out = {
        name: pack(utterances([units], run.row_length, dedup=False), run.row_length, run.seed)
        for name, units in valid.items()
    }
    steps = -(-len(rows.inputs) // run.rows)

    def start(key: jax.Array) -> Flat:
        return masks.flatten({"lm": unit_lm.init(key, config)})

    def sums(flat: Flat, rows: PackedRows, noise: float = 0.0, key: jax.Array | None = None) -> LossSums:
        return losses(masks.unflatten(sharding.layerwise(mesh, flat))["lm"], config, rows, compute, noise, key)

    # Initialised sharded, since the LM may not fit on one device.
    key = jax.random.key(run.seed)
    weights = jax.jit(start, out_shardings=sharding.shardings(mesh, jax.eval_shape(start, key)))(key)
    tx = masks.masked(optim.make(optimizer, steps * run.epochs), weights, {})
    state = {"params": weights, "optimizer": tx.init(weights), "step": jnp.zeros((), jnp.int32)}
    where = sharding.state_shardings(mesh, state)
    update = jax.jit(_make_update(sums, tx, run), donate_argnums=0, out_shardings=(where, None))
    measure = jax.jit(sums)

    def plan(state: State, epoch: int) -> list[PackedRows]:
        del state
        order = np.random.default_rng((run.seed, epoch)).permutation(len(rows.inputs))
        return list(batches(jax.tree.map(lambda column: column[order], rows), run.rows))

    def read(parts: Sequence[PackedRows]) -> Iterator[tuple[PackedRows, int]]:
        for part in parts:
            yield _local(mesh, part), int(np.sum((part.position == 0) & (part.segment > 0)))

    def evaluate(state: State, epoch: int) -> tuple[State, dict[str, float], float]:
        del epoch
        metrics = _evaluate(lambda part: measure(state["params"], _local(mesh, part)), held_out, run.rows)
        return state, metrics, -metrics["nll"]

    cost = speed.cost_of(update, compute.operand)
    job = loop.Job(sharding.place(state, where), steps, plan, read, update, evaluate, lambda _: False, cost=cost)
    state, history = loop.fit(
        job, workdir, epochs=run.epochs, checkpoint_every=run.checkpoint_every, profile=run.profile
    )
    return masks.unflatten(sharding.fetch(state["params"]))["lm"], history


def _make_update(
    sums: Callable[[Flat, PackedRows, float, jax.Array], LossSums],
    tx: optax.GradientTransformation,
    run: PretrainConfig,
) -> Callable[[State, PackedRows], tuple[State, dict[str, jax.Array]]]:
    key = jax.random.key(run.seed)

    def update(state: State, part: PackedRows) -> tuple[State, dict[str, jax.Array]]:
        def loss(flat: Flat) -> jax.Array:
            found = sums(flat, part, run.noise, jax.random.fold_in(key, state["step"]))
            total = found.unit + run.stream_weights[0] * found.duration + run.stream_weights[1] * found.f0
            return total / jnp.maximum(found.units, 1)

        value, grads = jax.value_and_grad(loss)(state["params"])
        params, opt = masks.apply_gradients(tx, state["optimizer"], state["params"], {}, grads)
        metrics = {"loss": value, "gradient_norm": optim.member_norms(grads)[0], "updates": 1.0}
        return {"params": params, "optimizer": opt, "step": state["step"] + 1}, metrics

    return update


def _evaluate(
    measure: Callable[[PackedRows], LossSums], held_out: Mapping[str, PackedRows], size: int
) -> dict[str, float]:
    """Mean losses and perplexity of each set, in batches of `size` rows; "nll": mean over the units of all sets."""
    metrics: dict[str, float] = {}
    nll = units = 0.0
    for name, packed in held_out.items():
        parts = list(batches(packed, size))
        found = LossSums(*np.zeros(len(LossSums._fields)))
        for part in tqdm(parts, desc=f"valid {name}", leave=False, disable=jax.process_index() > 0):
            found = jax.tree.map(lambda a, b: a + float(b), found, measure(part))
        each = float(found.unit / found.units)
        metrics |= {f"{name}/nll": each, f"{name}/perplexity": float(np.exp(each))}
        if found.segments:
            metrics |= {f"{name}/{stream}_loss": getattr(found, stream) / found.segments for stream in Streams._fields}
        nll, units = nll + float(found.unit), units + float(found.units)
    return {**metrics, "nll": nll / units}


def _local(mesh: Mesh, rows: PackedRows) -> PackedRows:
    """Make the global batch from this process's rows of it."""
    shards, runs = sharding.local_shards(mesh)
    return sharding.shard_rows(
        mesh,
        jax.tree.map(
            lambda column: column.reshape(runs, -1, column.shape[1])[shards].reshape(-1, column.shape[1]), rows
        ),
    )
