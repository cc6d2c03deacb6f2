"""Batched scoring of utterances by prompt packs: batches, their shapes, and the compiled programs.

A row is an utterance and a task. Packs of one shape are stacked in a bank, and rows of a batch may use any of its
packs. Batch shapes are few and fixed, so that the programs can be compiled before the first request.
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
from spjax.io.packs import PromptPack
from spjax.models import decode, low_rank, prompts
from spjax.models.config import UnitLMConfig
from spjax.models.decode import LabelTree
from spjax.models.verbalizers import from_card
from spjax.serving.frozen import KINDS
from spjax.tasks import Slot, Task
from spjax.types import Batch, Encoded, Params, Streams

BUCKETS = (32, 48, 64, 96, 128, 192, 256, 512, 1024)  # source columns; powers of two beyond
CPU_ROWS, ROWS = (1, 4, 16), (1, 8, 64)  # rows of a batch: on CPUs, 64 overflow the caches and cost a third more each
MAX_SCORES = 1 << 21  # rows × columns² of a batch: bounds the attention scores of a head

MOST_F0 = 10  # bound on log f0 less the speaker's mean: a voice spans less than 3


class Shape(NamedTuple):
    """Rows and source columns of a batch; each shape is a program to compile."""

    rows: int
    columns: int


class Bank(NamedTuple):
    """Packs of one shape, stacked.

    Attributes:
      packs: packs by name, in member order.
      params: prompt trees [N, ...], scaled and projected.
      trees: label tree of each pack.
      lengths: prompt length of each member before padding; None if all are equal.
      programs: that score the bank.
    """

    packs: dict[str, PromptPack]
    params: Params
    trees: list[LabelTree]
    lengths: tuple[int, ...] | None
    programs: Programs


class Programs:
    """The compiled programs of a bank, one per batch shape, each compiled once; thread-safe."""

    def __init__(self, config: UnitLMConfig, kind: str, trees: Sequence[LabelTree], lengths: Any) -> None:
        settings = {"config": config, "compute": KINDS[kind], "trees": trees, "lengths": lengths}
        self._score = jax.jit(functools.partial(decode.score, **settings))
        self._streams = config.prosody is not None
        self._compiled: dict[Shape, Future[Any]] = {}
        self._lock = threading.Lock()

    def get(self, shape: Shape, lm: Params, bank: Params) -> Any:
        """The program of a shape: (lm, bank, batch) to float32 [rows, M] on the device, see `decode.score`."""
        with self._lock:
            first = shape not in self._compiled
            made = self._compiled.setdefault(shape, Future())
        if first:  # outside the lock, so that several shapes compile in parallel
            try:
                made.set_result(self._score.lower(lm, bank, _described(shape, self._streams)).compile())
            except BaseException as error:
                made.set_exception(error)
                with self._lock:
                    del self._compiled[shape]
        return made.result()


def _described(shape: Shape, with_streams: bool) -> Batch:
    """Shapes and dtypes of a batch."""
    rows, columns = shape
    ints = lambda *sizes: jax.ShapeDtypeStruct((rows, *sizes), np.int32)  # noqa: E731
    floats = lambda *sizes: jax.ShapeDtypeStruct((rows, *sizes), np.float32)  # noqa: E731
    streams = Streams(ints(columns + 2), floats(columns + 2)) if with_streams else None
    return Batch(ints(columns), ints(), ints(), ints(1), ints(), floats(), ints(), streams)


def bucket(units: int) -> int:
    """Source columns of the bucket for an utterance of `units` units."""
    return next((edge for edge in BUCKETS if units <= edge), 1 << (units - 1).bit_length())


def row_counts(columns: int) -> tuple[int, ...]:
    """Row counts for batches of a bucket, ascending: 1, and those that fit in memory."""
    choices = CPU_ROWS if jax.default_backend() == "cpu" else ROWS
    return tuple(rows for rows in choices if rows == 1 or rows * columns**2 <= MAX_SCORES)


def shapes(longest: int) -> list[Shape]:
    """All batch shapes for utterances of up to `longest` units."""
    last, edges = bucket(longest), list(BUCKETS)
    while edges[-1] < last:
        edges.append(2 * edges[-1])
    return [Shape(rows, columns) for columns in edges if columns <= last for rows in row_counts(columns)]


def plan(lengths: np.ndarray) -> Iterator[tuple[Shape, np.ndarray]]:
    """Split rows into batches.

    A batch has the largest of its bucket's row counts that is at least half filled.

    Args:
      lengths: int [n], units of every row.

    Yields:
      The shape of a batch, and the indices of its rows, int [<= shape.rows].
    """
    columns = np.asarray([bucket(units) for units in lengths.tolist()], int)
    for edge in np.unique(columns).tolist():
        left = np.flatnonzero(columns == edge)
        while len(left):
            rows = next(rows for rows in reversed(row_counts(edge)) if 2 * len(left) >= rows)
            yield Shape(rows, edge), left[:rows]
            left = left[rows:]


def _label_spec(card: Mapping[str, Any]) -> str:
    """A hashable key of a card's label sequences (JSON)."""
    return json.dumps([card["slots"], card["verbalizer"], card["combinations"]])


@functools.lru_cache(maxsize=256)
def _tree(spec: str) -> LabelTree:
    slots, verbalizer, combinations = json.loads(spec)
    task = Task("", tuple(Slot(slot["name"], tuple(slot["labels"])) for slot in slots))
    return decode.label_tree(from_card(verbalizer, task), combinations)


@functools.lru_cache(maxsize=64)
def _programs(config: UnitLMConfig, kind: str, specs: tuple[str, ...], lengths: Any, sizes: Any) -> Programs:
    """Programs shared by all banks with equal arguments; `sizes` (of the prompts) is only part of the cache key."""
    return Programs(config, kind, [_tree(spec) for spec in specs], lengths)


def _bank_key(pack: PromptPack) -> tuple[Any, ...]:
    """What packs of a bank must share; the number of labels, lengths of deep prompts and adapters may differ."""
    shape = {name: size for name, size in prompts.shape_of(pack.params).items() if name not in ("rank", "targets")}
    if shape["deep"]:
        del shape["length"]
    steps = len(pack.card["slots"]) * len(pack.card["verbalizer"]["codes"][0])
    return (*shape.items(), "verbalizer" in pack.params, steps)


_project = jax.jit(prompts.projected, static_argnums=(2, 3))


def make_banks(config: UnitLMConfig, lm: Params, kind: str, packs: Mapping[str, PromptPack]) -> list[Bank]:
    """Group packs into banks, one for each shape of prompt and number of label steps.

    A task of one label step in a bank of three would pay for all three.

    Args:
      config: the LM's.
      lm: the LM's weights, cast or quantized to `kind`.
      kind: a key of frozen.KINDS.
      packs: packs of that LM by name.

    Raises:
      ValueError: a pack has too many label combinations and does not list those that occur.
    """
    groups: dict[Any, dict[str, PromptPack]] = {}
    for name, pack in packs.items():
        groups.setdefault(_bank_key(pack), {})[name] = pack
    banks = []
    for (*shape, _, _), members in groups.items():
        specs = tuple(_label_spec(pack.card) for pack in members.values())
        try:
            trees = [_tree(spec) for spec in specs]
        except ValueError as error:
            raise ValueError(f"prompt packs {', '.join(members)}: {error}") from error
        lengths = None
        if dict(shape)["deep"]:
            found = tuple(prompts.shape_of(pack.params)["length"] for pack in members.values())
            lengths = found if len(set(found)) > 1 else None
        joined = prompts.join([low_rank.scaled(prompts.stack([pack.params]), pack.scale) for pack in members.values()])
        params = _project(joined, lm, config, KINDS[kind])
        sizes = tuple((name, leaf.shape) for name, leaf in sorted(joined.items()))
        banks.append(Bank(members, params, trees, lengths, _programs(config, kind, specs, lengths, sizes)))
    return banks


class Scored(NamedTuple):
    """A task's scores for the n utterances that it was requested for.

    Attributes:
      utterances: int [n], their indices.
      log_probs: float32 [n, M], log probability of each label combination of `tree`.
      tree: the combinations.
    """

    utterances: np.ndarray
    log_probs: np.ndarray
    tree: LabelTree


class _PlannedBatch(NamedTuple):
    """A batch to compute: its bank, its shape, and the utterance and bank member of each row."""

    bank: Bank
    shape: Shape
    utterances: np.ndarray
    members: np.ndarray


def plan_batches(banks: Sequence[Bank], lengths: np.ndarray, requested: Sequence[Sequence[str]]) -> list[_PlannedBatch]:
    """Plan the batches for utterances and tasks.

    Args:
      banks: the banks of all packs.
      lengths: int [n], units of every utterance.
      requested: task names for each of the n utterances.
    """
    batches = []
    for bank in banks:
        member = {name: number for number, name in enumerate(bank.packs)}
        rows = [(i, member[name]) for i, names in enumerate(requested) for name in names if name in member]
        utterances, members = np.asarray(rows, np.int32).reshape(-1, 2).T
        batches += [_PlannedBatch(bank, shape, utterances[i], members[i]) for shape, i in plan(lengths[utterances])]
    return batches


def score(
    lm: Params, banks: Sequence[Bank], split: UnitSet, requested: Sequence[Sequence[str]], progress: bool = False
) -> dict[str, Scored]:
    """Score utterances by the requested tasks.

    Args:
      lm: the LM's weights, of the kind that the banks were made for.
      banks: the banks of all packs.
      split: n utterances, with durations and f0 for a multi-stream LM.
      requested: task names for each of the n utterances.
      progress: show a progress bar after two seconds.

    Returns:
      Scores of every task that is requested for at least one utterance.
    """
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    batches = plan_batches(banks, split.lengths, requested)
    with tqdm(
        total=sum(len(one.utterances) for one in batches), unit="row", delay=2, disable=not progress, leave=False
    ) as bar:
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


def decode_scores(task: Task, scored: Scored) -> tuple[np.ndarray, list[np.ndarray]]:
    """Predicted class ids int32 [n, slots], and each slot's label probabilities float32 [n, C_k].

    The classes are those of the most probable combination, which may differ from the most probable label of each slot.
    """
    by_slot = decode.slot_probabilities(scored.log_probs, scored.tree, task.slot_offsets)
    return scored.tree.combinations[scored.log_probs.argmax(axis=1)], by_slot


def answer(
    lm: Params, banks: Sequence[Bank], split: UnitSet, requested: Sequence[Sequence[str]], progress: bool = False
) -> list[dict[str, Any]]:
    """Predict labels and probabilities; arguments as for `score`.

    Returns:
      For each utterance, in order: `{task: {"labels": {slot: label}, "probabilities": {slot: {label: p}}}}`.
    """
    packs = {name: pack for bank in banks for name, pack in bank.packs.items()}
    found: list[dict[str, Any]] = [dict.fromkeys(names) for names in requested]
    for name, scored in score(lm, banks, split, requested, progress).items():
        task = packs[name].task
        classes, by_slot = decode_scores(task, scored)
        best = classes - np.asarray(task.slot_offsets[:-1])
        for row, i in enumerate(scored.utterances.tolist()):
            labels = {slot.name: slot.labels[best[row, k]] for k, slot in enumerate(task.slots)}
            shares = [
                dict(zip(slot.labels, by_slot[k][row].tolist(), strict=True)) for k, slot in enumerate(task.slots)
            ]
            found[i][name] = {"labels": labels, "probabilities": dict(zip(labels, shares, strict=True))}
    return found


def unit_set(units: Sequence[Any], config: UnitLMConfig, cut: bool = False) -> UnitSet:
    """Check utterances and collect them in a UnitSet, with zeros for their unknown classes.

    Args:
      units: for each utterance its units, or Encoded, with f0 for a multi-stream LM.
      config: the LM's.
      cut: the caller refuses or cuts utterances that are longer than the LM's learned positions allow.

    Raises:
      ValueError: an utterance without units, longer than the LM's learned positions allow (unless `cut`), or without
        prosody for a multi-stream LM, or a unit outside the LM's vocabulary.
    """
    rows = []
    for i, utterance in enumerate(units):
        given = utterance.units if isinstance(utterance, Encoded) else utterance
        try:
            row = np.asarray(given)
        except ValueError:  # nested lists of different lengths
            row = np.empty(0)
        if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"utterance {i} must be a list of at least one unit, not {given!r}")
        if row.min() < 0 or row.max() >= config.num_units:
            raise ValueError(f"utterance {i} has units {row.min()}..{row.max()}, the LM has 0..{config.num_units - 1}")
        if not cut and config.most_units and len(row) > config.most_units:
            raise ValueError(
                f"utterance {i} has {len(row)} units, but the LM has positions for {config.most_units}: cut it"
            )
        rows.append(row)
    unknown = np.zeros((len(rows), 1), np.int32)
    if config.prosody is None:
        return UnitSet.of(rows, unknown)
    for i, (utterance, row) in enumerate(zip(units, rows, strict=True)):
        if not isinstance(utterance, Encoded) or utterance.f0 is None:
            raise ValueError(
                f"utterance {i} has no f0, which a multi-stream LM needs: give encode(audio, encoder, f0=True)"
            )
        durations, f0 = np.asarray(utterance.durations), np.asarray(utterance.f0)
        if not (durations.shape == f0.shape == row.shape and durations.dtype.kind in "iuf" and f0.dtype.kind in "iuf"):
            raise ValueError(
                f"utterance {i} has {len(row)} units, durations {durations.dtype} {list(durations.shape)} and f0 "
                f"{f0.dtype} {list(f0.shape)}: give a number for each unit"
            )
        integral = (durations >= 0) & (durations < 2**31) & (durations == np.floor(durations))
        if not (integral.all() and (np.abs(f0) < MOST_F0).all()):  # both are false for NaN
            raise ValueError(
                f"utterance {i} has durations {durations.min()}..{durations.max()} and f0 {f0.min()}..{f0.max()}: give "
                f"durations in frames (integers >= 0), and log f0 less a mean, between -{MOST_F0} and {MOST_F0}"
            )
    split = UnitSet.of(rows, unknown, durations=[one.durations for one in units], f0=[one.f0 for one in units])
    return split.with_interpolated_f0() if config.prosody.interpolate_f0 else split
