"""The Python API: load a unit LM and a prompt pack, classify utterances given as units."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spjax.data import loader
from spjax.data import plan as planning
from spjax.data.unit_set import UnitSet
from spjax.evaluation import decode
from spjax.models import prompts, unit_lm
from spjax.models.config import UnitLMConfig
from spjax.models.verbalizers import of_card
from spjax.storage import packs, unit_lms
from spjax.storage.packs import PromptPack
from spjax.tasks import Slot, Task
from spjax.types import Encoded, Params, Streams

MAX_TOKENS = 8192  # source columns of a batch


@dataclasses.dataclass(frozen=True, eq=False)
class UnitLM:
    """A unit LM in memory.

    Attributes:
      config: its architecture.
      params: its weights (docs/design.md, Parameters), float32.
      hash: what prompt packs are bound to.
    """

    config: UnitLMConfig
    params: Params
    hash: str

    def logits(self, tokens: Any, streams: Streams | None = None) -> np.ndarray:
        """Logits over the vocabulary: int [B, T] tokens, right-padded with 1, to float32 [B, T, V].

        Args:
          tokens: a sequence each.
          streams: [B, T] each, for a multi-stream LM; they lag a column (docs/design.md, Prosody).

        Raises:
          ValueError: not [B, T], a token outside the vocabulary, or a multi-stream LM without streams.
        """
        try:
            tokens = np.asarray(tokens)
        except ValueError as error:
            raise ValueError("tokens must be int [B, T]: rows differ in length, pad them with 1") from error
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be int [B, T], not {tokens.dtype} {list(tokens.shape)}")
        if not tokens.size:
            return np.zeros((*tokens.shape, self.config.vocab_size), np.float32)
        if not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise ValueError(
                f"tokens lie in {tokens.min()}..{tokens.max()}, must be in 0..{self.config.vocab_size - 1}"
            )
        if streams is not None and any(np.shape(one) != tokens.shape for one in streams):
            raise ValueError(f"streams must be {list(tokens.shape)} each, as the tokens")
        return np.asarray(_logits(self.params, self.config, jnp.asarray(tokens), streams=streams))


_logits = jax.jit(unit_lm.logits, static_argnums=1)


def load_unit_lm(path: str | os.PathLike[str]) -> UnitLM:
    """Read a unit LM's directory (`python -m spjax.convert unit_lm`, or pretraining, writes one).

    Raises:
      StorageError: damaged, incomplete or of a newer format.
    """
    config, params, info = unit_lms.read_unit_lm(os.fspath(path))
    return UnitLM(config, jax.tree.map(jnp.asarray, params), info["hash"])  # on the device once, not at every call


def load_prompt(path: str | os.PathLike[str]) -> PromptPack:
    """Read a prompt pack's directory: `.params` and `.card`.

    Raises:
      StorageError: damaged, incomplete or of a newer format.
    """
    return packs.load_pack(os.fspath(path))


@functools.lru_cache(maxsize=32)
def _scorer(config: UnitLMConfig, card: str) -> tuple[decode.LabelTree, Any]:
    """What a card's labels look like, and the compiled function that scores them: made once for all calls."""
    slots, described, combinations = json.loads(card)
    verbalizer = of_card(described, Task("", tuple(Slot(slot["name"], tuple(slot["labels"])) for slot in slots)))
    tree = decode.label_tree(verbalizer, combinations)
    return tree, jax.jit(functools.partial(decode.score, trees=[tree], config=config))


def _edges(longest: int) -> tuple[int, ...]:
    """Bucket lengths that are the same at every call, so that few programs are compiled: each half as long again."""
    edges = [16]
    while edges[-1] < longest:
        edges.append(edges[-1] * 3 // 2 // 8 * 8)
    return tuple(edges)


def _unit_set(units: Sequence[Any], config: UnitLMConfig, slots: int) -> UnitSet:
    """The utterances to classify, each checked; their classes are not known.

    Raises:
      ValueError: as `classify_units`.
    """
    rows = []
    for i, utterance in enumerate(units):
        said = utterance.units if isinstance(utterance, Encoded) else utterance
        try:
            row = np.asarray(said)
        except ValueError:  # lists of different lengths
            row = np.empty(0)
        if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"utterance {i} must be a list of at least one unit, not {said!r}")
        if row.min() < 0 or row.max() >= config.num_units:
            raise ValueError(
                f"utterance {i} has units {row.min()}..{row.max()}, the LM knows 0..{config.num_units - 1}"
            )
        rows.append(row)
    unknown = np.zeros((len(rows), slots), np.int32)
    if config.prosody is None:
        return UnitSet.of(rows, unknown)
    for i, (utterance, row) in enumerate(zip(units, rows, strict=True)):
        if not isinstance(utterance, Encoded) or utterance.f0 is None:
            raise ValueError(
                f"utterance {i} has no f0, which a multi-stream LM wants: give encode(audio, encoder, f0=True)"
            )
        shapes = {np.shape(utterance.durations), np.shape(utterance.f0)}
        if shapes != {row.shape} or not np.isfinite(utterance.f0).all() or np.min(utterance.durations) < 0:
            raise ValueError(
                f"utterance {i} has {len(row)} units, durations {list(np.shape(utterance.durations))} and f0 "
                f"{list(np.shape(utterance.f0))}: give a number for each unit, no duration below 0, f0 finite"
            )
    durations, f0 = ([getattr(utterance, name) for utterance in units] for name in ("durations", "f0"))
    split = UnitSet.of(rows, unknown, durations=durations, f0=f0)
    return split.with_interpolated_f0() if config.prosody.interpolate_f0 else split


def classify_units(lm: UnitLM, pack: PromptPack, units: Sequence[Sequence[int] | Encoded]) -> list[dict[str, Any]]:
    """Classify utterances given as merged units.

    Args:
      lm: the unit LM, or multi-stream LM, that the pack was trained with.
      pack: a prompt pack.
      units: an utterance's units each, at least one, in 0 .. 99; or what `spjax.encode` returns, with f0 for a
        multi-stream LM.

    Returns:
      For each utterance `{"labels": {slot: label}, "probabilities": {slot: {label: probability}}}`. The labels are the
      likeliest combination that training saw (any combination, if the pack does not say).

    Raises:
      StorageError: the pack belongs to another LM.
      ValueError: an utterance without units, or without prosody for a multi-stream LM, or a unit that the LM does not
        know.
    """
    packs.check_pack(pack, lm.hash, lm.config)
    if not len(units):
        return []
    card = pack.card
    task = pack.task
    tree, answer = _scorer(lm.config, json.dumps([card["slots"], card["verbalizer"], card["combinations"]]))
    split = _unit_set(units, lm.config, len(task.slots))
    edges = _edges(int(split.lengths.max()))
    rows = min(64, 1 << (len(units) - 1).bit_length())
    steps = planning.plan(
        split.lengths, seed=0, epoch=0, buckets=edges, shuffle=False, max_rows=rows, row_multiple=1,
        max_tokens=max(MAX_TOKENS, edges[-1]),
    )  # fmt: skip
    bank = prompts.stack([pack.params])
    log_probs = np.zeros((len(units), len(tree.combinations)), np.float32)
    for batch in loader.batches(split, steps):
        real = batch.index >= 0
        log_probs[batch.index[real]] = np.asarray(answer(lm.params, bank, jax.tree.map(jnp.asarray, batch)))[real]
    said = tree.combinations[log_probs.argmax(axis=1)] - np.asarray(task.slot_offsets[:-1])
    by_slot = decode.slot_probabilities(log_probs, tree, task.slot_offsets)
    return [
        {
            "labels": {slot.name: slot.labels[said[i, k]] for k, slot in enumerate(task.slots)},
            "probabilities": {
                slot.name: dict(zip(slot.labels, by_slot[k][i].tolist(), strict=True))
                for k, slot in enumerate(task.slots)
            },
        }
        for i in range(len(units))
    ]
