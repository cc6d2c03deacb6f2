"""Classify utterances given as units: load a unit LM and a prompt pack, then `classify_units`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spjax.io import packs
from spjax.io.packs import PromptPack
from spjax.serving import scoring
from spjax.serving.load import UnitLM, load_prompt, load_unit_lm
from spjax.types import Encoded

__all__ = ["UnitLM", "classify_units", "load_prompt", "load_unit_lm"]


def classify_units(lm: UnitLM, pack: PromptPack, units: Sequence[Sequence[int] | Encoded]) -> list[dict[str, Any]]:
    """Classify utterances given as merged units.

    Args:
      lm: the unit LM, or multi-stream LM, that the pack was trained with.
      pack: a prompt pack.
      units: for each utterance, its units (at least one, each from 0 to the LM's number of units - 1); or what
        `spjax.encode` returns, with f0 for a multi-stream LM.

    Returns:
      For each utterance `{"labels": {slot: label}, "probabilities": {slot: {label: probability}}}`. The labels are the
      most probable combination that occurs in training (any combination, if the pack does not list them).

    Raises:
      StorageError: the pack belongs to another LM.
      ValueError: an utterance without units, or without prosody for a multi-stream LM, or a unit outside the LM's
        vocabulary.
    """
    packs.check_pack(pack, lm.hash, lm.config)
    if not len(units):
        return []
    name = pack.card["task"]
    banks = scoring.make_banks(lm.config, lm.params, "float32", {name: pack})
    split = scoring.unit_set(units, lm.config)
    return [answers[name] for answers in scoring.answer(lm.params, banks, split, [(name,)] * len(units))]
