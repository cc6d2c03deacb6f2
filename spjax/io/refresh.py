"""Adds the hash of the current format to cards of directories that older versions wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spjax.io import banks, encoders, files, kinds, kmeans_store, pack_card, packs, places, unit_lms
from spjax.io.files import StorageError

# format → loader that checks such a directory, unhashed fields of its card, first version with a hash
_LOADERS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...], int]] = {
    unit_lms.FORMAT: (unit_lms.read_unit_lm, unit_lms.FREE, unit_lms.SEALED),
    **dict.fromkeys(encoders.KINDS, (encoders.read_encoder, encoders.FREE, encoders.SEALED)),
    kmeans_store.FORMAT: (kmeans_store.load_kmeans, kmeans_store.FREE, kmeans_store.VERSION),
}


def _refreshed(place: Path, described: dict[str, Any]) -> dict[str, Any]:
    """Returns the card in the current version, after loading the directory to check it."""
    if described["format"] == pack_card.FORMAT:
        return dict(packs.load_pack(place).card)
    if described["format"] == banks.FORMAT:
        return banks.describe({name: pack.card for name, pack in banks.load_bank(place).items()})
    load, free, version = _LOADERS[described["format"]]
    load(place)
    return {**described, "version": max(described["version"], version), files.SEAL: files.seal(described, free)}


@places.translate_bucket_errors()
def refresh(directory: str | Path) -> Path:
    """Rewrites the card of a pack, bank, unit LM, encoder or k-means with its hash; nothing else changes.

    Returns:
      Path of the card.

    Raises:
      StorageError: no such directory, or one that its loader refuses (an altered one is not accepted by this).
    """
    place = places.at(directory)
    for name in (packs.CARD_FILE, banks.CARD_FILE, unit_lms.CONFIG_FILE):
        path = place / name
        try:
            described = kinds.load_json(path) if path.is_file() else None
        except (OSError, ValueError) as error:
            raise StorageError(f"{path} is not valid JSON ({error}). Take it from its source again.") from error
        if isinstance(described, dict) and described.get("format") in (pack_card.FORMAT, banks.FORMAT, *_LOADERS):
            files.write_file(path, files.json_bytes(_refreshed(place, described)))
            return path
    if not place.exists():
        raise StorageError(f"{place} does not exist. Give a pack, bank, unit LM, encoder or k-means.")
    what, todo = kinds.describe(place)
    raise StorageError(
        f"{place} is {what or 'not a directory of spjax'}: there is no card to refresh. "
        f"{todo or 'Give a pack, bank, unit LM, encoder or k-means.'}"
    )
