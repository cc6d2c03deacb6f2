"""Training losses of prompts. Batches are member-major: [N * b] rows, b consecutive rows for each member."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int, Key

from spjax import vocab
from spjax.models import low_rank, prompted_lm, prompts
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.verbalizers import Verbalizer
from spjax.types import Batch, Params

MASKED = -1e9  # score of outputs that are not allowed; finite, so that a fully masked row does not give NaN


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss of prompt tuning.

    Attributes:
      kind: "slots": cross-entropy of each label among the labels of its slot, mean over label steps and utterances.
        "reference": the published SpeechPrompt loss: summed negative log likelihood of separator, labels and end token
        over all outputs, divided by the number of all target tokens, units included.
      noise: fraction of the source units replaced by random units in training; durations and f0 are not changed.
      label_smoothing: probability mass of the target spread over all labels of the slot; for "slots" only. Not used
        in the valid loss.
    """

    kind: str = "slots"
    noise: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("slots", "reference"):
            raise ValueError(f"loss: kind is {self.kind!r}, must be slots or reference")
        for name in ("noise", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"loss: {name} is {getattr(self, name)}, must be in [0, 1)")
        if self.label_smoothing and self.kind != "slots":
            raise ValueError(
                f"loss: label_smoothing is {self.label_smoothing}, which kind={self.kind!r} lacks: give kind='slots'"
            )


RATES = (
    "dropout",
    "verbalizer_dropout",
    "lora_dropout",
    "noise",
    "label_smoothing",
)  # used in training, not in evaluation


class EncodedLabels(NamedTuple):
    """Labels of a batch as verbalizer outputs. K label steps (padded to the longest task), O outputs.

    Attributes:
      targets: int32 [B, K], output ids.
      fed_back: int32 [B, K], token ids fed back for them.
      steps: int32 [B], label steps of the row, at most K.
      allowed: bool [B or 1, K, O], outputs that some label of the row's task has at each step.
    """

    targets: jax.Array
    fed_back: jax.Array
    steps: jax.Array
    allowed: jax.Array


def encode_labels(
    verbalizers: Sequence[Verbalizer], batch: Batch, members: Int[jax.Array, " N"] | None = None
) -> EncodedLabels:
    """Encode a batch's classes with the verbalizers of its members.

    Args:
      verbalizers: one for each member, or a single one for all.
      batch: B rows.
      members: int32 [N], index into `verbalizers` of each row of the bank; None: 0 .. N - 1.

    Raises:
      ValueError: verbalizers have different numbers of steps per label.
    """
    first = verbalizers[0]
    steps, width = max(one.steps for one in verbalizers), max(one.outputs for one in verbalizers)
    if any(one.steps_per_slot != first.steps_per_slot for one in verbalizers):
        raise ValueError(
            f"tasks whose labels take {sorted({one.steps_per_slot for one in verbalizers})} units each cannot share a "
            "bank: use the learnable verbalizer, or train the tasks separately"
        )
    classes = max(len(one.codes) for one in verbalizers)
    codes, tokens = (
        np.stack([np.pad(getattr(one, name), ((0, classes - len(one.codes)), (0, 0))) for one in verbalizers])
        for name in ("codes", "fed_back")
    )
    allowed = np.ones((len(verbalizers), steps, width), bool)  # steps beyond a task's last are masked in the loss
    for mask, one in zip(allowed, verbalizers, strict=True):
        mask[: one.steps] = np.pad(one.allowed, ((0, 0), (0, width - one.outputs)))
    # A single table is broadcast instead of gathered by row.
    row, rows = jnp.zeros(1, jnp.int32), len(batch.classes)
    if len(verbalizers) > 1:
        numbers = jnp.arange(len(verbalizers)) if members is None else members
        row = jnp.broadcast_to(prompts.rows_of(numbers, batch.prompt_id, rows), (rows,))
    row_steps = jnp.asarray([one.steps for one in verbalizers], jnp.int32)[row]
    targets, fed = (jnp.asarray(table)[row[:, None], batch.classes].reshape(rows, -1) for table in (codes, tokens))
    return EncodedLabels(
        targets[:, :steps], fed[:, :steps], jnp.broadcast_to(row_steps, (rows,)), jnp.asarray(allowed)[row]
    )


def member_losses(
    lm: Params,
    bank: Params,
    batch: Batch,
    keys: Key[jax.Array, " N"] | None,
    *,
    loss: LossConfig,
    prompt: prompts.PromptConfig,
    verbalizers: Sequence[Verbalizer],
    config: UnitLMConfig,
    compute: Compute,
    differing: Mapping[str, Sequence[float]] | None = None,
    members: Int[jax.Array, " N"] | None = None,
) -> Float[jax.Array, " N"]:
    """Loss of each member on its rows, float32 [N].

    Args:
      lm: LM weights.
      bank: prompt trees [N, ...].
      batch: N * b rows, member-major.
      keys: [N] random keys of this step for dropout and noise; None: evaluation without either.
      loss: kind of loss and its rates.
      prompt: dropout rates and the LoRA scale.
      verbalizers: one for each member or one for all. Members' tasks may have different slots.
      config: LM architecture.
      compute: operand dtype and rematerialisation.
      differing: [N] values that differ between members and override `loss` and `prompt`: "length", number of columns
        of the deep prompt without padding; "scale", alpha / rank of the LoRA adapters; any of `RATES`.
      members: int32 [N], index of each member in `verbalizers` and `differing`, if these are of a larger bank.

    Raises:
      ValueError: the verbalizers cannot share a batch (see `encode_labels`).
    """

    def value_of(name: str, common: Any) -> Any:
        if differing is None or name not in differing:
            return common
        values = jnp.asarray(differing[name])
        return values if members is None else values[members]

    bank, drop = low_rank.scaled(bank, value_of("scale", prompt.scale)), None
    if keys is not None:
        drop_key, noise_key, out_key = (jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in range(3))
        bank = prompts.dropout(bank, value_of("dropout", prompt.dropout), drop_key)
        drop = _low_rank_drop(keys, value_of("lora_dropout", prompt.lora_dropout), len(batch.last))
        batch = replace_units(batch, noise_key, value_of("noise", loss.noise), config)
    labels = encode_labels(verbalizers, batch, members)
    targets, fed_back, steps = labels.targets, labels.fed_back, labels.targets.shape[1]
    reference = loss.kind == "reference"
    if reference:
        if vocab.BOS in config.absent and not verbalizers[0].learnable:
            raise ValueError(
                "loss.kind='reference' scores the separator, a token that this LM was not trained with: give the "
                "learnable verbalizer, or loss.kind='slots'"
            )
        if any(one.steps != steps for one in verbalizers):
            raise ValueError(
                "loss.kind='reference' scores the end token after the labels: its tasks must have equally many slots"
            )
        edges = jnp.zeros((len(targets), 1), jnp.int32)
        targets = jnp.concatenate([edges + vocab.BOS, targets, edges + vocab.EOS], axis=1)
    state = prompted_lm.run(
        lm, bank, batch, fed_back if reference else fed_back[:, :-1],
        config=config, compute=compute, lengths=value_of("length", None), drop=drop,
        queries=targets.shape[1],  # "reference": at the last unit, the separator and every label
    )  # fmt: skip
    scores = prompted_lm.outputs(lm, bank, state.hidden, batch.prompt_id, compute)
    if keys is not None and verbalizers[0].learnable:
        scores = _drop_outputs(scores, out_key, value_of("verbalizer_dropout", prompt.verbalizer_dropout))
    scores = scores if reference else jnp.where(labels.allowed, scores, MASKED)
    nll = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
    if keys is not None and not low_rank.is_zero(smoothing := value_of("label_smoothing", loss.label_smoothing)):
        nll = _smoothed(nll, scores, labels.allowed, jnp.broadcast_to(smoothing, keys.shape))
    if not reference:
        nll = jnp.where(jnp.arange(steps) < labels.steps[:, None], nll, 0)
    size = batch.source_length + steps + 2 if reference else labels.steps
    # The loss of a padding row is huge or infinite, so it is masked and not multiplied by 0.
    rows = jnp.where(batch.weight > 0, jnp.stack([nll.sum(axis=1), size]), 0)
    total, count = rows.reshape(2, len(bank["sep"]), -1).sum(axis=2)
    return total / jnp.maximum(count, 1)


def _low_rank_drop(
    keys: Key[jax.Array, " N"], rate: float | jax.Array, rows: int
) -> tuple[jax.Array, jax.Array] | None:
    """Key and rate of LoRA dropout of each of the batch's `rows`; None without dropout."""
    if low_rank.is_zero(rate):
        return None
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 3)
    each = jnp.arange(rows // len(keys))
    by_row = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, each)
    return by_row.reshape(-1), jnp.repeat(jnp.broadcast_to(rate, keys.shape), len(each))


def _smoothed(nll: jax.Array, scores: jax.Array, allowed: jax.Array, rates: jax.Array) -> jax.Array:
    """Cross-entropy [B, K] with label smoothing at rate [N] over the outputs allowed at each step."""
    log_probs = jnp.where(allowed, jax.nn.log_softmax(scores), 0)  # masked outputs are excluded
    spread = -log_probs.sum(axis=2) / allowed.sum(axis=2)
    share = jnp.repeat(rates, len(nll) // len(rates))[:, None]
    return (1 - share) * nll + share * spread


def replace_units(
    batch: Batch, keys: Key[jax.Array, " N"], rate: float | Float[jax.Array, "#N"], config: UnitLMConfig
) -> Batch:
    """Replace a fraction of the source units by random units, drawn with each member's key.

    Draws are made column by column, so that they do not depend on the padded length of the batch.

    Args:
      batch: member-major.
      keys: [N] random keys.
      rate: for all members, or [N].
      config: LM architecture.
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
    """Dropout on scores [B, K, O] with each member's key; draws do not depend on the padded K and O."""
    if low_rank.is_zero(rate):
        return scores
    rates = jnp.broadcast_to(jnp.asarray(rate, jnp.float32), keys.shape)
    members = scores.reshape(len(keys), -1, *scores.shape[1:])

    def one(key: jax.Array, rows: jax.Array, rate: jax.Array) -> jax.Array:
        kept = _by_column(
            lambda key, n: jax.random.bernoulli(key, 1 - rate, n), key, rows.shape[:0:-1] + rows.shape[:1]
        )
        return jnp.where(kept.T, rows / (1 - rate), 0)

    return jax.vmap(one)(keys, members, rates).reshape(scores.shape)


def _by_column(
    draw: Callable[[jax.Array, tuple[int, ...]], jax.Array], key: jax.Array, size: tuple[int, ...]
) -> jax.Array:
    """Draw random numbers of shape `size` with a separate key for each index of an axis, independent of padding."""
    if len(size) == 1:
        return draw(key, size)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(size[0]))
    return jax.vmap(lambda own: _by_column(draw, own, size[1:]))(keys)
