"""A prompt pack on disk: `card.json` and `prompt.safetensors`, a trained prompt with all that is needed to use it.

`README.md` is generated from the card for readers and the Hugging Face hub; it is never read back.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spjax.io import files, hub, kinds, pack_card, pack_readme, places
from spjax.io.files import StorageError
from spjax.io.pack_card import PackCard
from spjax.models.config import SIZES, UnitLMConfig
from spjax.models.prompts import shape_of
from spjax.tasks import Task
from spjax.types import Params

CARD_FILE = "card.json"
TENSOR_FILE = "prompt.safetensors"


@dataclasses.dataclass(frozen=True)
class PromptPack:
    """A trained prompt and its card.

    Attributes:
      params: tree of numpy float32 arrays: `key` and `value` [L, P, D] (deep) or `input` [P, D] (shallow), `sep` [S,
        D], optionally `sep_deep` [L, S, D] and, for a learnable verbalizer, `verbalizer` [outputs, V]. Low-rank
        adapters are `TARGET_a` [L, r, in] and `TARGET_b` [L, r, out] of each target, with or without prompts.
      card: see PackCard.
    """

    params: Params
    card: PackCard

    @property
    def task(self) -> Task:
        """The task: slots, labels and metric."""
        return pack_card.task_of(self.card)

    @property
    def scale(self) -> float:
        """Factor of the low-rank adapters, alpha / rank; 1 without adapters."""
        lora = self.card.get("lora")
        return lora["alpha"] / lora["rank"] if lora else 1.0

    def save(self, directory: str | Path) -> PromptPack:
        """Writes the pack; see `save_pack`."""
        return save_pack(directory, self.params, self.card)

    @classmethod
    def load(cls, directory: str | Path) -> PromptPack:
        """Reads a pack; see `load_pack`."""
        return load_pack(directory)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publishes the pack on the Hugging Face hub; see `push_pack` for options and result."""
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "pack"
            self.save(directory)
            return push_pack(directory, repo_id, **options)

    @classmethod
    def from_hub(cls, repo_id: str, **options: Any) -> PromptPack:
        """Downloads a pack from the Hugging Face hub, unless it is in the local cache.

        Args:
          repo_id: USER/NAME.
          **options: `revision`, `cache_dir` and `token` of `hub.fetch`.

        Raises:
          StorageError: as `hub.fetch` and `load_pack`.
        """
        return load_pack(hub.fetch(repo_id, (CARD_FILE, TENSOR_FILE), (pack_readme.FILE,), **options))


def save_pack(directory: str | Path, params: Params, card: PackCard) -> PromptPack:
    """Writes a prompt pack, atomically; an existing one is replaced.

    Args:
      directory: target; parents are created.
      params: prompt tree without a bank axis (PromptPack.params), numpy or JAX arrays, float32.
      card: see `make_card`; `parameters` and the hashes are filled in here.

    Returns:
      The pack as `load_pack` would return it.

    Raises:
      StorageError: an inconsistent card, tensors that do not match it, or a directory that holds other files.
    """
    params = files.flatten(params)
    full: PackCard = {
        **card,
        "version": pack_card.version(card) if card["version"] <= pack_card.SEALED else card["version"],
        "parameters": sum(array.size for array in params.values()),
        "hash": files.tree_hash(params),
        "card_hash": "",
    }
    pack_card.check_card(full, "card to save")
    full["card_hash"] = files.seal(full, pack_card.FREE)
    found = files.described(params)
    files.check_tensors(
        found, pack_card.tensor_shapes(full, found), "prompt to save", "Give one member's tree, without the bank axis."
    )
    pack = PromptPack(params, full)
    text = readme(pack)
    files.write_directory(
        directory,
        {
            CARD_FILE: files.json_writer(full),
            TENSOR_FILE: files.tensor_writer(params),
            pack_readme.FILE: lambda path: path.write_text(text, encoding="utf-8"),
        },
        CARD_FILE,
    )
    return pack


def readme(pack: PromptPack) -> str:
    """Returns the pack's README.md, as `save_pack` writes it."""
    shape = shape_of(pack.params)
    return pack_readme.readme(pack.card, deep=shape["deep"], positions=shape["length"], separators=shape["separators"])


def load_pack(directory: str | Path) -> PromptPack:
    """Reads a prompt pack, bit for bit as saved, and checks its tensors against its card.

    Args:
      directory: written by `save_pack`.

    Raises:
      StorageError: missing, truncated, altered or newer files, or tensors that do not match the card.
    """
    directory = places.at(directory)
    card = pack_card.read_card(
        files.read_json(directory / CARD_FILE, pack_card.FORMAT, pack_card.VERSION), directory / CARD_FILE
    )
    params = files.read_tensors(directory / TENSOR_FILE, lambda found: pack_card.tensor_shapes(card, found))
    return pack_of(params, card, f"{directory / TENSOR_FILE} is not the prompt that {CARD_FILE} describes")


def push_pack(directory: str | Path, repo_id: str, *, licence: str | None = None, **options: Any) -> str:
    """Publishes a prompt pack directory in one commit; an edited README.md is kept.

    Args:
      directory: of the pack. If it has no README.md (older versions), one is generated for the hub.
      repo_id: USER/NAME of a model repository; created if absent.
      licence: hub identifier, such as "cc-by-4.0", for the README's front matter; None keeps the current one.
      **options: `private`, `revision`, `message` and `token` of `hub.push`.

    Returns:
      Hash of the commit, a valid `revision` of `PromptPack.from_hub`.

    Raises:
      StorageError: as `load_pack` and `hub.push`.
    """
    directory = Path(directory)
    pack = load_pack(directory)
    path = directory / pack_readme.FILE
    text = places.read_limited(path, kinds.MAX_JSON).decode() if path.is_file() else readme(pack)
    if licence is not None:
        text = pack_readme.with_licence(text, licence)
    content: dict[str, str | bytes] = {
        CARD_FILE: files.json_bytes(pack.card),  # adds the hash to a card of an older version
        TENSOR_FILE: str(directory / TENSOR_FILE),
        pack_readme.FILE: text.encode(),
    }
    options["message"] = options.get("message") or f"Prompt pack {pack.card['task']}"
    return hub.push(repo_id, content, **options)


def pack_of(params: Params, card: PackCard, mismatch: str) -> PromptPack:
    """Combines tensors and a card, each checked on its own.

    Raises:
      StorageError: the tensors differ from the card's hash or count; the message starts with `mismatch`.
    """
    if files.tree_hash(params) != card["hash"] or sum(array.size for array in params.values()) != card["parameters"]:
        raise StorageError(f"{mismatch}: one of the two was altered. Take both from their source again.")
    return PromptPack(params, card)


def check_pack(pack: PromptPack, lm_hash: str, config: UnitLMConfig) -> None:
    """Checks that a unit LM is the one that a prompt was trained with.

    Args:
      pack: the prompt pack.
      lm_hash: `unit_lm_hash` of the LM to use.
      config: architecture of the LM to use.

    Raises:
      StorageError: other sizes or another hash.
    """
    theirs: dict[str, Any] = dict(pack.card["lm"])
    ours = {name: getattr(config, name) for name in SIZES}
    differing = [name for name in SIZES if theirs[name] != ours[name]]
    fix = "Load the LM that it was trained with, or train a prompt for this one."
    if differing:
        wanted, found = (", ".join(f"{name} {sizes[name]}" for name in differing) for sizes in (theirs, ours))
        raise StorageError(
            f"prompt pack {pack.card['task']!r} was trained with a unit LM of {wanted}, this one has {found}. {fix}"
        )
    if lm_hash != theirs["hash"]:
        raise StorageError(
            f"prompt pack {pack.card['task']!r} was trained with the unit LM of hash {theirs['hash']}, "
            f"this one's is {lm_hash}. {fix}"
        )


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
