"""Interpret trained prompts: verbalizer weights, similarity of prompts, attribution to units.

Functions return arrays, which `spjax.evaluation.inside_plots` plots. Shape letters: docs/design.md.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spjax import vocab
from spjax.data import loader
from spjax.data.unit_set import UnitSet
from spjax.evaluation.markdown import cell, table
from spjax.io.packs import PromptPack
from spjax.models import decode, low_rank, prompted_lm, prompts
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.verbalizers import from_card
from spjax.types import Batch, Params

STEPS = 32  # points on the path of integrated gradients
_MAX_COLUMNS = 4096  # rows × columns of a batch of path points


def symbol(token: int) -> str:
    """Display name of a token: the number of a unit, or the name of a special."""
    return vocab.SPECIALS[token] if token < vocab.UNIT_OFFSET else str(token - vocab.UNIT_OFFSET)


def verbalizer_weights(pack: PromptPack) -> np.ndarray:
    """Weight of each token's logit for each class, float32 [C, V].

    For a learnable verbalizer, its matrix minus the mean over the labels of a slot, which does not change the softmax
    over the slot; so the rows of a slot sum to zero. For other verbalizers, 1 for the tokens of a class's code.
    """
    verbalizer = from_card(pack.card["verbalizer"], pack.task)
    if not verbalizer.learnable:
        one_hot = np.zeros((len(verbalizer.codes), pack.card["lm"]["vocab_size"]), np.float32)
        np.put_along_axis(one_hot, verbalizer.codes, 1, axis=1)
        return one_hot
    matrix = pack.params["verbalizer"][verbalizer.codes[:, 0]]
    slots = [matrix[a:b].astype(np.float64) for a, b in itertools.pairwise(verbalizer.slot_offsets)]
    return np.concatenate([rows - rows.mean(axis=0) for rows in slots]).astype(np.float32)


def top_tokens(weights: np.ndarray, count: int = 5) -> list[list[tuple[int, float]]]:
    """For each class (row of [C, V]) the tokens with the largest positive weights: (token, weight) each."""
    order = np.argsort(-weights, axis=1, kind="stable")[:, :count]
    return [[(int(v), float(row[v])) for v in found if row[v] > 0] for row, found in zip(weights, order, strict=True)]


class Similarity(NamedTuple):
    """Similarity of the prompts of N packs.

    Attributes:
      key: float32 [L, N, N] in 0..1, 1 on the diagonal.
      value: the same for values.
      chance: float32 [2, L], mean similarity of random keys and values.
    """

    key: np.ndarray
    value: np.ndarray
    chance: np.ndarray


def prompt_similarity(lm: Params, packs: Sequence[PromptPack], draws: int = 8) -> Similarity:
    """Layer-wise similarity of deep prompts: linear CKA of their projected keys and values.

    Prompt positions X = p W ([P, D], after the layer's key or value projection) are unordered, since they have no
    position embedding and attention sums over them. They are compared by second moments: s(X, Y) = |X Y'|² /
    (|X X'| |Y Y'|) with Frobenius norms. This is linear CKA (Kornblith et al. 2019, eq. 2 and section 3) with the D
    dimensions as examples, without centring, since the origin is meaningful. It is invariant to permutations and
    rotations of the positions and to scale; prompts may differ in length; directions are weighted by their strength,
    unlike in principal angles. Biases are omitted: a key bias adds a constant to all scores of a query, which the
    softmax ignores, and a value bias adds a constant to the output.

    Args:
      lm: LM weights (docs/design.md, Parameters).
      packs: N packs of that LM with deep prompts.
      draws: number of random prompts, of the longest prompt's length, for `chance`.

    Raises:
      ValueError: no packs, or a pack without a deep prompt.
    """
    if not packs:
        raise ValueError("there are no packs to compare")
    for pack in packs:
        if "key" not in pack.params or not pack.params["key"].shape[1]:
            raise ValueError(f"the pack of {pack.card['task']!r} has no deep prompt: only deep prompts can be compared")
    length = max(pack.params["key"].shape[1] for pack in packs)
    layers, _, dim = packs[0].params["key"].shape
    random = np.random.default_rng(0).normal(size=(draws, layers, length, dim)).astype(np.float32)
    compared, chance = {}, []
    for name in ("key", "value"):
        kernel = lm["layers"][name]["kernel"]
        compared[name] = _alike([_projected(pack.params[name], kernel) for pack in packs])
        drawn = _alike([_projected(one, kernel) for one in random])
        chance.append(drawn[:, ~np.eye(draws, dtype=bool)].mean(axis=1))
    return Similarity(compared["key"], compared["value"], np.asarray(chance, np.float32))


@jax.jit
def _projected(leaf: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum("lpd,lde->lpe", leaf, kernel, precision=jax.lax.Precision.HIGHEST)


def _alike(prompts: Sequence[jax.Array]) -> np.ndarray:
    """Linear CKA of all pairs of N arrays [L, P, D]: float32 [L, N, N]."""
    sets = [np.asarray(one, np.float64) for one in prompts]
    moment = lambda x, y: np.square(x @ np.swapaxes(y, 1, 2)).sum(axis=(1, 2))  # noqa: E731
    own = np.stack([moment(x, x) for x in sets])
    found = np.ones((len(sets[0]), len(sets), len(sets)))
    for i, x in enumerate(sets):
        for j, y in enumerate(sets[:i]):
            found[:, i, j] = found[:, j, i] = moment(x, y) / np.maximum(np.sqrt(own[i] * own[j]), 1e-300)
    return found.astype(np.float32)


class Attribution(NamedTuple):
    """Attribution of predicted labels to the units of an utterance.

    Attributes:
      units: int [U], the utterance.
      classes: int [slots], the explained class id of each slot.
      values: float32 [slots, U], contribution of each unit to the log odds of the slot's label.
      score: float32 [slots], log odds of each label against the others of its slot, given the labels before it.
      empty: float32 [slots], log odds with zero unit embeddings; `values` sum to `score - empty`, up to `gap`.
    """

    units: np.ndarray
    classes: np.ndarray
    values: np.ndarray
    score: np.ndarray
    empty: np.ndarray

    @property
    def gap(self) -> float:
        """Largest integration error of a slot, in log odds: |sum of `values` - (`score` - `empty`)|."""
        return float(np.abs(self.values.sum(axis=1) - (self.score - self.empty)).max())


def attribute(
    lm: Params,
    config: UnitLMConfig,
    pack: PromptPack,
    utterance: UnitSet,
    classes: Sequence[int] | np.ndarray | None = None,
    *,
    steps: int = STEPS,
    compute: Compute | None = None,
) -> Attribution:
    """Attribute the log odds of predicted labels to units by integrated gradients.

    (Sundararajan, Taly, Yan 2017, eq. 1.) The baseline has zero unit embeddings, with positions, prompt, separators and
    prosody unchanged. The straight path to the unit embeddings is integrated by Gauss-Legendre quadrature. The
    attributions of a slot sum to the change of its log odds (completeness), up to `Attribution.gap`. Log odds are used
    since probabilities saturate. A label of several steps has the sum of the log odds of its steps; steps without
    alternatives count 0.

    Args:
      lm: LM weights (docs/design.md, Parameters).
      config: LM architecture.
      pack: the prompt.
      utterance: a set of one utterance, with streams for a multi-stream LM; its classes are ignored.
      classes: int [slots], class ids to explain; by default the most likely combination that the pack allows.
      steps: number of points on the path.
      compute: operand dtype; by default float32.

    Raises:
      ValueError: not exactly one utterance with units, a unit outside the LM's vocabulary, or invalid classes.
    """
    verbalizer = from_card(pack.card["verbalizer"], pack.task)
    units = utterance.units.astype(np.int64)
    if len(utterance) != 1 or not len(units):
        raise ValueError(f"expected one utterance with units, got {len(utterance)} with {len(units)}")
    if units.min() < 0 or units.max() >= config.num_units:
        raise ValueError(f"units {units.min()}..{units.max()} must be in 0..{config.num_units - 1}")
    compute = Compute(compute.dtype if compute else "float32", remat=True)
    bank = low_rank.scaled(prompts.stack([pack.params]), pack.scale)
    bucket = max(32, 1 << (len(units) - 1).bit_length())  # powers of two, so that few programs are compiled
    if classes is None:
        one = loader.make_batch(utterance, np.zeros((1, 1)), bucket)
        card = {name: pack.card[name] for name in ("task", "slots", "metric", "verbalizer", "combinations")}  # type: ignore[literal-required]
        tree, score = _scorer(config, compute, json.dumps(card))
        classes = tree.combinations[np.asarray(score(lm, bank, one))[0].argmax()]
    classes = np.asarray(classes)
    starts, stops = np.asarray(verbalizer.slot_offsets[:-1]), np.asarray(verbalizer.slot_offsets[1:])
    if classes.shape != starts.shape or not ((classes >= starts) & (classes < stops)).all():
        raise ValueError(f"classes {classes.tolist()} must be one of each slot; the slots start at {starts.tolist()}")

    embeddings = np.asarray(lm["embed"], np.float32)[np.pad(units + vocab.UNIT_OFFSET, (0, bucket - len(units)))]
    embeddings[len(units) :] = 0
    nodes, shares = np.polynomial.legendre.leggauss(steps)
    points, weights = [0, 1, *(nodes + 1) / 2], [0, 0, *shares / 2]  # the endpoints are scored too, with weight 0
    rows = max(1, min(16, _MAX_COLUMNS // bucket))
    total, scores = np.zeros((verbalizer.num_slots, bucket, embeddings.shape[1])), []
    for start in range(0, len(points), rows):
        at, weight = (np.asarray(x[start : start + rows], np.float32) for x in (points, weights))
        filled = np.pad(at, (0, rows - len(at)))
        batch = loader.make_batch(utterance, np.zeros((1, rows)), bucket, np.zeros(rows, np.int32))
        log_odds, grads = _log_odds_and_grads(
            filled[:, None, None] * embeddings, lm, bank, _point_to_rows(batch, config),
            verbalizer.fed_back[classes].reshape(-1), verbalizer.codes[classes].reshape(-1), verbalizer.allowed,
            config, compute, verbalizer.num_slots,
        )  # fmt: skip
        scores.append(np.asarray(log_odds)[: len(at)])
        total += np.einsum("b,kbud->kud", weight, np.asarray(grads, np.float64)[:, : len(at)])
    scored = np.concatenate(scores)
    values = (total * embeddings).sum(axis=2)[:, : len(units)].astype(np.float32)
    return Attribution(units, classes, values, scored[1], scored[0])


@functools.lru_cache(maxsize=32)
def _scorer(config: UnitLMConfig, compute: Compute, card: str) -> tuple[decode.LabelTree, Callable[..., jax.Array]]:
    """Label tree of a card and its jitted scoring function, cached across calls."""
    fields = json.loads(card)
    verbalizer = from_card(fields["verbalizer"], PromptPack({}, fields).task)
    tree = decode.label_tree(verbalizer, fields["combinations"])
    return tree, jax.jit(functools.partial(decode.score, trees=[tree], config=config, compute=compute))


def _point_to_rows(batch: Batch, config: UnitLMConfig) -> Batch:
    """Replace each unit's token by V + its index in [B, bucket], so that each unit has a separate embedding row."""
    rows, bucket = batch.source.shape
    place = config.vocab_size + np.arange(rows)[:, None] * bucket
    source = np.where(
        np.arange(bucket) > 0, place + np.arange(bucket) - 1, batch.source
    )  # column 0 is the opening token
    return batch._replace(source=source.astype(np.int32), last=(place[:, 0] + batch.source_length - 1).astype(np.int32))


@functools.partial(jax.jit, static_argnames=("config", "compute", "slots"))
def _log_odds_and_grads(
    embedded: jax.Array,
    lm: Params,
    bank: Params,
    batch: Batch,
    fed_back: jax.Array,
    codes: jax.Array,
    allowed: jax.Array,
    config: UnitLMConfig,
    compute: Compute,
    slots: int,
) -> tuple[jax.Array, jax.Array]:
    """Log odds of labels [B, slots], and their gradients with respect to the unit embeddings, [slots, B, U, D].

    Args:
      embedded: [B, U, D], unit embeddings.
      fed_back, codes: int [K], tokens and outputs of the labels.
      allowed: bool [K, outputs], alternatives at each step.
    """

    lowest = jnp.finfo(jnp.float32).min
    label = jax.nn.one_hot(codes, allowed.shape[1], dtype=bool)

    def log_odds(embedded: jax.Array) -> jax.Array:
        # Rows of the units after those of the vocabulary, where the tokens of `_point_to_rows` point.
        table = jnp.concatenate([lm["embed"], embedded.reshape(-1, embedded.shape[-1])])
        fed = jnp.broadcast_to(fed_back[:-1], (len(embedded), len(fed_back) - 1))
        state = prompted_lm.run(
            {**lm, "embed": table}, bank, batch, fed, config=config, queries=len(codes), compute=compute
        )
        outputs = prompted_lm.outputs(lm, bank, state.hidden, batch.prompt_id, compute)
        against = jax.nn.logsumexp(jnp.where(allowed & ~label, outputs, lowest), axis=2)
        each = jnp.take_along_axis(outputs, codes[None, :, None], axis=2)[..., 0] - against
        each = jnp.where((allowed & ~label).any(axis=1), each, 0)
        return each.reshape(len(embedded), slots, -1).sum(axis=2)

    values, backward = jax.vjp(log_odds, embedded)
    cotangents = [jnp.zeros_like(values).at[:, slot].set(1) for slot in range(slots)]
    return values, jnp.stack([backward(cotangent)[0] for cotangent in cotangents])


def summary(
    packs: Mapping[str, PromptPack],
    similarity: tuple[Sequence[str], Similarity] | None = None,
    attributions: Sequence[tuple[str, str, Attribution]] = (),
    plots: Mapping[str, str] | None = None,
) -> str:
    """Render the results as Markdown.

    Args:
      packs: packs by name.
      similarity: names of the compared packs, and their similarity.
      attributions: (pack name, utterance name, attribution) each.
      plots: files by content: "verbalizer/NAME", "similarity", "attribution/N" (N: index in `attributions`).
    """
    plots = plots or {}
    drawn = lambda what: [f"![{what}]({plots[what]})", ""] if what in plots else []  # noqa: E731
    lines = ["# Inside the prompts", ""]
    for name, pack in packs.items():
        kind = pack.card["verbalizer"]["kind"]
        about = "units with the largest weights, minus the slot's mean" if kind == "learnable" else "encoded as"
        rows = []
        for (slot, label), top in zip(pack.task.classes, top_tokens(verbalizer_weights(pack)), strict=True):
            units = [f"`{symbol(token)}`" + (f" ({w:+.2f})" if kind == "learnable" else "") for token, w in top]
            rows.append([cell(slot), cell(label), ", ".join(units) or "–"])
        lines += [f"## {name}: {pack.card['task']}, {kind} verbalizer", "", *table(("slot", "label", about), rows), ""]
        lines += drawn(f"verbalizer/{name}")
    if similarity:
        names, found_similarity = similarity
        mean = (found_similarity.key.mean(axis=0) + found_similarity.value.mean(axis=0)) / 2
        rows = [[name, *(f"{value:.3f}" for value in row)] for name, row in zip(names, mean, strict=True)]
        chance = (
            f"Linear CKA, mean over layers, keys and values. Random prompts have {found_similarity.chance.mean():.3f}."
        )
        lines += ["## Similarity of the prompts", "", chance, "", *table(("", *names), rows), "", *drawn("similarity")]
    for n, (name, utterance, found) in enumerate(attributions):
        rows = []
        for c, values, score, empty in zip(found.classes, found.values, found.score, found.empty, strict=True):
            most = np.argsort(-np.abs(values), kind="stable")[:5]
            by = ", ".join(f"unit {found.units[i]} at {i} ({values[i]:+.2f})" for i in most)
            slot, label = packs[name].task.classes[c]
            rows.append([cell(slot), cell(label), f"{score:+.2f}", f"{empty:+.2f}", by])
        lines += [f"## {utterance}, predicted by {name}", ""]
        lines += table(("slot", "prediction", "log odds", "without units", "units with the largest attributions"), rows)
        lines += ["", f"Integration error: at most {found.gap:.2g} log odds.", ""]
        lines += drawn(f"attribution/{n}")
    return "\n".join(lines)
