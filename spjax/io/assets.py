"""Assets that ship with the package, loaded by name: "tiny" is a unit LM and its k-means (MFCC, 100 clusters)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from spjax.io.files import StorageError

NAMES = ("tiny",)
ENCODERS = {"tiny": "mfcc"}  # the encoder whose features the k-means was fitted on
_ROOT = Path(__file__).resolve().parents[1] / "assets"
_CARD_FILES = {"lm": "config.json", "kmeans": "card.json"}


def find(place: str | os.PathLike[str], kind: Literal["lm", "kmeans"]) -> str:
    """Resolves the name of a bundled asset to its directory; any other path is returned unchanged.

    Raises:
      StorageError: a directory in the working directory has the asset's name and holds such an asset too.
    """
    name = os.fspath(place)
    if name not in NAMES:
        return name
    _check_unambiguous(name, _CARD_FILES[kind])
    return str(_ROOT / name / kind)


def find_encoder(encoder: str | os.PathLike[str], kmeans: str | os.PathLike[str] | None) -> tuple[str, str | None]:
    """Resolves an encoder and its k-means; the bundled encoder "tiny" brings its k-means.

    Returns:
      Encoder name or directory; k-means directory, or None if none was given and the encoder is not a bundled one.

    Raises:
      ValueError: a bundled encoder with another k-means.
      StorageError: as `find`.
    """
    name, given = os.fspath(encoder), None if kmeans is None else find(kmeans, "kmeans")
    if name not in NAMES:
        return name, given
    _check_unambiguous(name, "config.json")  # the card of a HuBERT
    bundled = find(name, "kmeans")
    if given not in (None, bundled):
        raise ValueError(
            f"encoder {name} has its own k-means, which {given} is not: leave the k-means out, or give the encoder "
            f"{ENCODERS[name]}"
        )
    return ENCODERS[name], bundled


def _check_unambiguous(name: str, file: str) -> None:
    if (Path(name) / file).exists():
        raise StorageError(
            f"{name} is the name of a bundled asset, but the directory {name} here holds a {file} too: write "
            f"./{name} for the directory, or rename it"
        )
