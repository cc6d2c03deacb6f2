"""Utterances scored by prompt packs: which rows share a batch, in which shapes, by which compiled programs.

A row is an utterance and a task. Packs of one form stand side by side in a bank, whose rows mix freely; shapes of
batches are few and fixed, so that the programs are known before the first utterance comes.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from spjax.data import loader
from spjax.data.unit_set import UnitSet
from spjax.evaluation import decode
from spjax.evaluation.decode import LabelTree
from spjax.models import low_rank, prompts
from spjax.models.config import UnitLMConfig
from spjax.models.verbalizers import of_card
from spjax.serving.frozen import KINDS
from spjax.storage.packs import PromptPack
from spjax.tasks import Slot, Task
from spjax.types import Batch, Encoded, Params, Streams

BUCKETS = (32, 48, 64, 96, 128, 192, 256, 512, 1024)  # source columns; beyond, powers of two
CPU_ROWS, ROWS = (1, 4, 16), (1, 8, 64)  # of a batch: on a CPU 64 fall out of the caches and cost a third more each
MAX_SCORES = 1 << 21  # rows × columns² of a batch of several rows: what attention holds, for each head

MOST_F0 = 10  # of log Hz less a mean: a voice spans less than 3


class Shape(NamedTuple):
    """Rows and source columns of a batch: each shape is a program to compile."""

    rows: int
    columns: int


class Bank(NamedTuple):
    """Packs of one form side by side.

    Attributes:
      packs: name to pack, in the order of the members.
      params: prompt trees [N, ...], scaled and projected.
      trees: what each task may say.
      lengths: columns that each member's prompt really has; None where they are all as long.
      programs: that score it.
    """

    packs: dict[str, PromptPack]
    params: Params
    trees: list[LabelTree]
    lengths: tuple[int, ...] | None
    programs: Programs


class Programs:
    """The programs that score a bank: one for each shape of batch, compiled once, whoever asks for it first."""

    def __init__(self, config: UnitLMConfig, kind: str, trees: Sequence[LabelTree], lengths: Any) -> None:
        settings = {"config": config, "compute": KINDS[kind], "trees": trees, "lengths": lengths}
        self._score = jax.jit(functools.partial(decode.score, **settings))
        self._spoken = config.prosody is not None
        self._compiled: dict[Shape, Future[Any]] = {}
        self._lock = threading.Lock()

    def get(self, shape: Shape, lm: Params, bank: Params) -> Any:
        """The program of a shape: (lm, bank, batch) to float32 [rows, M] on the device, as `decode.score` has it."""
        with self._lock:
            first = shape not in self._compiled
            made = self._compiled.setdefault(shape, Future())
        if first:  # outside the lock: those of several shapes are compiled at once
            try:
                made.set_result(self._score.lower(lm, bank, _described(shape, self._spoken)).compile())
            except BaseException as error:
                made.set_exception(error)
                with self._lock:
                    del self._compiled[shape]
        return made.result()


def _described(shape: Shape, spoken: bool) -> Batch:
    """A batch of that shape without its numbers."""
    rows, columns = shape
    ints = lambda *sizes: jax.ShapeDtypeStruct((rows, *sizes), np.int32)  # noqa: E731
    floats = lambda *sizes: jax.ShapeDtypeStruct((rows, *sizes), np.float32)  # noqa: E731
    streams = Streams(ints(columns + 2), floats(columns + 2)) if spoken else None
    return Batch(ints(columns), ints(), ints(), ints(1), ints(), floats(), ints(), streams)


def bucket(units: int) -> int:
    """Source columns of the batches that an utterance of so many units goes into."""
    return next((edge for edge in BUCKETS if units <= edge), 1 << (units - 1).bit_length())


def row_counts(columns: int) -> tuple[int, ...]:
    """How many rows batches of a bucket may have, ascending: one, and as many more as memory allows."""
    choices = CPU_ROWS if jax.default_backend() == "cpu" else ROWS
    return tuple(rows for rows in choices if rows == 1 or rows * columns**2 <= MAX_SCORES)


def shapes(longest: int) -> list[Shape]:
    """Every shape that batches of utterances of up to `longest` units can have."""
    last, edges = bucket(longest), list(BUCKETS)
    while edges[-1] < last:
        edges.append(2 * edges[-1])
    return [Shape(rows, columns) for columns in edges if columns <= last for rows in row_counts(columns)]


def plan(lengths: np.ndarray) -> Iterator[tuple[Shape, np.ndarray]]:
    """Batches of rows: the shape of each, and the numbers of its rows, int [at most shape.rows].

    A batch is the largest that its bucket's rows fill at least by half.

    Args:
      lengths: int [n], units of every row.
    """
    columns = np.asarray([bucket(units) for units in lengths.tolist()], int)
    for edge in np.unique(columns).tolist():
        left = np.flatnonzero(columns == edge)
        while len(left):
            rows = next(rows for rows in reversed(row_counts(edge)) if 2 * len(left) >= rows)
            yield Shape(rows, edge), left[:rows]
            left = left[rows:]


def _spelled(card: Mapping[str, Any]) -> str:
    """What an answer of the card's task looks like, as text."""
    return json.dumps([card["slots"], card["verbalizer"], card["combinations"]])


@functools.lru_cache(maxsize=256)
def _tree(spelled: str) -> LabelTree:
    slots, verbalizer, combinations = json.loads(spelled)
    task = Task("", tuple(Slot(slot["name"], tuple(slot["labels"])) for slot in slots))
    return decode.label_tree(of_card(verbalizer, task), combinations)


@functools.lru_cache(maxsize=64)
def _programs(config: UnitLMConfig, kind: str, spelled: tuple[str, ...], lengths: Any, sizes: Any) -> Programs:
    """Made once for all banks whose programs are the same; `sizes` tells other prompts apart."""
    return Programs(config, kind, [_tree(one) for one in spelled], lengths)


def _form(pack: PromptPack) -> tuple[Any, ...]:
    """What packs of one bank have in common: how many labels, deep prompts' length and adapters may differ."""
    shape = {name: size for name, size in prompts.shape_of(pack.params).items() if name not in ("rank", "targets")}
    if shape["deep"]:
        del shape["length"]
    steps = len(pack.card["slots"]) * len(pack.card["verbalizer"]["codes"][0])
    return (*shape.items(), "verbalizer" in pack.params, steps)


_project = jax.jit(prompts.projected, static_argnums=(2, 3))


def make_banks(config: UnitLMConfig, lm: Params, kind: str, packs: Mapping[str, PromptPack]) -> list[Bank]:
    """Banks that hold every pack once, packs of one form in one.

    Label steps belong to the form: a task of one label would pay for the steps of another's three.

    Args:
      config: the LM's.
      lm: its weights, as `kind` has them.
      kind: of frozen.KINDS.
      packs: name to pack, all of that LM.

    Raises:
      ValueError: a pack does not say which of too many label combinations can occur.
    """
    forms: dict[Any, dict[str, PromptPack]] = {}
    for name, pack in packs.items():
        forms.setdefault(_form(pack), {})[name] = pack
    banks = []
    for (*shape, _, _), own in forms.items():
        spelled = tuple(_spelled(pack.card) for pack in own.values())
        try:
            trees = [_tree(one) for one in spelled]
        except ValueError as error:
            raise ValueError(f"prompt packs {', '.join(own)}: {error}") from error
        lengths = None
        if dict(shape)["deep"]:
            found = tuple(prompts.shape_of(pack.params)["length"] for pack in own.values())
            lengths = found if len(set(found)) > 1 else None
        joined = prompts.join([low_rank.scaled(prompts.stack([pack.params]), pack.scale) for pack in own.values()])
        params = _project(joined, lm, config, KINDS[kind])
        sizes = tuple((name, leaf.shape) for name, leaf in sorted(joined.items()))
        banks.append(Bank(own, params, trees, lengths, _programs(config, kind, spelled, lengths, sizes)))
    return banks


class Scored(NamedTuple):
    """A task's scores.

    Attributes:
      utterances: int [n], which ones were asked of it.
      log_probs: float32 [n, M], of every combination of the task's tree.
      tree: the combinations.
    """

    utterances: np.ndarray
    log_probs: np.ndarray
    tree: LabelTree


class _Work(NamedTuple):
    """A batch to come: its bank, its shape, and of each row the utterance and the member."""

    bank: Bank
    shape: Shape
    utterances: np.ndarray
    members: np.ndarray


def work(banks: Sequence[Bank], lengths: np.ndarray, asked: Sequence[Sequence[str]]) -> list[_Work]:
    """The batches that answer what is asked.

    Args:
      banks: of all packs.
      lengths: int [n], units of every utterance.
      asked: the n utterances' tasks, each a name that a bank has.
    """
    batches = []
    for bank in banks:
        member = {name: number for number, name in enumerate(bank.packs)}
        rows = [(i, member[name]) for i, names in enumerate(asked) for name in names if name in member]
        utterances, members = np.asarray(rows, np.int32).reshape(-1, 2).T
        batches += [_Work(bank, shape, utterances[own], members[own]) for shape, own in plan(lengths[utterances])]
    return batches


def score(
    lm: Params, banks: Sequence[Bank], split: UnitSet, asked: Sequence[Sequence[str]], progress: bool = False
) -> dict[str, Scored]:
    """Scores of utterances by the tasks that are asked of them.

    Args:
      lm: the LM's weights, of the kind that the banks were made for.
      banks: of all packs.
      split: n utterances, with durations and f0 for a multi-stream LM.
      asked: the n utterances' tasks.
      progress: a bar, after two seconds.

    Returns:
      Every task that is asked of an utterance.
    """
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    batches = work(banks, split.lengths, asked)
    with tqdm(total=sum(len(one.utterances) for one in batches), unit="row", delay=2, disable=not progress) as bar:
        for bank, shape, utterances, members in batches:
            fill = (0, shape.rows - len(utterances))
            ids = np.pad(utterances, fill, constant_values=-1)
            batch = loader.make_batch(split, ids, shape.columns, np.pad(members, fill))
            done = np.asarray(bank.programs.get(shape, lm, bank.params)(lm, bank.params, batch))
            for number, (name, tree) in enumerate(zip(bank.packs, bank.trees, strict=True)):
                mine = np.flatnonzero(members == number)
                if len(mine):
                    found.setdefault(name, []).append((utterances[mine], done[mine, : len(tree.combinations)]))
            bar.update(len(utterances))
    trees = {name: tree for bank in banks for name, tree in zip(bank.packs, bank.trees, strict=True)}
    joined = {name: [np.concatenate(parts) for parts in zip(*each, strict=True)] for name, each in found.items()}
    return {name: Scored(utterances, log_probs, trees[name]) for name, (utterances, log_probs) in joined.items()}


def read_off(task: Task, scored: Scored) -> tuple[np.ndarray, list[np.ndarray]]:
    """What a task's scores say: class ids int32 [n, slots], and probabilities float32 [n, C_k] of each slot.

    The classes are the likeliest combination's, which may differ from each slot's own likeliest label.
    """
    by_slot = decode.slot_probabilities(scored.log_probs, scored.tree, task.slot_offsets)
    return scored.tree.combinations[scored.log_probs.argmax(axis=1)], by_slot


def answer(
    lm: Params, banks: Sequence[Bank], split: UnitSet, asked: Sequence[Sequence[str]], progress: bool = False
) -> list[dict[str, Any]]:
    """Labels and probabilities of utterances; arguments as `score`'s.

    Returns:
      For each utterance, in the order asked: `{task: {"labels": {slot: label}, "probabilities": {slot: {label: p}}}}`.
    """
    packs = {name: pack for bank in banks for name, pack in bank.packs.items()}
    found: list[dict[str, Any]] = [dict.fromkeys(names) for names in asked]
    for name, scored in score(lm, banks, split, asked, progress).items():
        task = packs[name].task
        classes, by_slot = read_off(task, scored)
        said = classes - np.asarray(task.slot_offsets[:-1])
        for row, i in enumerate(scored.utterances.tolist()):
            labels = {slot.name: slot.labels[said[row, k]] for k, slot in enumerate(task.slots)}
            shares = [
                dict(zip(slot.labels, by_slot[k][row].tolist(), strict=True)) for k, slot in enumerate(task.slots)
            ]
            found[i][name] = {"labels": labels, "probabilities": dict(zip(labels, shares, strict=True))}
    return found


def unit_set(units: Sequence[Any], config: UnitLMConfig) -> UnitSet:
    """Utterances as the LM takes them, each checked; their classes are not known.

    Args:
      units: an utterance's units each, or Encoded, with f0 for a multi-stream LM.
      config: the LM's.

    Raises:
      ValueError: an utterance without units, or without prosody for a multi-stream LM, or a unit that the LM does not
        know.
    """
    rows = []
    for i, utterance in enumerate(units):
        said = utterance.units if isinstance(utterance, Encoded) else utterance
        try:
            row = np.asarray(said)
        except ValueError:  # lists of different lengths
            row = np.empty(0)
        if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"utterance {i} must be a list of at least one unit, not {said!r}")
        if row.min() < 0 or row.max() >= config.num_units:
            raise ValueError(
                f"utterance {i} has units {row.min()}..{row.max()}, the LM knows 0..{config.num_units - 1}"
            )
        rows.append(row)
    unknown = np.zeros((len(rows), 1), np.int32)
    if config.prosody is None:
        return UnitSet.of(rows, unknown)
    for i, (utterance, row) in enumerate(zip(units, rows, strict=True)):
        if not isinstance(utterance, Encoded) or utterance.f0 is None:
            raise ValueError(
                f"utterance {i} has no f0, which a multi-stream LM wants: give encode(audio, encoder, f0=True)"
            )
        durations, f0 = np.asarray(utterance.durations), np.asarray(utterance.f0)
        if not (durations.shape == f0.shape == row.shape and durations.dtype.kind in "iuf" and f0.dtype.kind in "iuf"):
            raise ValueError(
                f"utterance {i} has {len(row)} units, durations {durations.dtype} {list(durations.shape)} and f0 "
                f"{f0.dtype} {list(f0.shape)}: give a number for each unit"
            )
        whole = (durations >= 0) & (durations < 2**31) & (durations == np.floor(durations))
        if not (whole.all() and (np.abs(f0) < MOST_F0).all()):  # of what is no number neither is true
            raise ValueError(
                f"utterance {i} has durations {durations.min()}..{durations.max()} and f0 {f0.min()}..{f0.max()}: give "
                f"whole frames, none below 0, and log f0 less a mean, between -{MOST_F0} and {MOST_F0}"
            )
    split = UnitSet.of(rows, unknown, durations=[one.durations for one in units], f0=[one.f0 for one in units])
    return split.with_interpolated_f0() if config.prosody.interpolate_f0 else split
