"""What prompts are trained to lower. Rows of a batch are member-major: [N * b] rows, b of each member of the bank."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spjax import vocab
from spjax.models import prompted_lm, prompts
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.verbalizers import Verbalizer
from spjax.types import Batch, Params, Rows

NEVER = -1e9  # score of what may not be said; finite, so that no row can make NaN of it


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss of prompt tuning.

    Attributes:
      kind: "slots": cross-entropy of each label among the labels of its slot, mean over an utterance's label steps and
        over utterances. "reference": negative log likelihood of separator, labels and end over all outputs, summed,
        divided by all target tokens, units included (FACTS.md, Loss and optimiser).
      noise: share of the source units replaced by a random unit while training.
    """

    kind: str = "slots"
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("slots", "reference"):
            raise ValueError(f"loss: kind is {self.kind!r}, must be slots or reference")
        if not 0 <= self.noise < 1:
            raise ValueError(f"loss: noise is {self.noise}, must lie in [0, 1)")


def spell(table: np.ndarray, classes: Rows) -> jax.Array:
    """Class ids [B, slots] by a verbalizer's `codes` or `feeds` [C, M]: int32 [B, K]."""
    return jnp.asarray(table)[classes].reshape(classes.shape[0], -1)


def member_losses(
    lm: Params,
    bank: Params,
    batch: Batch,
    keys: jax.Array | None,
    *,
    loss: LossConfig,
    prompt: prompts.PromptConfig,
    verbalizer: Verbalizer,
    config: UnitLMConfig,
    compute: Compute,
) -> jax.Array:
    """Each member's loss on its rows, float32 [N].

    Args:
      lm: the LM's weights.
      bank: prompt trees [N, ...].
      batch: N * b rows, member-major.
      keys: [N] random keys of this step for dropout and noise; None measures without either.
      loss: which loss.
      prompt: dropout rates.
      verbalizer: classes to outputs.
      config: the LM's architecture.
      compute: operand type and remat.
    """
    if keys is not None:
        drop_key, noise_key, out_key = (jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in range(3))
        bank = prompts.dropout(bank, prompt, drop_key)
        batch = replace_units(batch, noise_key, loss.noise, config)
    targets = spell(verbalizer.codes, batch.classes)
    feeds = spell(verbalizer.feeds, batch.classes)
    whole = loss.kind == "reference"
    if whole:
        queries = verbalizer.steps + 2  # the last unit, the separator and every label
        edges = jnp.full((len(targets), 1), 0, jnp.int32)
        targets = jnp.concatenate([edges + vocab.BOS, targets, edges + vocab.EOS], axis=1)
    else:
        queries, feeds = verbalizer.steps, feeds[:, :-1]
    state = prompted_lm.run(lm, bank, batch, feeds, config=config, queries=queries, compute=compute)
    scores = prompted_lm.outputs(lm, bank, state.hidden, batch.prompt_id, compute)
    if keys is not None and verbalizer.learnable:
        scores = _drop_outputs(scores, out_key, prompt.verbalizer_dropout)
    if not whole:
        scores = jnp.where(verbalizer.allowed, scores, NEVER)
    nll = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
    size = batch.source_length + verbalizer.steps + 2 if whole else jnp.full(len(nll), verbalizer.steps)
    # A row that fills the shape has classes of no slot: its loss is huge, and must not be multiplied by 0.
    rows = jnp.where(batch.weight > 0, jnp.stack([nll.sum(axis=1), size]), 0)
    total, count = rows.reshape(2, len(bank["sep"]), -1).sum(axis=2)
    return total / jnp.maximum(count, 1)


def replace_units(batch: Batch, keys: jax.Array, rate: float, config: UnitLMConfig) -> Batch:
    """The batch with a share of its source units replaced by random ones, drawn from each member's own key."""
    if not rate:
        return batch
    source = batch.source.reshape(len(keys), -1, batch.source.shape[1])

    def one(key: jax.Array, rows: jax.Array) -> jax.Array:
        hit = jax.random.bernoulli(jax.random.fold_in(key, 0), rate, rows.shape) & (rows >= vocab.UNIT_OFFSET)
        unit = jax.random.randint(jax.random.fold_in(key, 1), rows.shape, vocab.UNIT_OFFSET, config.vocab_size)
        return jnp.where(hit, unit, rows)

    return batch._replace(source=jax.vmap(one)(keys, source).reshape(batch.source.shape))


def _drop_outputs(scores: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
    if not rate:
        return scores
    members = scores.reshape(len(keys), -1, *scores.shape[1:])
    kept = jax.vmap(lambda key, x: jax.random.bernoulli(key, 1 - rate, x.shape))(keys, members)
    return jnp.where(kept, members / (1 - rate), 0).reshape(scores.shape)
