"""Checks that packs, an encoder and records use the same units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spjax.encoders.encoder import Encoder
from spjax.io.packs import PromptPack, check_units, unit_source
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
