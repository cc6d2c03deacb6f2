"""A prompt bank on disk: `bank.json` and `bank.safetensors`, packs of one unit LM that run in one batch.

Tensors are stored without the padding of a joined bank in memory (`spjax.models.prompts.join`), so that a pack read
from a bank equals the merged pack bit for bit.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from spjax.io import files, kinds, pack_card, packs, places
from spjax.io.files import Shape, StorageError
from spjax.io.pack_card import PackCard
from spjax.io.packs import PromptPack
from spjax.types import Json

FORMAT = "spjax-prompt-bank"
VERSION = 2  # since 2 the card has a hash of the members' names and card hashes, in order
CARD_FILE = "bank.json"
TENSOR_FILE = "bank.safetensors"

_NAME = re.compile(r"\w[\w.+-]{0,99}")  # also used as a directory name


def _signature(pack: PromptPack) -> dict[str, str]:
    """Describes the properties that must be equal for packs to run in one program.

    Prompt length, LoRA rank and verbalizer size may differ: they are padded.
    """
    params = pack.params
    return {
        "lm": f"for the unit LM of hash {pack.card['lm']['hash']}",
        "sizes": f"for a unit LM of {json.dumps(pack.card['lm'])}",
        "kind": f"with an input prompt of {len(params['input'])}" if "input" in params else "without an input prompt",
        "separators": f"with {len(params['sep'])} separators",
        "steer": f"with{'' if 'sep_deep' in params else 'out'} separators steered in every layer",
        "verbalizer": f"with a {'learnable' if 'verbalizer' in params else 'rule'} verbalizer",
    }


def check_members(members: Mapping[str, PromptPack]) -> None:
    """Checks that packs can form a bank.

    Args:
      members: packs by name.

    Raises:
      StorageError: no pack, a name that is not a valid file name, packs of different unit LMs or incompatible
        structure.
    """
    if not members:
        raise StorageError("a bank needs at least one prompt pack.")
    for name in members:
        if not _NAME.fullmatch(name):
            raise StorageError(f"{name!r:.120} is not a valid member name: use letters, digits and . _ + -")
    (first, expected), *others = ((name, _signature(pack)) for name, pack in members.items())
    for name, signature in others:
        for part, found in signature.items():
            if found != expected[part]:
                one_lm = part in ("lm", "sizes")
                why = "A bank serves one unit LM" if one_lm else "A bank needs prompts of one structure"
                raise StorageError(
                    f"{first} is {expected[part]}, {name} {found}. {why}: merge {name} into another bank."
                )


def save_bank(directory: str | Path, members: Mapping[str, PromptPack]) -> None:
    """Writes packs as a bank, atomically; an existing bank is replaced.

    Args:
      directory: target; parents are created.
      members: packs by name, in the order of the bank's rows. They share a unit LM and a prompt structure; task,
        labels, prompt length, LoRA rank and verbalizer size may differ.

    Raises:
      StorageError: as `check_members`, or the directory holds other files.
    """
    check_members(members)
    described = describe({name: pack.card for name, pack in members.items()})
    tensors = files.tensor_writer({name: pack.params for name, pack in members.items()})
    files.write_directory(directory, {CARD_FILE: files.json_writer(described), TENSOR_FILE: tensors}, CARD_FILE)


def describe(cards: Mapping[str, PackCard]) -> Json:
    """Returns the content of `bank.json`: the members' names and cards."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "members": [{"name": name, "card": card} for name, card in cards.items()],
        files.SEAL: files.seal(_sealed(cards), ()),
    }


def _sealed(cards: Mapping[str, PackCard]) -> Json:
    """Returns the fields that a bank's card hash covers: each member's name and card hash."""
    return {"members": [[name, card["card_hash"]] for name, card in cards.items()]}


def _read_card(path: Path) -> dict[str, PackCard]:
    """Reads and checks the cards of a bank's members, by name."""
    described = files.read_json(path, FORMAT, VERSION)
    fix = "Take the bank from its source again, or merge the packs again."
    sealed = (files.SEAL,) if described["version"] >= VERSION else ()
    files.check_keys(described, ("members", *sealed), (), path, fix)
    cards: dict[str, PackCard] = {}
    for member in described["members"] if isinstance(described["members"], list) else ():
        named = isinstance(member, dict) and member.keys() == {"name", "card"} and isinstance(member["name"], str)
        if not named or not _NAME.fullmatch(member["name"]) or member["name"] in cards:
            raise StorageError(f"{path}: the member {member!r:.120} needs a unique name and a card. {fix}")
        card = member["card"]
        if sealed and isinstance(card, dict) and files.SEAL not in card:
            raise StorageError(f"{path}: the card of {member['name']} lacks {files.SEAL}. {fix}")
        # Members of an older bank have no hashes; one warning for the bank is enough.
        cards[member["name"]] = pack_card.read_card(card, f"{path}, {member['name']}", quiet=not sealed)
    if not cards:
        raise StorageError(f"{path} lists no members. {fix}")
    stated = {name: described[name] for name in sealed}
    files.check_seal({**_sealed(cards), **stated, "version": described["version"]}, (), VERSION, path)
    return cards


def load_bank(directory: str | Path) -> dict[str, PromptPack]:
    """Reads a bank's packs by name, in order and bit for bit as they were merged.

    Args:
      directory: written by `save_bank`.

    Raises:
      StorageError: missing, truncated, altered or newer files, or members that cannot form a bank.
    """
    directory = places.at(directory)
    cards = _read_card(directory / CARD_FILE)

    def shapes(found: dict[str, tuple[str, Shape]]) -> dict[str, Shape]:
        expected: dict[str, Shape] = {}
        for name, card in cards.items():
            part = {path[len(name) + 1 :]: kind for path, kind in found.items() if path.startswith(f"{name}/")}
            expected |= {f"{name}/{path}": shape for path, shape in pack_card.tensor_shapes(card, part).items()}
        return expected

    tensors = files.read_tensors(directory / TENSOR_FILE, shapes)
    unlike = f"{directory / TENSOR_FILE} does not hold the prompt that {CARD_FILE} describes as "
    members = {name: packs.pack_of(tensors[name], card, unlike + name) for name, card in cards.items()}
    check_members(members)
    return members


def split_bank(directory: str | Path, out: str | Path) -> list[Path]:
    """Writes every member of a bank as a separate prompt pack, `out/NAME`.

    Returns:
      Directories of the packs.

    Raises:
      StorageError: as `load_bank`, or a directory of a member's name exists.
    """
    members, out = load_bank(directory), places.at(out)
    taken = [name for name in members if (out / name).exists()]
    if taken:
        raise StorageError(f"{out} already holds {', '.join(taken[:5])}. Choose another directory.")
    for name, pack in members.items():
        pack.save(out / name)
    return [out / name for name in members]


def _is(path: Path, kind: str) -> bool:
    try:
        return bool(kinds.load_json(path).get("format") == kind)
    except (OSError, ValueError, AttributeError):
        return False


class _Found(NamedTuple):
    """A pack on disk, its name, and a longer name for use when other packs have the same one."""

    name: str
    longer: str
    pack: PromptPack


@places.translate_bucket_errors()
def load_packs(*paths: str | Path) -> dict[str, PromptPack]:
    """Loads every prompt pack found under the given paths, by name.

    Args:
      paths: packs (named by their task), banks (whose members keep their names), or directories of packs and banks at
        any depth, such as a job's. "NAME=PATH" sets the name of a pack. Packs of equal name get their path appended:
        "fsc-seed_0" for `fsc/packs/seed_0`. Unit LMs and prompt structures may differ.

    Raises:
      StorageError: a path without packs, a pack that `load_pack` or `load_bank` refuses, or names that stay ambiguous.
    """
    found = list(itertools.chain.from_iterable(map(_at, paths)))
    times = Counter(one.name for one in found)
    named = [(one.name if times[one.name] == 1 else one.longer, one.pack) for one in found]
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if twice:
        raise StorageError(f"several packs have the name {', '.join(twice)}. Leave some out, or name them: NAME=DIR.")
    return dict(named)


def _at(place: str | Path) -> list[_Found]:
    """Loads the packs of one path."""
    name, equals, path = str(place).partition("=")
    if equals and not places.at(place).exists():
        return [_Found(name, name, packs.load_pack(path))]
    place = places.at(place)
    if (place / packs.CARD_FILE).is_file():
        return [_named_by_task(packs.load_pack(place), [_name(place)])]
    if (place / CARD_FILE).is_file():
        return [_Found(name, f"{_clean(_name(place))}-{name}", pack) for name, pack in load_bank(place).items()]
    found = []
    for file in sorted(_json_files(place)) if place.is_dir() else ():
        parts = file.relative_to(place).parts[:-1]
        if any(part.startswith(".") for part in parts):  # left by an interrupted save
            continue
        if file.name == packs.CARD_FILE and _is(file, pack_card.FORMAT):
            found.append(_named_by_task(packs.load_pack(file.parent), [part for part in parts if part != "packs"]))
        elif file.name == CARD_FILE and _is(file, FORMAT):
            prefix = "-".join(part for part in parts if part != "packs")
            found += [_Found(name, f"{_clean(prefix)}-{name}", pack) for name, pack in load_bank(file.parent).items()]
    if not found:
        what, todo = kinds.describe(place)
        if (place / packs.TENSOR_FILE).is_file():
            what, todo = f"a prompt pack without its {packs.CARD_FILE}, which is missing", "Copy the whole directory."
        elif not place.exists():
            what = "not there"
        called = f" (it is {what})" if what else ""
        todo = todo or "Point to one."
        raise StorageError(f"{place} is not a prompt pack, a bank or a directory of them{called}. {todo}")
    return found


def _name(place: Path) -> str:
    return os.path.basename(places.absolute(place))


def _json_files(place: Path) -> Iterator[Path]:
    """Yields JSON files at any depth."""
    if not places.is_remote(place):
        yield from place.rglob("*.json")
        return
    for path in place.iterdir():
        if path.suffix == ".json":
            yield path
        elif path.is_dir():
            yield from _json_files(path)


def _named_by_task(pack: PromptPack, parts: list[str]) -> _Found:
    task = pack.card["task"]
    return _Found(_clean(task), _clean("-".join(parts if task in parts else [task, *parts])), pack)


def _clean(name: str) -> str:
    """Replaces characters that are not allowed in names of directories and members."""
    return re.sub(r"[^\w.+-]|^\W", "_", name) or "pack"
