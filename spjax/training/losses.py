"""What prompts are trained to lower. Rows of a batch are member-major: [N * b] rows, b of each member of the bank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spjax import vocab
from spjax.models import low_rank, prompted_lm, prompts
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.verbalizers import Verbalizer
from spjax.types import Batch, Params

NEVER = -1e9  # score of what may not be said; finite, so that no row can make NaN of it


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss of prompt tuning.

    Attributes:
      kind: "slots": cross-entropy of each label among the labels of its slot, mean over an utterance's label steps and
        over utterances. "reference": negative log likelihood of separator, labels and end over all outputs, summed,
        divided by all target tokens, units included (FACTS.md, Loss and optimiser).
      noise: share of the source units replaced by a random unit while training; their durations and f0 stay.
      label_smoothing: share of the probability that training asks for which is spread over all labels of the slot,
        instead of the right one alone; of "slots" only. Not in the loss that is measured on valid.
    """

    kind: str = "slots"
    noise: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("slots", "reference"):
            raise ValueError(f"loss: kind is {self.kind!r}, must be slots or reference")
        for name in ("noise", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"loss: {name} is {getattr(self, name)}, must lie in [0, 1)")
        if self.label_smoothing and self.kind != "slots":
            raise ValueError(
                f"loss: label_smoothing is {self.label_smoothing}, but kind={self.kind!r} has none: give kind='slots'"
            )


RATES = ("dropout", "verbalizer_dropout", "lora_dropout", "noise", "label_smoothing")  # of training, not of measuring


class Spelled(NamedTuple):
    """What each row of a batch is to say. K label steps, of which a row may have fewer than another; O outputs.

    Attributes:
      targets: int32 [B, K], outputs.
      feeds: int32 [B, K], tokens that are fed back for them.
      steps: int32 [B], how many of the K are the row's own.
      allowed: bool [B or 1, K, O], what some label of the row's task says at each step.
    """

    targets: jax.Array
    feeds: jax.Array
    steps: jax.Array
    allowed: jax.Array


def spell(verbalizers: Sequence[Verbalizer], batch: Batch, members: jax.Array | None = None) -> Spelled:
    """A batch's classes spelled by its members' verbalizers: one each, or a single one that all share.

    Args:
      verbalizers: of all members.
      batch: B rows, of members of the bank at hand.
      members: int32 [N], the number among `verbalizers` of each row of the bank; None: as they stand.

    Raises:
      ValueError: verbalizers that spell labels with different numbers of units cannot share a batch.
    """
    first = verbalizers[0]
    steps, width = max(one.steps for one in verbalizers), max(one.outputs for one in verbalizers)
    if any(one.steps_per_slot != first.steps_per_slot for one in verbalizers):
        raise ValueError(
            f"tasks whose labels take {sorted({one.steps_per_slot for one in verbalizers})} units each cannot share a "
            "bank: use the learnable verbalizer, or train them apart"
        )
    classes = max(len(one.codes) for one in verbalizers)
    codes, feeds = (
        np.stack([np.pad(getattr(one, name), ((0, classes - len(one.codes)), (0, 0))) for one in verbalizers])
        for name in ("codes", "feeds")
    )
    allowed = np.ones((len(verbalizers), steps, width), bool)  # steps that a row does not have count for nothing
    for mask, one in zip(allowed, verbalizers, strict=True):
        mask[: one.steps] = np.pad(one.allowed, ((0, 0), (0, width - one.outputs)))
    # One table for all needs no gather by row.
    row, rows = jnp.zeros(1, jnp.int32), len(batch.classes)
    if len(verbalizers) > 1:
        numbers = jnp.arange(len(verbalizers)) if members is None else members
        row = jnp.broadcast_to(prompts.rows_of(numbers, batch.prompt_id, rows), (rows,))
    own = jnp.asarray([one.steps for one in verbalizers], jnp.int32)[row]
    targets, fed = (jnp.asarray(table)[row[:, None], batch.classes].reshape(rows, -1) for table in (codes, feeds))
    return Spelled(targets[:, :steps], fed[:, :steps], jnp.broadcast_to(own, (rows,)), jnp.asarray(allowed)[row])


def member_losses(
    lm: Params,
    bank: Params,
    batch: Batch,
    keys: jax.Array | None,
    *,
    loss: LossConfig,
    prompt: prompts.PromptConfig,
    verbalizers: Sequence[Verbalizer],
    config: UnitLMConfig,
    compute: Compute,
    differing: Mapping[str, Sequence[float]] | None = None,
    members: jax.Array | None = None,
) -> jax.Array:
    """Each member's loss on its rows, float32 [N].

    Args:
      lm: the LM's weights.
      bank: prompt trees [N, ...].
      batch: N * b rows, member-major.
      keys: [N] random keys of this step for dropout and noise; None measures without either.
      loss: which loss, and its rates.
      prompt: dropout rates, and the adapters' scale.
      verbalizers: classes to outputs, one a member or one for all. Members' tasks may differ in slots.
      config: the LM's architecture.
      compute: operand type and remat.
      differing: [N] values of what members do not have alike, by name: "length", the columns that each one's deep
        prompt really has; "scale", alpha / rank of its low-rank adapters; any of `RATES`. The rest is as `loss` and
        `prompt` say.
      members: int32 [N], the number of each among `verbalizers` and `differing`, where they are of a larger bank.

    Raises:
      ValueError: verbalizers that cannot share a batch.
    """

    def own(name: str, common: Any) -> Any:
        if differing is None or name not in differing:
            return common
        values = jnp.asarray(differing[name])
        return values if members is None else values[members]

    bank = low_rank.scaled(bank, own("scale", prompt.scale))
    drop = None
    if keys is not None:
        drop_key, noise_key, out_key = (jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in range(3))
        bank = prompts.dropout(bank, own("dropout", prompt.dropout), drop_key)
        if not low_rank.is_zero(low := own("lora_dropout", prompt.lora_dropout)):
            low_key = jax.vmap(jax.random.fold_in, (0, None))(keys, 3)
            each = jnp.arange(len(batch.last) // len(keys))
            by_row = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(low_key, each)
            drop = by_row.reshape(-1), jnp.repeat(jnp.broadcast_to(low, keys.shape), len(each))
        batch = replace_units(batch, noise_key, own("noise", loss.noise), config)
    said = spell(verbalizers, batch, members)
    targets, feeds, steps = said.targets, said.feeds, said.targets.shape[1]
    whole = loss.kind == "reference"
    if whole:
        if any(one.steps != steps for one in verbalizers):
            raise ValueError("the reference's loss scores the end behind the labels: its tasks must have as many slots")
        queries = steps + 2  # the last unit, the separator and every label
        edges = jnp.full((len(targets), 1), 0, jnp.int32)
        targets = jnp.concatenate([edges + vocab.BOS, targets, edges + vocab.EOS], axis=1)
    else:
        queries, feeds = steps, feeds[:, :-1]
    state = prompted_lm.run(
        lm, bank, batch, feeds, config=config, queries=queries, compute=compute, lengths=own("length", None), drop=drop
    )
    scores = prompted_lm.outputs(lm, bank, state.hidden, batch.prompt_id, compute)
    if keys is not None and verbalizers[0].learnable:
        scores = _drop_outputs(scores, out_key, own("verbalizer_dropout", prompt.verbalizer_dropout))
    if not whole:
        scores = jnp.where(said.allowed, scores, NEVER)
    nll = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
    if keys is not None and not low_rank.is_zero(smoothing := own("label_smoothing", loss.label_smoothing)):
        nll = _smoothed(nll, scores, said.allowed, jnp.broadcast_to(smoothing, keys.shape))
    if not whole:
        nll = jnp.where(jnp.arange(steps) < said.steps[:, None], nll, 0)
    size = batch.source_length + steps + 2 if whole else said.steps
    # A row that fills the shape has classes of no slot: its loss is huge, and must not be multiplied by 0.
    rows = jnp.where(batch.weight > 0, jnp.stack([nll.sum(axis=1), size]), 0)
    total, count = rows.reshape(2, len(bank["sep"]), -1).sum(axis=2)
    return total / jnp.maximum(count, 1)


def _smoothed(nll: jax.Array, scores: jax.Array, allowed: jax.Array, rates: jax.Array) -> jax.Array:
    """Cross-entropy [B, K] with a share [N] of each target spread evenly over all outputs allowed at its step."""
    log_probs = jnp.where(allowed, jax.nn.log_softmax(scores), 0)  # NEVER has no share, and times 0 it would have none
    spread = -log_probs.sum(axis=2) / allowed.sum(axis=2)
    share = jnp.repeat(rates, len(nll) // len(rates))[:, None]
    return (1 - share) * nll + share * spread


def replace_units(batch: Batch, keys: jax.Array, rate: float | jax.Array, config: UnitLMConfig) -> Batch:
    """The batch with a share of its source units replaced by random ones, drawn from each member's own key.

    Column by column: a member's draws are the same however long the batches of others are. `rate` is that of all
    members, or [N] of each.
    """
    if low_rank.is_zero(rate):
        return batch
    rates = jnp.broadcast_to(jnp.asarray(rate, jnp.float32), keys.shape)
    source = batch.source.reshape(len(keys), -1, batch.source.shape[1])

    def one(key: jax.Array, rows: jax.Array, rate: jax.Array) -> jax.Array:
        size = rows.shape[::-1]
        hit = _by_column(lambda own, n: jax.random.bernoulli(own, rate, n), jax.random.fold_in(key, 0), size)
        unit = _by_column(
            lambda own, n: jax.random.randint(own, n, vocab.UNIT_OFFSET, config.vocab_size),
            jax.random.fold_in(key, 1), size,
        )  # fmt: skip
        return jnp.where(hit.T & (rows >= vocab.UNIT_OFFSET), unit.T, rows)

    return batch._replace(source=jax.vmap(one)(keys, source, rates).reshape(batch.source.shape))


def _drop_outputs(scores: jax.Array, keys: jax.Array, rate: float | jax.Array) -> jax.Array:
    """Scores [B, K, O] with a share of them 0, by each member's own key, whatever K and O others need."""
    if low_rank.is_zero(rate):
        return scores
    rates = jnp.broadcast_to(jnp.asarray(rate, jnp.float32), keys.shape)
    members = scores.reshape(len(keys), -1, *scores.shape[1:])

    def one(key: jax.Array, own: jax.Array, rate: jax.Array) -> jax.Array:
        kept = _by_column(lambda key, n: jax.random.bernoulli(key, 1 - rate, n), key, own.shape[:0:-1] + own.shape[:1])
        return jnp.where(kept.T, own / (1 - rate), 0)

    return jax.vmap(one)(keys, members, rates).reshape(scores.shape)


def _by_column(
    draw: Callable[[jax.Array, tuple[int, ...]], jax.Array], key: jax.Array, size: tuple[int, ...]
) -> jax.Array:
    """Numbers of this size, those at [i, j, .., :] drawn by a key of their own: as many more change none of them."""
    if len(size) == 1:
        return draw(key, size)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(size[0]))
    return jax.vmap(lambda own: _by_column(draw, own, size[1:]))(keys)
