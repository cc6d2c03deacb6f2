"""The card of a prompt pack: fields, checks, and the tensor shapes it describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, NotRequired, TypedDict, cast

import numpy as np

from spjax.io import files
from spjax.io.files import Shape, StorageError
from spjax.io.unit_lms import block_of
from spjax.models import low_rank
from spjax.models.config import SIZES, UnitLMConfig
from spjax.tasks import LONGEST_LABEL, Slot, Task

FORMAT = "spjax-prompt-pack"
VERSION = 4  # since 3 there may be low-rank adapters, since 4 the LM may have a block; others are written as version 2
SEALED, ADAPTED = 2, 3  # since 2 the card has a hash
FREE = ("task", "metric", "results", "provenance", "licence", "description")  # do not affect predictions; not hashed


class SlotCard(TypedDict):
    """Name of a slot and its labels in class order."""

    name: str
    labels: list[str]


class VerbalizerCard(TypedDict):
    """How a class is encoded as output positions and as token ids (docs/design.md, Verbalizers).

    `codes` and `feeds` are lists of shape [C, M]. Codes of one slot are unique; an imported prompt may have
    equal codes in different slots.
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
    """Hash and architecture of the unit LM that the prompt was trained with."""

    hash: str
    vocab_size: int
    dim: int
    layers: int
    heads: int
    ffn_dim: int
    block: NotRequired[dict[str, Any]]  # `UnitLMConfig.block`, unless it is GSLM's


class PackCard(TypedDict):
    """Content of `card.json`. `make_card` makes one; `save_pack` fills in `parameters` and the hashes."""

    format: str  # "spjax-prompt-pack"
    version: int  # 2; 3 with low-rank adapters; 4 where the LM has a block
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
    lm = {"hash": lm_hash, **{name: getattr(config, name) for name in SIZES}}
    card: PackCard = {
        "format": FORMAT,
        "version": SEALED,  # see `version`
        "task": task.name,
        "slots": [{"name": slot.name, "labels": list(slot.labels)} for slot in task.slots],
        "metric": task.metric,
        "verbalizer": {
            "kind": kind,
            "codes": np.asarray(codes).tolist(),
            "feeds": np.asarray(feeds).tolist(),
            "outputs": int(outputs),
        },
        "lm": cast(LMCard, {**lm, "block": config.block} if config.block else lm),
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
    if lora:
        card["lora"] = cast(LoraCard, dict(lora))
    return {**card, "version": version(card)}


def lm_config(card: Mapping[str, Any]) -> UnitLMConfig:
    """Returns the architecture in a card, without prosody.

    Raises:
      ValueError: an invalid value.
    """
    return UnitLMConfig(**{name: card["lm"][name] for name in SIZES}, **block_of(card["lm"]))


def task_of(card: PackCard) -> Task:
    """Returns the task: slots, labels and metric."""
    slots = tuple(Slot(slot["name"], tuple(slot["labels"])) for slot in card["slots"])
    return Task(card["task"], slots, card["metric"])


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
        rank, sizes = card["lora"]["rank"], lm_config(card).kernels
        for target in card["lora"]["targets"]:
            rows, columns = sizes[target]
            shapes |= {f"{target}_a": (lm["layers"], rank, rows), f"{target}_b": (lm["layers"], rank, columns)}
    return shapes


def version(card: Mapping[str, Any]) -> int:
    """Returns the oldest format version that can hold the card."""
    return VERSION if "block" in card["lm"] else ADAPTED if "lora" in card else SEALED


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

    if isinstance(card.get("lm"), dict) and "block" in card["lm"]:
        parts["lm"]["block"] = (dict,)
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
        task = task_of(card)
        lm = lm_config(card)
        if "lora" in card:
            low_rank.check(**card["lora"], lm=lm)
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
    return cast(PackCard, {**card, "version": version(card), "card_hash": seal})
