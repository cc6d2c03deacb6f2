"""Checks that packs, an encoder and records use the same units."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from spjax.encoders.encoder import Encoder
from spjax.io import StorageError
from spjax.io.packs import PromptPack
from spjax.models.config import UnitLMConfig


def same_units(packs: Mapping[str, PromptPack], encoder: Encoder | None, config: UnitLMConfig) -> bool:
    """Check that all packs and the encoder use the same units; return whether units are merged.

    Raises:
      StorageError: a pack of other units.
      ValueError: an encoder without k-means, or with more units than the LM has.
    """
    known: dict[str, Any] = {}
    for name, pack in packs.items():
        origin = unit_source(pack.card)
        check_units(f"prompt pack {name!r}", origin, "the packs before it", known, "Load them separately.")
        known = origin | known
    merged = known.get("merged", True)
    if encoder is None:
        return merged
    if encoder.kmeans is None:
        raise ValueError(f"encoder {encoder.name} has no k-means, so it gives no units: give kmeans=DIR (--kmeans=DIR)")
    ours = {"encoder": encoder.name, "layer": encoder.layer or 0, "kmeans": encoder.kmeans.id}
    fix = "Give the encoder and k-means that it was trained with, or train a prompt on these units."
    for name, pack in packs.items():
        check_units(f"prompt pack {name!r}", unit_source(pack.card), "this encoder", ours, fix)
    if len(encoder.kmeans.centroids) > config.num_units:
        raise ValueError(
            f"the k-means has {len(encoder.kmeans.centroids)} units, the LM {config.num_units}: give the k-means "
            "that the LM's units were made with"
        )
    return merged


def unit_source(card: Any) -> dict[str, Any]:
    """The encoder, layer, k-means and merging of a card's units; unknown ones are left out."""
    known = {name: card[name] for name in ("encoder", "layer", "kmeans", "merged") if card[name] is not None}
    return known | ({"layer": known.get("layer", 0)} if "encoder" in known else {})  # 0: an encoder without layers


def check_units(what: str, theirs: Mapping[str, Any], other: str, ours: Mapping[str, Any], fix: str) -> None:
    """Refuse units that were made differently. Fields that either side lacks are not compared.

    A k-means known by a name ("km100", in imported unit text) cannot be compared with one known by its id.

    Args:
      what: description of the first units' source, for the message.
      theirs: from `unit_source`.
      other: description of the second units' source.
      ours: from `unit_source`.
      fix: the message's second sentence.

    Raises:
      StorageError: they differ.
    """
    by_id = [bool(re.fullmatch("[0-9a-f]{12}", str(side.get("kmeans")))) for side in (theirs, ours)]
    both = [name for name in theirs if name in ours and (name != "kmeans" or by_id[0] == by_id[1])]
    differing = [name for name in both if theirs[name] != ours[name]]
    if differing:
        sides = [", ".join(f"{name} {side[name]}" for name in differing) for side in (theirs, ours)]
        raise StorageError(f"{what} uses units of {sides[0]}, {other} of {sides[1]}. {fix}")
