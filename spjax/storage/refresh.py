"""Brings directories of older versions to the present one, in which a hash covers all that decides an answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spjax.storage import banks, files, huberts, kinds, kmeans_store, packs, places, unit_lms
from spjax.storage.files import StorageError


def _pack(path: Path, _: dict[str, Any]) -> dict[str, Any]:
    return dict(packs.load_pack(path.parent).card)


def _bank(path: Path, described: dict[str, Any]) -> dict[str, Any]:
    members = {name: pack.card for name, pack in banks.load_bank(path.parent).items()}
    return banks.describe(members)


def _unit_lm(path: Path, described: dict[str, Any]) -> dict[str, Any]:
    unit_lms.read_unit_lm(path.parent)
    return _sealed(described, unit_lms)


def _hubert(path: Path, described: dict[str, Any]) -> dict[str, Any]:
    huberts.load_hubert(path.parent)
    return _sealed(described, huberts)


def _kmeans(path: Path, described: dict[str, Any]) -> dict[str, Any]:
    kmeans_store.load_kmeans(path.parent)
    return _sealed(described, kmeans_store)


def _sealed(described: dict[str, Any], store: Any) -> dict[str, Any]:
    return {**described, "version": store.VERSION, files.SEAL: files.seal(described, store.FREE)}


_KINDS: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    packs.FORMAT: _pack,
    banks.FORMAT: _bank,
    unit_lms.FORMAT: _unit_lm,
    huberts.FORMAT: _hubert,
    kmeans_store.FORMAT: _kmeans,
}


@places.plainly()
def refresh(directory: str | Path) -> Path:
    """Writes the card of a pack, bank, unit LM, HuBERT or k-means anew, with its hash; nothing else changes.

    Returns:
      The card's path.

    Raises:
      StorageError: no such directory, or one that its loader refuses: what was altered stays refused.
    """
    place = places.at(directory)
    for name in (packs.CARD_FILE, banks.CARD_FILE, unit_lms.CONFIG_FILE):
        path = place / name
        try:
            described = kinds.load_json(path) if path.is_file() else None
        except (OSError, ValueError) as error:
            raise StorageError(f"{path} is no readable JSON ({error}). Take it from its source again.") from error
        if isinstance(described, dict) and described.get("format") in _KINDS:
            made = _KINDS[described["format"]](path, described)
            files.write_file(path, files.json_bytes(made))
            return path
    if not place.exists():
        raise StorageError(f"{place} does not exist. Give a pack, bank, unit LM, HuBERT or k-means.")
    what, todo = kinds.describe(place)
    raise StorageError(
        f"{place} is {what or 'not a directory of spjax'}: there is no card to refresh. "
        f"{todo or 'Give a pack, bank, unit LM, HuBERT or k-means.'}"
    )
