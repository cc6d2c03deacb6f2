"""The Python API for units: load a unit LM and a prompt pack, classify utterances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spjax.serving import scoring
from spjax.serving.load import UnitLM, load_prompt, load_unit_lm
from spjax.storage import packs
from spjax.storage.packs import PromptPack
from spjax.types import Encoded

__all__ = ["UnitLM", "classify_units", "load_prompt", "load_unit_lm"]


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
    name = pack.card["task"]
    banks = scoring.make_banks(lm.config, lm.params, "float32", {name: pack})
    split = scoring.unit_set(units, lm.config)
    return [answers[name] for answers in scoring.answer(lm.params, banks, split, [(name,)] * len(units))]
