"""Verbalizers map classes to LM outputs, and to the tokens that are fed back for them."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from spjax import vocab
from spjax.tasks import Task

KINDS = ("learnable", "frequency", "random", "identity")


@dataclasses.dataclass(frozen=True, eq=False)
class Verbalizer:
    """Encoding of class c: output `codes[c, m]` at its m-th step, followed by the input token `fed_back[c, m]`.

    Attributes:
      kind: learnable, frequency, random or identity.
      codes: int32 [C, M], output ids of each class.
      fed_back: int32 [C, M], token ids fed back for them.
      outputs: number of outputs: C + 4 if learnable (0-3 are the specials), else V.
      slot_offsets: first class id of each slot, and C at the end.
    """

    kind: str
    codes: np.ndarray
    fed_back: np.ndarray
    outputs: int
    slot_offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.codes.shape != self.fed_back.shape or self.slot_offsets[-1] != len(self.codes):
            raise ValueError(f"{self.kind} verbalizer: codes, fed_back and slots do not match")
        for start, stop in itertools.pairwise(self.slot_offsets):
            distinct = {tuple(code) for code in self.codes[start:stop].tolist()}
            if len(distinct) != stop - start:
                raise ValueError(f"{self.kind} verbalizer: {stop - start} labels of a slot share {len(distinct)} codes")

    @property
    def learnable(self) -> bool:
        """Whether a trained matrix maps logits to outputs."""
        return self.kind == "learnable"

    @property
    def num_slots(self) -> int:
        """Number of labels of an utterance."""
        return len(self.slot_offsets) - 1

    @property
    def steps_per_slot(self) -> int:
        """M, output steps of one label."""
        return self.codes.shape[1]

    @property
    def steps(self) -> int:
        """K, label steps of an utterance."""
        return self.num_slots * self.steps_per_slot

    @property
    def allowed(self) -> Bool[np.ndarray, "K outputs"]:
        """bool [K, outputs]: outputs that some label of the slot has at each label step."""
        mask = np.zeros((self.steps, self.outputs), bool)
        for slot, (start, stop) in enumerate(itertools.pairwise(self.slot_offsets)):
            for m in range(self.steps_per_slot):
                mask[slot * self.steps_per_slot + m, self.codes[start:stop, m]] = True
        return mask


def _codes(count: int, symbols: Sequence[int]) -> np.ndarray:
    """Distinct sequences of `symbols`, int32 [count, M], with the smallest M that suffices."""
    base, length = len(symbols), 1
    while base**length < count:
        if base < 2:
            raise ValueError(f"{count} classes cannot be encoded with {base} unit")
        length += 1
    # The first symbol varies fastest, so that the first step already separates most classes.
    digits = np.arange(count)[:, None] // base ** np.arange(length)[None] % base
    return np.asarray(symbols, np.int32)[digits]


def learnable(task: Task, vocab_size: int) -> Verbalizer:
    """Make a learnable verbalizer: a trained matrix [C + 4, V] on the logits, with class c as output 4 + c.

    Class c is fed back as token 4 + c. With more classes than units, which the published code does not support, the
    index of the label in its slot modulo the number of units is used instead of c.
    """
    units = vocab_size - vocab.UNIT_OFFSET
    classes = np.arange(task.num_classes, dtype=np.int32)
    if task.num_classes > units:
        within = np.concatenate([np.arange(len(slot.labels)) for slot in task.slots])
        fed_back = (within % units).astype(np.int32) + vocab.UNIT_OFFSET
    else:
        fed_back = classes + vocab.UNIT_OFFSET
    codes = classes + len(vocab.SPECIALS)
    return Verbalizer("learnable", codes[:, None], fed_back[:, None], task.num_classes + 4, task.slot_offsets)


def _rule(kind: str, task: Task, order: Sequence[int], symbols: Sequence[int], vocab_size: int) -> Verbalizer:
    """Make a fixed verbalizer: class `order[i]` gets the i-th code over the unit tokens `symbols`."""
    words = _codes(task.num_classes, symbols)
    codes = np.empty_like(words)
    codes[np.asarray(order)] = words
    return Verbalizer(kind, codes, codes, vocab_size, task.slot_offsets)


def _by_count(values: np.ndarray, total: int) -> list[int]:
    """Sort 0..total-1 by descending frequency; ties by first occurrence, values that do not occur last."""
    seen = [value for value, _ in Counter(values.tolist()).most_common()]
    return seen + sorted(set(range(total)) - set(seen))


def frequency(
    task: Task, vocab_size: int, units: Int[np.ndarray, " total"], classes: Int[np.ndarray, "n slots"]
) -> Verbalizer:
    """Map the i-th most frequent label to the i-th most frequent unit, both counted on the train split.

    Args:
      task: slots and labels.
      vocab_size: V.
      units: int [total], units of all train utterances.
      classes: int [n, slots], class ids of the train utterances.
    """
    order = _by_count(classes.reshape(-1), task.num_classes)
    symbols = [vocab.UNIT_OFFSET + unit for unit in _by_count(units, vocab_size - vocab.UNIT_OFFSET)]
    return _rule("frequency", task, order, symbols, vocab_size)


def random(task: Task, vocab_size: int, seed: int) -> Verbalizer:
    """Map labels to random distinct units (the published code draws with replacement, so that labels may collide)."""
    symbols = np.random.default_rng(seed).permutation(np.arange(vocab.UNIT_OFFSET, vocab_size))
    return _rule("random", task, range(task.num_classes), symbols.tolist(), vocab_size)


def identity(task: Task, vocab_size: int) -> Verbalizer:
    """Map class c to unit c."""
    return _rule("identity", task, range(task.num_classes), range(vocab.UNIT_OFFSET, vocab_size), vocab_size)


def make(
    kind: str, task: Task, vocab_size: int, *, units: np.ndarray, classes: np.ndarray, seed: int = 0
) -> Verbalizer:
    """Make a verbalizer of the given kind.

    Args:
      kind: one of KINDS.
      task: slots and labels.
      vocab_size: V.
      units: int [total], units of the train split (frequency only).
      classes: int [n, slots], class ids of the train split (frequency only).
      seed: random seed (random only).

    Raises:
      ValueError: `kind` is not in KINDS.
    """
    if kind == "learnable":
        return learnable(task, vocab_size)
    if kind == "frequency":
        return frequency(task, vocab_size, units, classes)
    if kind == "random":
        return random(task, vocab_size, seed)
    if kind == "identity":
        return identity(task, vocab_size)
    raise ValueError(f"verbalizer is {kind!r}, must be one of {', '.join(KINDS)}")


def from_card(card: Mapping[str, Any], task: Task) -> Verbalizer:
    """Make the verbalizer of a prompt pack's card (fields kind, codes, feeds, outputs)."""
    codes, fed_back = (np.asarray(card[name], np.int32) for name in ("codes", "feeds"))
    return Verbalizer(card["kind"], codes, fed_back, card["outputs"], task.slot_offsets)
