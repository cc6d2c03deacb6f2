"""Pretraining a unit LM: next-unit prediction on unit records, utterances packed into rows.

An utterance `</s> u1 .. uT` predicts `u1 .. uT </s>`, as GSLM's did; in a packed row it sees itself only, and its
positions start anew.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from spjax import vocab
from spjax.data.unit_set import UnitSet
from spjax.models import unit_lm
from spjax.models.config import Compute, UnitLMConfig
from spjax.training import loop, masks, optim, sharding
from spjax.types import Params

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run.

    Attributes:
      epochs: passes over the units.
      row_length: W, columns of a packed row; longer utterances are cut into pieces of it.
      rows: rows of a batch.
      noise: share of the input units that are replaced by a random one (targets stay).
      dedup: use equal unit sequences once.
      seed: of weights, order and noise.
      checkpoint_every: updates between checkpoints.
    """

    epochs: int = 10
    row_length: int = 128
    rows: int = 64
    noise: float = 0.0
    dedup: bool = True
    seed: int = 0
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        for name in ("epochs", "row_length", "rows", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"pretrain: {name} is {getattr(self, name)}, must be at least 1")
        if not 0 <= self.noise < 1:
            raise ValueError(f"pretrain: noise is {self.noise}, must lie in [0, 1)")


class Rows(NamedTuple):
    """Packed rows: `inputs`, `targets`, `segment`, `position`, int32 [rows, W], on host or device; segment 0 fills."""

    inputs: Any
    targets: Any
    segment: Any
    position: Any


def utterances(sets: list[UnitSet], row_length: int, dedup: bool) -> list[np.ndarray]:
    """Token sequences `</s> u1 .. uT </s>` of several sets, cut where longer than a row, in a fixed order."""
    sequences = [units.units_of(i) for units in sets for i in range(len(units))]
    if dedup:
        unique = {sequence.tobytes(): sequence for sequence in sequences}
        _log.info("pretraining: %d of %d sequences are distinct", len(unique), len(sequences))
        sequences = list(unique.values())
    cut = sum(len(sequence) + 1 > row_length for sequence in sequences)
    if cut:
        _log.info("pretraining: %d utterances over %d units are cut into pieces", cut, row_length - 1)
    pieces = []
    for sequence in sequences:
        tokens = np.concatenate([[vocab.EOS], sequence.astype(np.int32) + vocab.UNIT_OFFSET, [vocab.EOS]])
        pieces += [tokens[i : i + row_length + 1] for i in range(0, len(tokens) - 1, row_length)]
    return pieces


def pack(sequences: list[np.ndarray], row_length: int, seed: int) -> Rows:
    """Lay sequences into rows in a random order, each into the open row that it fills best."""
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # by space left
    rows: list[list[np.ndarray]] = []
    for i in np.random.default_rng(seed).permutation(len(sequences)):
        sequence = sequences[i]
        size = len(sequence) - 1
        space = next((s for s in range(size, row_length + 1) if open_rows[s]), None)
        if space is None:
            rows.append([])
            row, space = len(rows) - 1, row_length
        else:
            row = open_rows[space].pop()
        rows[row].append(sequence)
        if space > size:
            open_rows[space - size].append(row)
    packed = Rows(*(np.full((len(rows), row_length), fill, np.int32) for fill in (vocab.PAD, vocab.PAD, 0, 0)))
    for r, together in enumerate(rows):
        start = 0
        for number, sequence in enumerate(together, 1):
            span = slice(start, start + len(sequence) - 1)
            packed.inputs[r, span], packed.targets[r, span] = sequence[:-1], sequence[1:]
            packed.segment[r, span], packed.position[r, span] = number, np.arange(len(sequence) - 1)
            start = span.stop
    return packed


def batches(rows: Rows, size: int) -> Iterator[Rows]:
    """Rows in batches of `size`; the last is filled with rows of segment 0."""
    for start in range(0, len(rows.inputs), size):
        part = Rows(*(column[start : start + size] for column in rows))
        missing = size - len(part.inputs)
        yield Rows(*(np.pad(column, ((0, missing), (0, 0))) for column in part)) if missing else part


def losses(
    params: Params, config: UnitLMConfig, rows: Rows, compute: Compute, noise: float = 0.0, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Summed negative log likelihood in nats, and the number of targets."""
    inputs = rows.inputs
    if noise and key is not None:
        hit_key, unit_key = jax.random.split(key)
        hit = jax.random.bernoulli(hit_key, noise, inputs.shape) & (inputs >= vocab.UNIT_OFFSET)
        random = jax.random.randint(unit_key, inputs.shape, vocab.UNIT_OFFSET, config.vocab_size)
        inputs = jnp.where(hit, random, inputs)
    width = inputs.shape[1]
    table = jnp.asarray(unit_lm.sinusoids(vocab.FIRST_POSITION + width, config.dim))
    x = unit_lm.embed_tokens(params, inputs) + table[vocab.FIRST_POSITION + rows.position]
    same = rows.segment[:, :, None] == rows.segment[:, None, :]
    mask = same & jnp.tril(jnp.ones((width, width), bool))
    hidden, _ = unit_lm.extend(params, config, (x,), unit_lm.empty_prefix(config), mask, compute=compute)
    logits = unit_lm.unembed(params, hidden, compute)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)
    real = rows.segment > 0
    return jnp.sum(jnp.where(real, nll, 0)), jnp.sum(real)


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
) -> tuple[Params, list[dict[str, Any]]]:
    """Train a unit LM from scratch.

    Args:
      config: its sizes.
      run: data and length of the run.
      optimizer: AdamW settings.
      compute: operand type and remat.
      train: unit sets; only the units are used, never the labels.
      valid: unit sets on which perplexity is reported, by name.
      workdir: checkpoints and logs; a run found there is continued.
      model_parallel: devices that share a layer.

    Returns:
      The weights of the last epoch (the learning rate ends at 0, so they are the ones to keep), float32 on the host,
      and the history of valid perplexities.

    Raises:
      ValueError: rows do not divide among the devices.
      DivergedError, Interrupted: as `loop.fit`.
    """
    mesh = sharding.make_mesh(model_parallel)
    shards = mesh.shape["data"]
    if run.rows % shards:
        raise ValueError(f"pretrain: rows={run.rows} must be a multiple of the {shards} devices that share a batch")
    # Utterances of a row do not see each other, so who shares a row does not matter: pack once, shuffle rows.
    rows = pack(utterances(train, run.row_length, run.dedup), run.row_length, run.seed)
    held_out = {
        name: pack(utterances([units], run.row_length, dedup=False), run.row_length, run.seed)
        for name, units in valid.items()
    }
    steps = -(-len(rows.inputs) // run.rows)
    tx = optim.make(optimizer, steps * run.epochs)
    key = jax.random.key(run.seed)
    weights = masks.flatten({"lm": jax.jit(unit_lm.init, static_argnums=1)(key, config)})
    frozen: masks.Flat = {}
    tx = masks.masked(tx, weights, frozen)
    state = {"params": weights, "optimizer": tx.init(weights), "step": jnp.zeros((), jnp.int32)}
    where = sharding.state_shardings(mesh, state)
    state = sharding.place(state, where)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(where, None))
    def update(state: dict[str, Any], part: Rows) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        def loss(flat: masks.Flat) -> jax.Array:
            noise_key = jax.random.fold_in(key, state["step"])
            total, count = losses(masks.unflatten(flat)["lm"], config, part, compute, run.noise, noise_key)
            return total / jnp.maximum(count, 1)

        value, grads = jax.value_and_grad(loss)(state["params"])
        params, opt = masks.apply_gradients(tx, state["optimizer"], state["params"], frozen, grads)
        return {"params": params, "optimizer": opt, "step": state["step"] + 1}, {
            "loss": value,
            "gradient_norm": optim.member_norms(grads)[0],
        }

    measure = jax.jit(lambda flat, rows: losses(masks.unflatten(flat)["lm"], config, rows, compute))

    def epoch_batches(epoch: int, start: int) -> Iterator[tuple[Rows, int]]:
        order = np.random.default_rng((run.seed, epoch)).permutation(len(rows.inputs))
        shuffled = Rows(*(column[order] for column in rows))
        for part in itertools.islice(batches(shuffled, run.rows), start, None):
            yield _local(mesh, part), int(np.sum((part.position == 0) & (part.segment > 0)))

    def evaluate(state: dict[str, Any], epoch: int) -> tuple[dict[str, Any], dict[str, Any], float]:
        del epoch
        metrics: dict[str, Any] = {}
        sums = np.zeros(2)
        for name, packed in held_out.items():
            parts = list(batches(packed, run.rows))
            found = np.zeros(2)
            for part in tqdm(parts, desc=f"valid {name}", leave=False, disable=jax.process_index() > 0):
                found += [float(x) for x in measure(state["params"], _local(mesh, part))]
            metrics |= {f"{name}/nll": found[0] / found[1], f"{name}/perplexity": float(np.exp(found[0] / found[1]))}
            sums += found
        metrics["nll"] = sums[0] / sums[1]
        return state, metrics, -metrics["nll"]

    job = loop.Job(state, update, epoch_batches, steps, evaluate, lambda _: False)
    state, history = loop.fit(job, workdir, epochs=run.epochs, checkpoint_every=run.checkpoint_every)
    return masks.unflatten(sharding.fetch(state["params"]))["lm"], history


def _local(mesh: Any, rows: Rows) -> Rows:
    """This host's rows, as its share of the global batch."""
    host, hosts = jax.process_index(), jax.process_count()
    size = len(rows.inputs) // hosts
    return sharding.shard_rows(mesh, Rows(*(column[host * size : (host + 1) * size] for column in rows)))
