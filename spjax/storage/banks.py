"""A bank on disk: `bank.json` beside `bank.safetensors`, prompt packs of one unit LM that can be run side by side.

Every member's tensors are kept as its own pack has them, without the filling that a joined bank in memory needs
(`spjax.models.prompts.join`), so that a pack comes out of a bank bit for bit as it went in.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spjax.storage import files, kinds, packs, places
from spjax.storage.files import Shape, StorageError
from spjax.storage.packs import PackCard, PromptPack

FORMAT = "spjax-prompt-bank"
VERSION = 2  # since 2 the card carries a hash of its members' names and of their cards' hashes, in order
CARD_FILE = "bank.json"
TENSOR_FILE = "bank.safetensors"

_NAME = re.compile(r"\w[\w.+-]{0,99}")  # a member's name is a directory's too


def _form(pack: PromptPack) -> dict[str, str]:
    """What must agree for packs to be run in one program.

    Length of deep prompts, low-rank adapters and size of the verbalizer need not: they are filled up.
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
    """Refuses what does not make a bank.

    Args:
      members: packs by name.

    Raises:
      StorageError: none at all, a name that is no file name, packs of several LMs, or of forms that do not go together.
    """
    if not members:
        raise StorageError("a bank needs at least one prompt pack.")
    for name in members:
        if not _NAME.fullmatch(name):
            raise StorageError(f"the name {name!r:.120} is none for a bank's member: use letters, digits and . _ + -")
    (first, form), *others = ((name, _form(pack)) for name, pack in members.items())
    for name, other in others:
        for part, said in other.items():
            if said != form[part]:
                one_lm = part in ("lm", "sizes")
                why = "A bank serves one unit LM" if one_lm else "A bank runs its prompts side by side, in one form"
                raise StorageError(f"{first} is {form[part]}, {name} {said}. {why}: merge {name} into another bank.")


def save_bank(directory: str | Path, members: Mapping[str, PromptPack]) -> None:
    """Writes packs as a bank, atomically; one that is already there is replaced.

    Args:
      directory: where to; parents are made.
      members: packs by name, in the order of the bank's rows. They share a unit LM and a form; task, labels, prompt
        length, low-rank adapters and size of the verbalizer may differ.

    Raises:
      StorageError: as `check_members`, or a directory with other files in it.
    """
    check_members(members)
    described = describe({name: pack.card for name, pack in members.items()})
    tensors = files.tensor_writer({name: pack.params for name, pack in members.items()})
    files.write_directory(directory, {CARD_FILE: files.json_writer(described), TENSOR_FILE: tensors})


def describe(cards: Mapping[str, PackCard]) -> dict[str, Any]:
    """`bank.json`: the members' names and cards."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "members": [{"name": name, "card": card} for name, card in cards.items()],
        files.SEAL: files.seal(_sealed(cards), ()),
    }


def _sealed(cards: Mapping[str, PackCard]) -> dict[str, Any]:
    """What the hash of a bank's card covers: which member answers by which name."""
    return {"members": [[name, card["card_hash"]] for name, card in cards.items()]}


def _read_card(path: Path) -> dict[str, PackCard]:
    """Cards of a bank's members by name, each checked."""
    described = files.read_json(path, FORMAT, VERSION)
    way_out = "Take the bank from its source again, or merge the packs anew."
    sealed = (files.SEAL,) if described["version"] >= VERSION else ()
    files.check_keys(described, ("members", *sealed), (), path, way_out)
    cards: dict[str, PackCard] = {}
    for member in described["members"] if isinstance(described["members"], list) else ():
        named = isinstance(member, dict) and member.keys() == {"name", "card"} and isinstance(member["name"], str)
        if not named or not _NAME.fullmatch(member["name"]) or member["name"] in cards:
            raise StorageError(f"{path}: the member {member!r:.120} has no name of its own and a card. {way_out}")
        card = member["card"]
        if sealed and isinstance(card, dict) and files.SEAL not in card:
            raise StorageError(f"{path}: the card of {member['name']} lacks {files.SEAL}. {way_out}")
        # Members of an older bank have no hashes; that is reported once, for the bank.
        cards[member["name"]] = packs.read_card(card, f"{path}, {member['name']}", quiet=not sealed)
    if not cards:
        raise StorageError(f"{path} names no members. {way_out}")
    stated = {name: described[name] for name in sealed}
    files.check_seal({**_sealed(cards), **stated, "version": described["version"]}, (), VERSION, path)
    return cards


def load_bank(directory: str | Path) -> dict[str, PromptPack]:
    """Reads a bank's packs by name, in order and bit for bit as they were merged.

    Args:
      directory: as written by `save_bank`.

    Raises:
      StorageError: files absent, truncated, altered, of a newer format, or members that do not go together.
    """
    directory = places.at(directory)
    cards = _read_card(directory / CARD_FILE)

    def shapes(found: dict[str, tuple[str, Shape]]) -> dict[str, Shape]:
        expected: dict[str, Shape] = {}
        for name, card in cards.items():
            own = {path[len(name) + 1 :]: kind for path, kind in found.items() if path.startswith(f"{name}/")}
            expected |= {f"{name}/{path}": shape for path, shape in packs.tensor_shapes(card, own).items()}
        return expected

    tensors = files.read_tensors(directory / TENSOR_FILE, shapes)
    unlike = f"{directory / TENSOR_FILE} does not hold the prompt that {CARD_FILE} describes as "
    members = {name: packs.pack_of(tensors[name], card, unlike + name) for name, card in cards.items()}
    check_members(members)
    return members


def split_bank(directory: str | Path, out: str | Path) -> list[Path]:
    """Writes every member of a bank as a prompt pack of its own, `out/NAME`.

    Returns:
      The packs' directories.

    Raises:
      StorageError: as `load_bank`, or a directory of a member's name is there already.
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
        return kinds.load_json(path).get("format") == kind
    except (OSError, ValueError, AttributeError):
        return False


class _Found(NamedTuple):
    """A pack on disk: what it would be called, and what else, where others are called so too."""

    name: str
    longer: str
    pack: PromptPack


@places.plainly()
def load_packs(*paths: str | Path) -> dict[str, PromptPack]:
    """Every prompt pack that some places hold, by name.

    Args:
      paths: a pack, which is called as its task; a bank, whose members have their names; a directory of packs and
        banks at any depth (a job's, say); each as a path, or as "NAME=PATH" for a pack that is to be called so. Where
        two would be called alike, the way to them is added: "fsc-seed_0" for `fsc/packs/seed_0`. They may be of
        several LMs and forms.

    Raises:
      StorageError: a place without packs, a pack that `load_pack` or `load_bank` refuses, or two that would be called
        alike even so.
    """
    found = list(itertools.chain.from_iterable(map(_at, paths)))
    times = Counter(one.name for one in found)
    named = [(one.name if times[one.name] == 1 else one.longer, one.pack) for one in found]
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if twice:
        raise StorageError(f"several packs would be called {', '.join(twice)}. Leave some out, or name them: NAME=DIR.")
    return dict(named)


def _at(place: str | Path) -> list[_Found]:
    """The packs of one place."""
    name, equals, path = str(place).partition("=")
    if equals and not places.at(place).exists():
        return [_Found(name, name, packs.load_pack(path))]
    place = places.at(place)
    if (place / packs.CARD_FILE).is_file():
        return [_told(packs.load_pack(place), [_name(place)])]
    if (place / CARD_FILE).is_file():
        return [_Found(name, f"{_clean(_name(place))}-{name}", pack) for name, pack in load_bank(place).items()]
    found = []
    for file in sorted(_json_files(place)) if place.is_dir() else ():
        parts = file.relative_to(place).parts[:-1]
        if any(part.startswith(".") for part in parts):  # what a save was cut off in
            continue
        if file.name == packs.CARD_FILE and _is(file, packs.FORMAT):
            found.append(_told(packs.load_pack(file.parent), [part for part in parts if part != "packs"]))
        elif file.name == CARD_FILE and _is(file, FORMAT):
            way = "-".join(part for part in parts if part != "packs")
            found += [_Found(name, f"{_clean(way)}-{name}", pack) for name, pack in load_bank(file.parent).items()]
    if not found:
        what, todo = kinds.describe(place)
        if (place / packs.TENSOR_FILE).is_file():
            what, todo = f"a prompt pack without its {packs.CARD_FILE}, which is missing", "Copy the whole directory."
        elif not place.exists():
            what = "not there"
        called = f" (it is {what})" if what else ""
        todo = todo or "Point to one."
        raise StorageError(f"{place} is no prompt pack or bank, nor a directory of them{called}. {todo}")
    return found


def _name(place: Path) -> str:
    return os.path.basename(places.absolute(place))


def _json_files(place: Path) -> Iterator[Path]:
    """At any depth."""
    if not places.is_remote(place):
        yield from place.rglob("*.json")
        return
    for path in place.iterdir():
        if path.suffix == ".json":
            yield path
        elif path.is_dir():
            yield from _json_files(path)


def _told(pack: PromptPack, way: list[str]) -> _Found:
    task = pack.card["task"]
    return _Found(_clean(task), _clean("-".join(way if task in way else [task, *way])), pack)


def _clean(name: str) -> str:
    """A name as directories and command lines can have it."""
    return re.sub(r"[^\w.+-]|^\W", "_", name) or "pack"
