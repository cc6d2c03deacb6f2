"""A k-means on disk: `card.json` and `centroids.safetensors` (docs/design.md, Speech to units)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from spjax.io import assets, files, places
from spjax.io.files import StorageError

FORMAT = "spjax-kmeans"
VERSION = 2  # since 2 the card has a hash
FREE = ("fitted_on", "provenance")  # fields of the card that do not affect the units and are not hashed
CARD_FILE = "card.json"
TENSOR_FILE = "centroids.safetensors"
FILES = (CARD_FILE, TENSOR_FILE)

_DESCRIBED = ("encoder", "layer", "fitted_on", "provenance")  # keys of `KMeans.card`
_REQUIRED = ("encoder", "layer", "clusters", "dim", "hash")


@dataclasses.dataclass(frozen=True, eq=False)
class KMeans:
    """Centroids that quantise an encoder's features to units.

    Attributes:
      centroids: float32 [C, D]; row i is the centre of unit i.
      card: "encoder" (its name), "layer" (None of encoders without weights), "fitted_on" (any JSON: corpus,
        frames, seed) and "provenance" (any JSON: the file it was imported from).
    """

    centroids: np.ndarray
    card: dict[str, Any]

    def __post_init__(self) -> None:
        shape, dtype = np.shape(self.centroids), getattr(self.centroids, "dtype", None)
        if len(shape) != 2 or 0 in shape or dtype != np.float32:
            raise ValueError(f"centroids must be float32 [C, D], not {dtype} {list(shape)}")

    @property
    def hash(self) -> str:
        """sha256 (hex) of the centroids."""
        return files.tree_hash({"centroids": self.centroids})

    @property
    def id(self) -> str:
        """The first 12 hex digits of `hash`, as stored in unit records."""
        return self.hash[:12]


def _check_card(card: dict[str, Any], where: str | Path, fix: str) -> None:
    encoder, layer = card.get("encoder"), card.get("layer")
    if not isinstance(encoder, str) or not encoder:
        raise StorageError(f"{where}: encoder is {encoder!r:.80}, must be the encoder's name. {fix}")
    if layer is not None and (type(layer) is not int or layer < 1):
        raise StorageError(f"{where}: layer is {layer!r:.80}, must be 1 or more, or null. {fix}")
    for name in ("fitted_on", "provenance"):
        if not isinstance(card.get(name, {}), dict):
            raise StorageError(f"{where}: {name} is {card[name]!r:.80}, must be an object. {fix}")


def save_kmeans(directory: str | Path, kmeans: KMeans) -> str:
    """Writes a k-means, atomically; an existing one is replaced.

    Args:
      directory: target; parents are created.
      kmeans: its card has "encoder" and, where known, "layer", "fitted_on" and "provenance".

    Returns:
      Its hash.

    Raises:
      StorageError: a card with other keys or values, NaN or infinite centroids, or a directory that holds other files.
    """
    card = kmeans.card
    fix = 'Give {"encoder": NAME, "layer": NUMBER or None, "fitted_on": {}, "provenance": {}}.'
    unknown = sorted(map(str, card.keys() - set(_DESCRIBED)))
    if unknown:
        raise StorageError(f"k-means to save: its card has unknown {', '.join(unknown)}. {fix}")
    _check_card(card, "k-means to save", fix)
    identity = kmeans.hash
    clusters, dim = kmeans.centroids.shape
    described: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "encoder": card["encoder"],
        "layer": card.get("layer"),
        "clusters": clusters,
        "dim": dim,
        "hash": identity,
        "fitted_on": dict(card.get("fitted_on", {})),
        "provenance": dict(card.get("provenance", {})),
    }
    described[files.SEAL] = files.seal(described, FREE)
    tensors = files.tensor_writer({"centroids": kmeans.centroids})
    files.write_directory(directory, {CARD_FILE: files.json_writer(described), TENSOR_FILE: tensors}, CARD_FILE)
    return identity


def load_kmeans(directory: str | Path) -> KMeans:
    """Reads a k-means and checks its centroids against the sizes and the hash in card.json.

    Args:
      directory: written by `save_kmeans`; or "tiny", the bundled one.

    Raises:
      StorageError: missing, truncated, altered or newer files, or centroids that do not match the card.
    """
    directory = places.at(assets.find(directory, "kmeans"))
    path, fix = directory / CARD_FILE, "Take it from its source again."
    described = files.read_json(path, FORMAT, VERSION)
    sealed = (files.SEAL,) if described["version"] >= VERSION else ()
    files.check_keys(described, (*_REQUIRED, *sealed), _DESCRIBED, path, fix)
    _check_card(described, path, fix)
    shape = (described["clusters"], described["dim"])
    if any(type(size) is not int or size < 1 for size in shape):
        raise StorageError(f"{path}: clusters and dim are {shape!r:.80}, must be positive numbers. {fix}")
    tensors = files.read_tensors(directory / TENSOR_FILE, lambda _: {"centroids": shape})
    kmeans = KMeans(
        tensors["centroids"],
        {
            "encoder": described["encoder"],
            "layer": described["layer"],
            "fitted_on": described.get("fitted_on", {}),
            "provenance": described.get("provenance", {}),
        },
    )
    if kmeans.hash != described["hash"]:
        raise StorageError(
            f"{directory / TENSOR_FILE} has the hash {kmeans.hash}, but {path} says {described['hash']!r:.80}: "
            "one of the two was altered. Take both from their source again."
        )
    files.check_seal(described, FREE, VERSION, path)
    return kmeans
