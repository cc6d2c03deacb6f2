"""Verbalizers: how a class is read off the LM's output, and which token says it when it is fed back."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spjax import vocab
from spjax.tasks import Task

KINDS = ("learnable", "frequency", "random", "identity")


@dataclasses.dataclass(frozen=True, eq=False)
class Verbalizer:
    """Class c is output `codes[c, m]` at its m-th step, and is fed back as token `feeds[c, m]`.

    Attributes:
      kind: learnable, frequency, random or identity.
      codes: int32 [C, M], outputs that spell each class.
      feeds: int32 [C, M], tokens that are fed back for them.
      outputs: width of the output: C + 4 if learnable (0-3 are the specials), else V.
      slot_offsets: first class id of each slot, and C at the end.
    """

    kind: str
    codes: np.ndarray
    feeds: np.ndarray
    outputs: int
    slot_offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.codes.shape != self.feeds.shape or self.slot_offsets[-1] != len(self.codes):
            raise ValueError(f"{self.kind} verbalizer: codes, feeds and slots do not belong together")
        for start, stop in itertools.pairwise(self.slot_offsets):
            spelled = {tuple(code) for code in self.codes[start:stop].tolist()}
            if len(spelled) != stop - start:
                raise ValueError(
                    f"{self.kind} verbalizer: {stop - start} labels of a slot share {len(spelled)} spellings"
                )

    @property
    def learnable(self) -> bool:
        """Whether a trained matrix maps the logits to the outputs."""
        return self.kind == "learnable"

    @property
    def num_slots(self) -> int:
        """Labels of an utterance."""
        return len(self.slot_offsets) - 1

    @property
    def steps_per_slot(self) -> int:
        """M, outputs that spell one label."""
        return self.codes.shape[1]

    @property
    def steps(self) -> int:
        """K, label steps of an utterance."""
        return self.num_slots * self.steps_per_slot

    @property
    def allowed(self) -> np.ndarray:
        """bool [K, outputs]: what may be said at each label step by any label of its slot."""
        mask = np.zeros((self.steps, self.outputs), bool)
        for slot, (start, stop) in enumerate(itertools.pairwise(self.slot_offsets)):
            for m in range(self.steps_per_slot):
                mask[slot * self.steps_per_slot + m, self.codes[start:stop, m]] = True
        return mask


def _spellings(count: int, symbols: Sequence[int]) -> np.ndarray:
    """The first `count` words over `symbols`, all of the shortest length that gives enough; int32 [count, M]."""
    base, length = len(symbols), 1
    while base**length < count:
        if base < 2:
            raise ValueError(f"{count} classes cannot be spelled with {base} unit")
        length += 1
    # The last symbol varies slowest, so that with few classes the first step already tells most of them apart.
    digits = np.arange(count)[:, None] // base ** np.arange(length)[None] % base
    return np.asarray(symbols, np.int32)[digits]


def learnable(task: Task, vocab_size: int) -> Verbalizer:
    """A trained matrix [C + 4, V] on the logits; class c is output 4 + c (FACTS.md).

    Fed back, class c is token 4 + c. Where C classes are more than the units, which the reference cannot do, it
    is the token of its number within its slot, modulo the units.
    """
    units = vocab_size - vocab.UNIT_OFFSET
    classes = np.arange(task.num_classes, dtype=np.int32)
    if task.num_classes > units:
        within = np.concatenate([np.arange(len(slot.labels)) for slot in task.slots])
        feeds = (within % units).astype(np.int32) + vocab.UNIT_OFFSET
    else:
        feeds = classes + vocab.UNIT_OFFSET
    codes = classes + len(vocab.SPECIALS)
    return Verbalizer("learnable", codes[:, None], feeds[:, None], task.num_classes + 4, task.slot_offsets)


def _rule(kind: str, task: Task, order: Sequence[int], symbols: Sequence[int], vocab_size: int) -> Verbalizer:
    """`order[i]` is the class that takes the i-th spelling over the unit tokens `symbols`."""
    words = _spellings(task.num_classes, symbols)
    codes = np.empty_like(words)
    codes[np.asarray(order)] = words
    return Verbalizer(kind, codes, codes, vocab_size, task.slot_offsets)


def _by_count(values: np.ndarray, total: int) -> list[int]:
    """0..total-1, most frequent first; ties in order of first appearance, the unseen last."""
    seen = [value for value, _ in Counter(values.tolist()).most_common()]
    return seen + sorted(set(range(total)) - set(seen))


def frequency(task: Task, vocab_size: int, units: np.ndarray, classes: np.ndarray) -> Verbalizer:
    """The i-th most frequent label takes the i-th most frequent unit, both counted on the train split.

    Args:
      task: slots and labels.
      vocab_size: V.
      units: int [any], all units of the train split in order.
      classes: int [n, slots], class ids of its utterances.
    """
    order = _by_count(classes.reshape(-1), task.num_classes)
    symbols = [vocab.UNIT_OFFSET + unit for unit in _by_count(units, vocab_size - vocab.UNIT_OFFSET)]
    return _rule("frequency", task, order, symbols, vocab_size)


def random(task: Task, vocab_size: int, seed: int) -> Verbalizer:
    """Units drawn once from a seed, without collision (the reference draws anew per label, so labels collide)."""
    symbols = np.random.default_rng(seed).permutation(np.arange(vocab.UNIT_OFFSET, vocab_size))
    return _rule("random", task, range(task.num_classes), symbols.tolist(), vocab_size)


def identity(task: Task, vocab_size: int) -> Verbalizer:
    """Class c is unit c."""
    return _rule("identity", task, range(task.num_classes), range(vocab.UNIT_OFFSET, vocab_size), vocab_size)


def make(
    kind: str, task: Task, vocab_size: int, *, units: np.ndarray, classes: np.ndarray, seed: int = 0
) -> Verbalizer:
    """The verbalizer that a config names.

    Args:
      kind: one of KINDS.
      task: slots and labels.
      vocab_size: V.
      units: units of the train split (frequency only).
      classes: class ids of the train split (frequency only).
      seed: draw of the random verbalizer.

    Raises:
      ValueError: no such kind.
    """
    if kind == "learnable":
        return learnable(task, vocab_size)
    if kind == "frequency":
        return frequency(task, vocab_size, units, classes)
    if kind == "random":
        return random(task, vocab_size, seed)
    if kind == "identity":
        return identity(task, vocab_size)
    raise ValueError(f"verbalizer {kind!r} is none of {', '.join(KINDS)}")


def of_card(card: Mapping[str, Any], task: Task) -> Verbalizer:
    """The verbalizer that a prompt pack's card describes (kind, codes, feeds, outputs)."""
    codes, feeds = (np.asarray(card[name], np.int32) for name in ("codes", "feeds"))
    return Verbalizer(card["kind"], codes, feeds, card["outputs"], task.slot_offsets)
