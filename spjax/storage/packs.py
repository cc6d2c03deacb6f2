"""A prompt pack on disk: `card.json` and `prompt.safetensors`, a trained prompt with all that is needed to use it.

`README.md` is generated from the card for readers and the Hugging Face hub; it is never read back.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, NotRequired, TypedDict, cast

import numpy as np

from spjax.models import low_rank
from spjax.models.config import SIZES, UnitLMConfig
from spjax.models.prompts import shape_of
from spjax.storage import files, pack_readme, places
from spjax.storage.files import Shape, StorageError
from spjax.tasks import LONGEST_LABEL, Slot, Task
from spjax.types import Params

FORMAT = "spjax-prompt-pack"
VERSION = 3  # since 3 there may be low-rank adapters; a pack without them is written as version 2
SEALED = 2  # since 2 the card has a hash
FREE = ("task", "metric", "results", "provenance", "licence", "description")  # do not affect predictions; not hashed
CARD_FILE = "card.json"
TENSOR_FILE = "prompt.safetensors"


class SlotCard(TypedDict):
    """Name of a slot and its labels in class order."""

    name: str
    labels: list[str]


class VerbalizerCard(TypedDict):
    """How a class is encoded as output positions and as token ids (docs/design.md, Verbalizers).

    `codes` and `feeds` are [C][M]. Codes of one slot are unique; an imported prompt may have equal codes in different
    slots.
    """

    kind: str  # learnable | frequency | random | identity
    codes: list[list[int]]
    feeds: list[list[int]]
    outputs: int


class LoraCard(TypedDict):
    """Low-rank adapters: y = x W + b + (alpha / rank) (x A^T) B for every kernel W in `targets`."""

    rank: int
    alpha: float
    targets: list[str]


class LMCard(TypedDict):
    """Hash and sizes of the unit LM that the prompt was trained with."""

    hash: str
    vocab_size: int
    dim: int
    layers: int
    heads: int
    ffn_dim: int


class PackCard(TypedDict):
    """Content of `card.json`. `make_card` makes one; `save_pack` fills in `parameters` and the hashes."""

    format: str  # "spjax-prompt-pack"
    version: int  # 2; 3 with low-rank adapters
    task: str
    slots: list[SlotCard]
    metric: str
    verbalizer: VerbalizerCard
    lm: LMCard
    encoder: str | None  # speech encoder of the training units, e.g. "hubert_base"
    layer: int | None  # the encoder's layer
    kmeans: str | None  # id of the k-means model
    merged: bool | None  # whether runs of equal units were merged
    combinations: list[list[int]] | None  # class ids per slot that occur together in training; null: all
    results: dict[str, Any]  # any JSON
    provenance: dict[str, Any]  # any JSON: source file, seed, protocol
    parameters: int  # number of trained values
    hash: str  # of the prompt's tensors (`files.tree_hash`)
    card_hash: str  # of the fields that affect predictions (all but FREE), `hash` included
    lora: NotRequired[LoraCard]  # only with low-rank adapters
    licence: NotRequired[str]
    description: NotRequired[str]


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
        slots = tuple(Slot(slot["name"], tuple(slot["labels"])) for slot in self.card["slots"])
        return Task(self.card["task"], slots, self.card["metric"])

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

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        message: str | None = None,
        licence: str | None = None,
        token: str | None = None,
    ) -> str:
        """Publishes the pack on the Hugging Face hub; see `spjax.storage.hub.push_pack` for arguments and result."""
        from spjax.storage import hub

        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "pack"
            self.save(directory)
            return hub.push_pack(
                directory, repo_id, private=private, revision=revision, message=message, licence=licence, token=token
            )

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
    ) -> PromptPack:
        """Downloads a pack from the Hugging Face hub; see `spjax.storage.hub.fetch_pack`."""
        from spjax.storage import hub

        return load_pack(hub.fetch_pack(repo_id, revision=revision, cache_dir=cache_dir, token=token))


def make_card(
    task: Task,
    *,
    kind: str,
    codes: Sequence[Sequence[int]] | np.ndarray,
    feeds: Sequence[Sequence[int]] | np.ndarray,
    outputs: int,
    config: UnitLMConfig,
    lm_hash: str,
    encoder: str | None = None,
    layer: int | None = None,
    kmeans: str | None = None,
    merged: bool | None = None,
    combinations: Sequence[Sequence[int]] | np.ndarray | None = None,
    results: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
) -> PackCard:
    """Makes the card of a prompt; see PackCard for the fields.

    Args:
      task: name, slots and metric.
      kind: of the verbalizer: learnable, frequency, random or identity.
      codes: int [C, M], output positions of each class.
      feeds: int [C, M], fed-back token ids of each class.
      outputs: width of the output.
      config: architecture of the unit LM.
      lm_hash: hash of the unit LM.
      encoder: name of the speech encoder; None if unknown, as for the next three.
      layer: of the encoder.
      kmeans: id of the k-means model.
      merged: whether runs of equal units were merged.
      combinations: int [n, slots], class ids that occur together in training; None allows all.
      results: any JSON.
      provenance: any JSON.
      lora: LoraCard; None without low-rank adapters.
    """
    card: PackCard = {
        "format": FORMAT,
        "version": VERSION if lora else SEALED,
        "task": task.name,
        "slots": [{"name": slot.name, "labels": list(slot.labels)} for slot in task.slots],
        "metric": task.metric,
        "verbalizer": {
            "kind": kind,
            "codes": np.asarray(codes).tolist(),
            "feeds": np.asarray(feeds).tolist(),
            "outputs": int(outputs),
        },
        "lm": {"hash": lm_hash, **{name: getattr(config, name) for name in SIZES}},  # type: ignore[typeddict-item]
        "encoder": encoder,
        "layer": layer,
        "kmeans": kmeans,
        "merged": merged,
        "combinations": None if combinations is None else np.asarray(combinations).tolist(),
        "results": dict(results or {}),
        "provenance": dict(provenance or {}),
        "parameters": 0,
        "hash": "",
        "card_hash": "",
    }
    return {**card, "lora": cast(LoraCard, dict(lora))} if lora else card


def tensor_shapes(card: PackCard, found: Mapping[str, tuple[str, Shape]]) -> dict[str, Shape]:
    """Returns the shapes that a prompt's tensors must have; P, S and `sep_deep` are taken from the tensors found."""
    lm = card["lm"]

    def size(name: str, axis: int) -> int:
        shape = found.get(name, ("", ()))[1]
        return shape[axis] if len(shape) > 1 else 0

    sep = max(1, size("sep", 0))
    shapes: dict[str, Shape] = {"sep": (sep, lm["dim"])}
    if "input" in found:
        shapes["input"] = (size("input", 0), lm["dim"])
    elif "key" in found or "lora" not in card:
        shapes["key"] = shapes["value"] = (lm["layers"], size("key", 1), lm["dim"])
    if "sep_deep" in found:
        shapes["sep_deep"] = (lm["layers"], sep, lm["dim"])
    if card["verbalizer"]["kind"] == "learnable":
        shapes["verbalizer"] = (card["verbalizer"]["outputs"], lm["vocab_size"])
    if "lora" in card:
        rank, sizes = card["lora"]["rank"], low_rank.sizes(lm["dim"], lm["ffn_dim"])
        for target in card["lora"]["targets"]:
            rows, columns = sizes[target]
            shapes |= {f"{target}_a": (lm["layers"], rank, rows), f"{target}_b": (lm["layers"], rank, columns)}
    return shapes


def _version(card: Mapping[str, Any]) -> int:
    """Returns the oldest format version that can hold the card."""
    return VERSION if "lora" in card else SEALED


def check_card(card: Any, where: str | Path) -> None:
    """Checks everything about a card that needs no tensors.

    Args:
      card: parsed JSON.
      where: its source, for messages.

    Raises:
      StorageError: the first invalid field.
    """

    def fail(problem: str) -> NoReturn:
        raise StorageError(f"{where}: {problem}. Take the pack from its source again, or make a new card.")

    _check_types(card, fail)
    if card["format"] != FORMAT or card["version"] < 1:
        fail(
            f'the card has the format {card["format"]!r:.40}, version {card["version"]}, must be "{FORMAT}", 1 or more'
        )
    if card["version"] > VERSION:
        raise StorageError(
            f"{where}: the card of prompt pack {card['task']!r} has the version {card['version']}, but this spjax "
            f"reads up to {VERSION}. Update spjax."
        )
    _check_values(card, fail)


def _check_types(card: Mapping[str, Any], fail: Callable[[str], NoReturn]) -> None:
    text, whole, opt = (str,), (int,), type(None)
    expected = {
        "format": text,
        "version": whole,
        "task": text,
        "slots": (list,),
        "metric": text,
        "verbalizer": (dict,),
        "lm": (dict,),
        "encoder": (str, opt),
        "layer": (int, opt),
        "kmeans": (str, opt),
        "merged": (bool, opt),
        "combinations": (list, opt),
        "results": (dict,),
        "provenance": (dict,),
        "parameters": whole,
        "hash": text,
    }
    if not isinstance(card, dict):
        fail(f"the card is {card!r:.60}, must be an object")
    if card.get("version") != 1:
        expected["card_hash"] = text
    expected |= {name: text for name in ("licence", "description") if name in card}
    parts: dict[str, dict[str, tuple[type, ...]]] = {
        "verbalizer": {"kind": text, "codes": (list,), "feeds": (list,), "outputs": whole},
        "lm": {"hash": text, **dict.fromkeys(SIZES, whole)},
    }

    def compare(value: Any, fields: Mapping[str, tuple[type, ...]], where: str) -> None:
        if not isinstance(value, dict) or value.keys() != fields.keys():
            fail(f"{where} must have the fields {', '.join(fields)}")
        for name, types in fields.items():
            if type(value[name]) not in types:
                wanted = " or ".join("null" if t is opt else t.__name__ for t in types)
                fail(f"{where}.{name} is {value[name]!r:.60}, must be {wanted}")

    if "lora" in card:
        expected["lora"] = (dict,)
        parts["lora"] = {"rank": whole, "alpha": (int, float), "targets": (list,)}
    compare(card, expected, "card")
    for name, fields in parts.items():
        compare(card[name], fields, f"card.{name}")
    for slot in card["slots"]:
        compare(slot, {"name": text, "labels": (list,)}, "card.slots[]")
        if not all(type(label) is str for label in slot["labels"]):
            fail(f"labels of slot {slot['name']!r} must be strings")


def _check_values(card: PackCard, fail: Callable[[str], NoReturn]) -> None:
    try:
        task = PromptPack({}, card).task
        lm = UnitLMConfig(**{name: card["lm"][name] for name in SIZES})  # type: ignore[literal-required]
        if "lora" in card:
            low_rank.check(**card["lora"])
    except ValueError as error:
        fail(str(error))
    if not task.name.strip() or len(task.name) > LONGEST_LABEL:
        fail(f"its task has a name of {len(task.name)} characters, must have 1 to {LONGEST_LABEL}")
    names = [slot.name for slot in task.slots]
    if not names or len(set(names)) != len(names):
        fail(f"its slots are named {names!r:.80}, must be one or more, of different names")
    offsets, verbalizer, lm_card = task.slot_offsets, card["verbalizer"], card["lm"]
    tables = []
    for name, limit in (("codes", verbalizer["outputs"]), ("feeds", lm.vocab_size)):
        rows = verbalizer[name]  # type: ignore[literal-required]
        if not rows or len(rows) != task.num_classes or not all(isinstance(row, list) for row in rows):
            fail(f"the verbalizer's {name} have {len(rows)} rows for {task.num_classes} classes")
        if len({len(row) for row in rows}) != 1 or not rows[0]:
            fail(f"the rows of the verbalizer's {name} differ in length or are empty")
        wrong = [value for row in rows for value in row if type(value) is not int or not 0 <= value < limit]
        if wrong:
            fail(f"the verbalizer's {name} hold {wrong[0]!r:.20}, outside 0..{limit - 1}")
        tables.append(rows)
    codes, feeds = tables
    if len(codes[0]) != len(feeds[0]):
        fail(f"the verbalizer has {len(codes[0])} codes but {len(feeds[0])} feeds a class")
    for slot, start, stop in zip(task.slots, offsets, offsets[1:], strict=False):
        by_code: dict[tuple[int, ...], str] = {}
        for label, code in zip(slot.labels, codes[start:stop], strict=True):
            twin = by_code.setdefault(tuple(code), label)
            if twin != label:
                fail(f"labels {twin!r} and {label!r} of slot {slot.name!r} have the same code {code}")
    kind = verbalizer["kind"]
    if kind not in ("learnable", "frequency", "random", "identity"):
        fail(f"the verbalizer's kind is {kind!r}, must be learnable, frequency, random or identity")
    if kind != "learnable" and verbalizer["outputs"] != lm.vocab_size:
        fail(f"a {kind} verbalizer has the {lm.vocab_size} outputs of the LM, not {verbalizer['outputs']}")
    for row in card["combinations"] or ():
        fits = isinstance(row, list) and len(row) == len(task.slots) and all(type(value) is int for value in row)
        if not fits or not all(a <= value < b for a, b, value in zip(offsets, offsets[1:], row, strict=False)):
            fail(f"the combination {row!r:.60} is not one class id of each slot (slots start at {list(offsets[:-1])})")
    if card["combinations"] == []:
        fail("combinations are empty; null allows all")
    if not lm_card["hash"]:
        fail("the LM's hash is empty")


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
        "version": _version(card) if card["version"] <= SEALED else card["version"],
        "parameters": sum(array.size for array in params.values()),
        "hash": files.tree_hash(params),
        "card_hash": "",
    }  # type: ignore[typeddict-item]
    check_card(full, "card to save")
    full["card_hash"] = files.seal(full, FREE)
    found = files.described(params)
    files.check_tensors(
        found, tensor_shapes(full, found), "prompt to save", "Give one member's tree, without the bank axis."
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
    card = read_card(files.read_json(directory / CARD_FILE, FORMAT, VERSION), directory / CARD_FILE)
    params = files.read_tensors(directory / TENSOR_FILE, lambda found: tensor_shapes(card, found))
    return pack_of(params, card, f"{directory / TENSOR_FILE} is not the prompt that {CARD_FILE} describes")


def read_card(card: Any, where: str | Path, *, quiet: bool = False) -> PackCard:
    """Checks a card and upgrades it to the current version.

    Args:
      card: parsed JSON.
      where: its source, for messages.
      quiet: do not warn about a card without a hash.

    Raises:
      StorageError: an invalid or altered card.
    """
    check_card(card, where)
    seal = files.check_seal(card, FREE, SEALED, where, quiet=quiet)
    return cast(PackCard, {**card, "version": _version(card), "card_hash": seal})


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
