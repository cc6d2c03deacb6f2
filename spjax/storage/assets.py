"""What goes with the package and is loaded by name: "tiny", a unit LM and the k-means of its units (MFCC, 100)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from spjax.storage.files import StorageError

NAMES = ("tiny",)
ENCODERS = {"tiny": "mfcc"}  # whose features the k-means was fitted on
_ROOT = Path(__file__).resolve().parents[1] / "assets"
_KNOWN_BY = {"lm": "config.json", "kmeans": "card.json"}


def find(place: str | os.PathLike[str], kind: Literal["lm", "kmeans"]) -> str:
    """A place as given, or the directory of what goes with the package by that name.

    Raises:
      StorageError: a directory of the same name holds such a thing too.
    """
    name = os.fspath(place)
    if name not in NAMES:
        return name
    _check_alone(name, _KNOWN_BY[kind])
    return str(_ROOT / name / kind)


def find_encoder(encoder: str | os.PathLike[str], kmeans: str | os.PathLike[str] | None) -> tuple[str, str | None]:
    """Encoder and k-means as given, or those of what goes with the package; `encoder` "tiny" stands for both.

    Raises:
      ValueError: a named encoder with another k-means; StorageError (one of them) as `find`.
    """
    name, given = os.fspath(encoder), None if kmeans is None else find(kmeans, "kmeans")
    if name not in NAMES:
        return name, given
    _check_alone(name, "config.json")  # of a HuBERT
    own = find(name, "kmeans")
    if given not in (None, own):
        raise ValueError(
            f"encoder {name} has its own k-means, which {given} is not: leave the k-means out, or give the encoder "
            f"{ENCODERS[name]}"
        )
    return ENCODERS[name], own


def _check_alone(name: str, file: str) -> None:
    if (Path(name) / file).exists():
        raise StorageError(
            f"{name} is the name of what goes with spjax, but a directory {name} with a {file} is here too: write "
            f"./{name} for the directory, or rename it"
        )
