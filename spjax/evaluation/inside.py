"""Looking inside trained prompts: what a verbalizer listens for, how alike prompts are, which units decide.

Everything is a function of weights and units that returns arrays; `spjax.evaluation.inside_plots` draws them. Shape
letters: docs/design.md.
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
from spjax.evaluation import decode
from spjax.evaluation.markdown import cell, table
from spjax.models import low_rank, prompted_lm, prompts
from spjax.models.config import Compute, UnitLMConfig
from spjax.models.verbalizers import of_card
from spjax.storage.packs import PromptPack
from spjax.types import Batch, Params

STEPS = 32  # points of the path of integrated gradients
_MOST_COLUMNS = 4096  # of a batch on the way along it


def symbol(token: int) -> str:
    """What a token of the vocabulary is called: a unit's number, or a special's name."""
    return vocab.SPECIALS[token] if token < vocab.UNIT_OFFSET else str(token - vocab.UNIT_OFFSET)


def verbalizer_weights(pack: PromptPack) -> np.ndarray:
    """How much the logit of each token speaks for each class: float32 [C, V].

    Of a learnable verbalizer its matrix, less the mean over the labels of a slot: labels of a slot are weighed against
    each other by a softmax, which what they all have in common does not change. So a slot's rows sum to zero, and a
    single label has nothing but zeros. Of a rule verbalizer 1 for every token that spells the class.
    """
    verbalizer = of_card(pack.card["verbalizer"], pack.task)
    if not verbalizer.learnable:
        spelled = np.zeros((len(verbalizer.codes), pack.card["lm"]["vocab_size"]), np.float32)
        np.put_along_axis(spelled, verbalizer.codes, 1, axis=1)
        return spelled
    matrix = pack.params["verbalizer"][verbalizer.codes[:, 0]]
    slots = [matrix[a:b].astype(np.float64) for a, b in itertools.pairwise(verbalizer.slot_offsets)]
    return np.concatenate([rows - rows.mean(axis=0) for rows in slots]).astype(np.float32)


def top_tokens(weights: np.ndarray, count: int = 5) -> list[list[tuple[int, float]]]:
    """Of each class (row of [C, V]) the tokens that speak for it most, with their weights; none that do not."""
    order = np.argsort(-weights, axis=1, kind="stable")[:, :count]
    return [[(int(v), float(row[v])) for v in found if row[v] > 0] for row, found in zip(weights, order, strict=True)]


class Similarity(NamedTuple):
    """How alike the prompts of N packs are.

    Attributes:
      key: float32 [L, N, N], 0 to 1, 1 on the diagonal.
      value: likewise.
      chance: float32 [2, L], of keys and of values, what two prompts of random numbers have on average.
    """

    key: np.ndarray
    value: np.ndarray
    chance: np.ndarray


def prompt_similarity(lm: Params, packs: Sequence[PromptPack], draws: int = 8) -> Similarity:
    """How alike deep prompts are to the LM, layer by layer: linear CKA of the keys (values) that they become.

    A prompt's positions X = p W (after the layer's key or value projection, [P, D]) have no order and no partners in
    another prompt: no position is added to them and attention sums over them. So they are compared by their second
    moments, s(X, Y) = |X Y'|² / (|X X'| |Y Y'|) (Frobenius norms): linear centred kernel alignment (Kornblith et al.
    2019, "Similarity of Neural Network Representations Revisited", eq. 2 and section 3) with the D coordinates of the
    frozen LM's space as its paired examples, not centred since the origin of that space means something. It does not
    see the order of the positions, nor a rotation among them, nor a common factor; lengths may differ; directions
    count by their strength, where principal angles would give a faint one the say of a strong one. Biases are left out
    because they tell no prompts apart: a key's adds the same to every score of a query, which the softmax drops, and a
    value's adds itself to every mixture.

    Args:
      lm: the LM's weights (docs/design.md, Parameters).
      packs: N packs of that LM, with prompts in every layer.
      draws: random prompts, as long as the longest, that `chance` is taken from.

    Raises:
      ValueError: no packs, or one without prompts in every layer, or of length 0.
    """
    if not packs:
        raise ValueError("there are no packs to compare")
    for pack in packs:
        if "key" not in pack.params or not pack.params["key"].shape[1]:
            raise ValueError(
                f"the prompt of {pack.card['task']!r} is not in the layers: only deep prompts are compared"
            )
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
    """Linear CKA of each pair, float32 [L, N, N], of N arrays [L, P, D]."""
    sets = [np.asarray(one, np.float64) for one in prompts]
    moment = lambda x, y: np.square(x @ np.swapaxes(y, 1, 2)).sum(axis=(1, 2))  # noqa: E731
    own = np.stack([moment(x, x) for x in sets])
    found = np.ones((len(sets[0]), len(sets), len(sets)))
    for i, x in enumerate(sets):
        for j, y in enumerate(sets[:i]):
            found[:, i, j] = found[:, j, i] = moment(x, y) / np.maximum(np.sqrt(own[i] * own[j]), 1e-300)
    return found.astype(np.float32)


class Attribution(NamedTuple):
    """What each unit of an utterance did for an answer.

    Attributes:
      units: int [U], the utterance.
      classes: int [slots], the answer, a class id per slot.
      values: float32 [slots, U], what each unit added to the log odds of the slot's label.
      score: float32 [slots], log odds of each label against the others of its slot, given the labels before it.
      empty: float32 [slots], the same where no unit is told: `values` sum to the difference, up to `gap`.
    """

    units: np.ndarray
    classes: np.ndarray
    values: np.ndarray
    score: np.ndarray
    empty: np.ndarray

    @property
    def gap(self) -> float:
        """What the `values` of a slot miss or have too much, at worst, in log odds: 0 if the path was walked finely."""
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
    """Integrated gradients of an answer's log odds, from no units to the utterance's.

    (Sundararajan, Taly, Yan 2017, "Axiomatic Attribution for Deep Networks", eq. 1.) The path leads from embeddings of
    zero, with positions, prompt, separators (and of a multi-stream LM prosody) as they are, straight to the units'
    own. Points and weights are Gauss and Legendre's, which need few for a smooth way. Attributions of a slot sum to
    what the units changed in its log odds (completeness), up to the error of the sum: `Attribution.gap`. Odds and not
    probabilities, since those stop changing where an answer is sure. A label that takes several steps has the sum of
    its steps' log odds; a step that leaves no choice counts 0.

    Args:
      lm: the LM's weights (docs/design.md, Parameters).
      config: its architecture.
      pack: the prompt.
      utterance: a set of one utterance; its classes are not looked at. With streams for a multi-stream LM.
      classes: class id per slot, the answer to explain; by default the likeliest among those that the pack allows.
      steps: points on the path.
      compute: operand type; by default float32.

    Raises:
      ValueError: not one utterance with units, units that the LM does not know, or classes that are none.
    """
    verbalizer = of_card(pack.card["verbalizer"], pack.task)
    units = utterance.units.astype(np.int64)
    if len(utterance) != 1 or not len(units):
        raise ValueError(f"give one utterance with units, not {len(utterance)} of {len(units)} units")
    if units.min() < 0 or units.max() >= config.num_units:
        raise ValueError(f"units {units.min()}..{units.max()} must be in 0..{config.num_units - 1}")
    compute = Compute(compute.dtype if compute else "float32", remat=True)
    bank = low_rank.scaled(prompts.stack([pack.params]), pack.scale)
    bucket = max(32, 1 << (len(units) - 1).bit_length())  # few lengths, few programs
    if classes is None:
        one = loader.make_batch(utterance, np.zeros((1, 1)), bucket)
        card = {name: pack.card[name] for name in ("task", "slots", "metric", "verbalizer", "combinations")}  # type: ignore[literal-required]
        tree, score = _scorer(config, compute, json.dumps(card))
        classes = tree.combinations[np.asarray(score(lm, bank, one))[0].argmax()]
    classes = np.asarray(classes)
    starts, stops = np.asarray(verbalizer.slot_offsets[:-1]), np.asarray(verbalizer.slot_offsets[1:])
    if classes.shape != starts.shape or not ((classes >= starts) & (classes < stops)).all():
        raise ValueError(f"classes {classes.tolist()} are not one of each slot, which start at {starts.tolist()}")

    own = np.asarray(lm["embed"], np.float32)[np.pad(units + vocab.UNIT_OFFSET, (0, bucket - len(units)))]
    own[len(units) :] = 0
    nodes, shares = np.polynomial.legendre.leggauss(steps)
    points, weights = [0, 1, *(nodes + 1) / 2], [0, 0, *shares / 2]  # both ends are scored, and weigh nothing
    rows = max(1, min(16, _MOST_COLUMNS // bucket))
    total, scores = np.zeros((verbalizer.num_slots, bucket, own.shape[1])), []
    for start in range(0, len(points), rows):
        at, weight = (np.asarray(x[start : start + rows], np.float32) for x in (points, weights))
        filled = np.pad(at, (0, rows - len(at)))
        batch = loader.make_batch(utterance, np.zeros((1, rows)), bucket, np.zeros(rows, np.int32))
        said, slopes = _slopes(
            filled[:, None, None] * own, lm, bank, _by_place(batch, config), verbalizer.feeds[classes].reshape(-1),
            verbalizer.codes[classes].reshape(-1), verbalizer.allowed, config, compute, verbalizer.num_slots,
        )  # fmt: skip
        scores.append(np.asarray(said)[: len(at)])
        total += np.einsum("b,kbud->kud", weight, np.asarray(slopes, np.float64)[:, : len(at)])
    scored = np.concatenate(scores)
    values = (total * own).sum(axis=2)[:, : len(units)].astype(np.float32)
    return Attribution(units, classes, values, scored[1], scored[0])


@functools.lru_cache(maxsize=32)
def _scorer(config: UnitLMConfig, compute: Compute, card: str) -> tuple[decode.LabelTree, Callable[..., jax.Array]]:
    """What a card's labels look like, and the compiled function that scores them: made once for all calls."""
    told = json.loads(card)
    verbalizer = of_card(told["verbalizer"], PromptPack({}, told).task)
    tree = decode.label_tree(verbalizer, told["combinations"])
    return tree, jax.jit(functools.partial(decode.score, trees=[tree], config=config, compute=compute))


def _by_place(batch: Batch, config: UnitLMConfig) -> Batch:
    """The batch with each unit's token replaced by V + its place in [B, bucket]: a row of the embedding to itself."""
    rows, bucket = batch.source.shape
    place = config.vocab_size + np.arange(rows)[:, None] * bucket
    source = np.where(np.arange(bucket) > 0, place + np.arange(bucket) - 1, batch.source)  # column 0 is the opener
    return batch._replace(source=source.astype(np.int32), last=(place[:, 0] + batch.source_length - 1).astype(np.int32))


@functools.partial(jax.jit, static_argnames=("config", "compute", "slots"))
def _slopes(
    embedded: jax.Array,
    lm: Params,
    bank: Params,
    batch: Batch,
    feeds: jax.Array,
    codes: jax.Array,
    allowed: jax.Array,
    config: UnitLMConfig,
    compute: Compute,
    slots: int,
) -> tuple[jax.Array, jax.Array]:
    """Log odds of an answer's labels [B, slots], and their gradients by the units' rows, [slots, B, U, D].

    `embedded` [B, U, D] are those rows of the embedding; `feeds` and `codes` [K] spell the answer, `allowed`
    [K, outputs] what could be said instead.
    """

    lowest = jnp.finfo(jnp.float32).min
    spelled = jax.nn.one_hot(codes, allowed.shape[1], dtype=bool)

    def log_odds(embedded: jax.Array) -> jax.Array:
        # The units' rows stand behind the vocabulary's, where `_by_place` made the tokens point.
        table = jnp.concatenate([lm["embed"], embedded.reshape(-1, embedded.shape[-1])])
        fed = jnp.broadcast_to(feeds[:-1], (len(embedded), len(feeds) - 1))
        state = prompted_lm.run(
            {**lm, "embed": table}, bank, batch, fed, config=config, queries=len(codes), compute=compute
        )
        outputs = prompted_lm.outputs(lm, bank, state.hidden, batch.prompt_id, compute)
        against = jax.nn.logsumexp(jnp.where(allowed & ~spelled, outputs, lowest), axis=2)
        each = jnp.take_along_axis(outputs, codes[None, :, None], axis=2)[..., 0] - against
        each = jnp.where((allowed & ~spelled).any(axis=1), each, 0)
        return each.reshape(len(embedded), slots, -1).sum(axis=2)

    said, back = jax.vjp(log_odds, embedded)
    picks = [jnp.zeros_like(said).at[:, slot].set(1) for slot in range(slots)]
    return said, jnp.stack([back(pick)[0] for pick in picks])


def summary(
    packs: Mapping[str, PromptPack],
    similarity: tuple[Sequence[str], Similarity] | None = None,
    attributions: Sequence[tuple[str, str, Attribution]] = (),
    plots: Mapping[str, str] | None = None,
) -> str:
    """What was found, in Markdown.

    Args:
      packs: by name.
      similarity: names of the packs that were compared, and how alike they are.
      attributions: (pack, utterance, what was found) each.
      plots: files by what they show: "verbalizer/NAME", "similarity", "attribution/N" (in the order of the above).
    """
    plots = plots or {}
    drawn = lambda what: [f"![{what}]({plots[what]})", ""] if what in plots else []  # noqa: E731
    lines = ["# Inside the prompts", ""]
    for name, pack in packs.items():
        kind = pack.card["verbalizer"]["kind"]
        about = "units whose logits speak for it, against the slot's mean" if kind == "learnable" else "spelled"
        rows = []
        for (slot, label), top in zip(pack.task.classes, top_tokens(verbalizer_weights(pack)), strict=True):
            units = [f"`{symbol(token)}`" + (f" ({w:+.2f})" if kind == "learnable" else "") for token, w in top]
            rows.append([cell(slot), cell(label), ", ".join(units) or "–"])
        lines += [f"## {name}: {pack.card['task']}, {kind} verbalizer", "", *table(("slot", "label", about), rows), ""]
        lines += drawn(f"verbalizer/{name}")
    if similarity:
        names, alike = similarity
        mean = (alike.key.mean(axis=0) + alike.value.mean(axis=0)) / 2
        rows = [[name, *(f"{value:.3f}" for value in row)] for name, row in zip(names, mean, strict=True)]
        chance = f"Linear CKA, mean over layers, keys and values. Random prompts have {alike.chance.mean():.3f}."
        lines += ["## How alike the prompts are", "", chance, "", *table(("", *names), rows), "", *drawn("similarity")]
    for n, (name, said, found) in enumerate(attributions):
        rows = []
        for c, values, score, empty in zip(found.classes, found.values, found.score, found.empty, strict=True):
            most = np.argsort(-np.abs(values), kind="stable")[:5]
            by = ", ".join(f"unit {found.units[i]} at {i} ({values[i]:+.2f})" for i in most)
            slot, label = packs[name].task.classes[c]
            rows.append([cell(slot), cell(label), f"{score:+.2f}", f"{empty:+.2f}", by])
        lines += [f"## {said}, answered by {name}", ""]
        lines += table(("slot", "answer", "log odds", "without units", "units that moved them most"), rows)
        lines += ["", f"Attributions miss the change of the log odds by {found.gap:.2g} at most.", ""]
        lines += drawn(f"attribution/{n}")
    return "\n".join(lines)
