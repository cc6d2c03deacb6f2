"""The plan of batches: which utterances make up each step of an epoch. Pure numpy, the same on every host.

A plan is a pure function of the utterances' lengths, a seed and an epoch, so a position in training is no more than
(epoch, step), and hosts agree on every step without talking to each other. Orders are drawn from raw bits of PCG64,
which numpy guarantees never to change, so a plan outlives an upgrade.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Overlength = Literal["error", "cut", "drop"]

_log = logging.getLogger(__name__)


class Step(NamedTuple):
    """One batch of every member that takes part. N members, M rows each.

    Attributes:
      bucket: T, the source columns of the batch; no utterance of it has more units.
      ids: int32 [N, M], utterances by their number in the split, -1 in rows that only fill the shape.
      members: int32 [N], the number of each in its bank, the bank's size for one that only fills the shape; None where
        the whole bank takes part, in its order.
    """

    bucket: int
    ids: np.ndarray
    members: np.ndarray | None = None


def buckets(lengths: np.ndarray, count: int = 6, multiple: int = 8) -> tuple[int, ...]:
    """The at most `count` bucket lengths that leave the fewest padded columns.

    Every bucket is a shape to compile: give the lengths of all splits that are to share them.

    Args:
      lengths: int [n], units of the utterances.
      count: how many buckets at most.
      multiple: bucket lengths are multiples of this.

    Returns:
      Ascending bucket lengths; the last one holds the longest utterance.
    """
    lengths = np.asarray(lengths)
    if lengths.size == 0 or lengths.min() < 1 or count < 1 or multiple < 1:
        raise ValueError(
            "buckets need at least one utterance, one unit in each, one bucket and a multiple of 1 or more"
        )
    edges, number = np.unique(-(-lengths // multiple) * multiple, return_counts=True)
    before = np.concatenate([[0], np.cumsum(number)])
    # columns[i, j]: what the utterances of edges i..j cost if they share the bucket edges[j]
    columns = (before[None, 1:] - before[:-1, None]).astype(np.float64) * edges[None, :]
    columns[np.tril_indices(len(edges), -1)] = np.inf
    cost, cuts = columns[0], []
    for _ in range(min(count, len(edges)) - 1):
        # one bucket more: the last one starts at edge i, and the best of the buckets so far end at edge i - 1
        total = np.concatenate([[np.inf], cost[:-1]])[:, None] + columns
        cuts.append(total.argmin(axis=0))
        cost = total.min(axis=0)
    last = len(edges) - 1
    chosen = [int(edges[last])]
    for cut in reversed(cuts):
        last = int(cut[last]) - 1
        chosen.append(int(edges[last]))
    return tuple(reversed(chosen))


def rows_per_step(bucket: int, max_tokens: int, max_rows: int, row_multiple: int = 8) -> int:
    """M, the rows of a step of this bucket: as many as both limits allow, in multiples of `row_multiple`.

    Raises:
      ValueError: not even `row_multiple` rows fit.
    """
    rows = min(max_rows, max_tokens // bucket) // row_multiple * row_multiple
    if rows < 1:
        needed = {"max_rows": (max_rows, row_multiple), "max_tokens": (max_tokens, bucket * row_multiple)}
        flags = [f"--config.train.{name}={least}" for name, (limit, least) in needed.items() if limit < least]
        raise ValueError(
            f"a step of bucket {bucket} takes at least row_multiple={row_multiple} rows, {bucket * row_multiple} "
            f"tokens, not max_rows={max_rows}, max_tokens={max_tokens}: give {' and '.join(flags)}, or limit the "
            "length of utterances by --config.max_length"
        )
    return rows


def longest(max_tokens: int, max_rows: int, multiple: int = 8) -> int:
    """The most units of an utterance that a batch of a training plan can hold, by the limits of `TrainConfig`.

    Raises:
      ValueError: it holds none of a bucket's least length.
    """
    rows = math.gcd(8, max_rows)
    if max_tokens < multiple * rows:
        raise ValueError(
            f"train.max_tokens={max_tokens} holds no batch of {rows} utterances of {multiple} units: "
            f"give --config.train.max_tokens={multiple * rows} or more"
        )
    return max_tokens // rows // multiple * multiple


def plan(
    lengths: np.ndarray,
    *,
    seed: int,
    epoch: int,
    buckets: Sequence[int],
    max_tokens: int,
    max_rows: int,
    row_multiple: int = 8,
    members: Sequence[int] = (0,),
    shuffle: bool = True,
    ids: np.ndarray | None = None,
) -> list[Step]:
    """The steps of an epoch: every utterance exactly once for every member of the bank.

    All members share the bucket of a step, and each has its own order of utterances. A member's order depends on
    `seed` and its own seed alone: a bank of one task gives it the very batches that it gets when trained alone. The
    number of steps depends on no seed. The last step of a bucket is filled up with -1.

    Args:
      lengths: int [n], units of every utterance of the split.
      seed: what all members share, such as the order of the buckets.
      epoch: number of the epoch.
      buckets: ascending bucket lengths; the last one must hold the longest utterance.
      max_tokens: bucket length × rows of one member stays within this.
      max_rows: rows of one member stay within this.
      row_multiple: rows of one member are a multiple of this (devices × hosts must divide the rows).
      members: the N members' own seeds.
      shuffle: False gives the order of evaluation: bucket after bucket, utterances by number, alike for all members.
      ids: int [m], the utterances to plan; all n by default.

    Returns:
      Steps, whose ids are int32 [N, rows_per_step(bucket)].

    Raises:
      ValueError: an utterance has no units or is longer than the last bucket, ids repeat, or a limit is too small.
    """
    lengths = np.asarray(lengths, np.int64)
    chosen = np.arange(len(lengths)) if ids is None else np.sort(np.asarray(ids, np.int64))
    edges = np.asarray(buckets, np.int64)
    if not len(members) or edges.size == 0 or (np.diff(edges) <= 0).any() or edges[0] < 1:
        raise ValueError(f"a plan needs a member and ascending buckets, not members={members}, buckets={buckets}")
    if chosen.size and (chosen[0] < 0 or chosen[-1] >= len(lengths) or (np.diff(chosen) == 0).any()):
        raise ValueError(f"ids must be different numbers in 0..{len(lengths) - 1}")
    picked = lengths[chosen]
    if chosen.size and (picked.min() < 1 or picked.max() > edges[-1]):
        worst = chosen[picked.argmax() if picked.max() > edges[-1] else picked.argmin()]
        raise ValueError(
            f"utterance {worst} has {lengths[worst]} units, outside 1..{edges[-1]}, the last bucket: "
            "add a longer bucket, or cut or drop what is over the limit"
        )
    steps: list[Step] = []
    bucket_of = np.searchsorted(edges, picked)
    for number, bucket in enumerate(edges.tolist()):
        inside = chosen[bucket_of == number]
        if not inside.size:
            continue
        rows = rows_per_step(bucket, max_tokens, max_rows, row_multiple)
        count = -(-len(inside) // rows)
        table = np.full((len(members), count * rows), -1, np.int32)
        for member, own in enumerate(members):
            # keyed by the bucket's length, not its number: what other buckets there are changes nothing
            order = _permutation(len(inside), seed, epoch, 1, own, bucket) if shuffle else slice(None)
            table[member, : len(inside)] = inside[order]
        steps += [Step(bucket, table[:, i * rows : (i + 1) * rows]) for i in range(count)]
    if shuffle:
        steps = [steps[i] for i in _permutation(len(steps), seed, epoch, 0)]
    return steps


def updates(batches: Sequence[int], sampling: float) -> list[int]:
    """Updates that tasks of different size get in an epoch: m^(1 - sampling) n^sampling, rounded.

    Args:
      batches: n of each task, the batches of its own epoch; m is the most of them.
      sampling: 1 gives each task its own epoch, 0 as many updates as the largest.
    """
    return [round(max(batches) ** (1 - sampling) * own**sampling) for own in batches]


def width(taking_part: int, bank: int, multiple: int = 1) -> int:
    """Members that a step is made for where so many of a bank take part: its size, 7/8, 6/8, 5/8, 1/2, 7/16 .. of it.

    At most a quarter more (but for rounding) than take part, so that a bank whose members stop one after another needs
    few programs. Rounded up to a `multiple`.
    """
    sizes = (-(-bank * part // 2 ** (k + 3)) for k in range(bank.bit_length() + 1) for part in (8, 7, 6, 5))
    return -(-min(size for size in sizes if size >= taking_part) // multiple) * multiple


def check_rows(rows: int, bank: int, shards: int) -> None:
    """A batch of all members of a bank must divide among the devices that share it; of fewer members, it is filled up.

    Args:
      rows: of a member in a batch.
      bank: its members.
      shards: devices, or groups of devices that compute together, among which rows are divided.

    Raises:
      ValueError: it does not; says which numbers of rows do.
    """
    if rows * bank % shards:
        fitting = shards // math.gcd(bank, shards)
        raise ValueError(
            f"batches of {rows} utterances of each of {bank} members do not divide among {shards} devices: set "
            f"train.max_rows to a multiple of {fitting}, such as {-(-rows // fitting) * fitting}, and train.max_tokens "
            "to that times the longest bucket, or more"
        )


def take_turns(plans: Sequence[Sequence[Step]]) -> list[Step]:
    """The steps of several plans as one: each plan keeps its order, and all are as far along as each other."""
    turns = [((2 * n + 1) / len(steps), number, n) for number, steps in enumerate(plans) for n in range(len(steps))]
    return [plans[number][n] for _, number, n in sorted(turns)]


def host_slice(step: Step, host: int | Sequence[int], hosts: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that a host reads: of equal runs of a batch's rows, counted member after member, that of its number.

    Args:
      step: the same on every host.
      host: the number of its run; or of several, ascending, where a host's devices do not follow one another in the
        mesh. Hosts whose devices compute the same rows read the same run.
      hosts: how many runs there are.

    Returns:
      ids int32 [rows of the host] and the member of each row, int32 alike.

    Raises:
      ValueError: the rows cannot be divided evenly.
    """
    own, total = np.atleast_1d(np.asarray(host, np.int64)), step.ids.size
    if not own.size or own.min() < 0 or own.max() >= hosts or total % hosts:
        raise ValueError(
            f"host {host} of {hosts} cannot have an equal part of {total} rows: make row_multiple a multiple of {hosts}"
        )
    rows = np.arange(total).reshape(hosts, -1)[own].reshape(-1)
    return step.ids.reshape(-1)[rows], (rows // step.ids.shape[1]).astype(np.int32)


def within_limit(
    lengths: np.ndarray, max_length: int | None, overlength: Overlength = "error"
) -> tuple[np.ndarray, str]:
    """Counts the utterances over the limit and says which to plan.

    Args:
      lengths: int [n], units of every utterance.
      max_length: most units that an utterance may have; None for no limit.
      overlength: "error" refuses longer ones, "cut" keeps them (to be cut: `UnitSet.cut`), "drop" leaves them out.

    Returns:
      The utterances to plan, int32, and a report in one sentence ("" if none is over the limit).

    Raises:
      ValueError: some are over the limit and `overlength` is "error", or it is no known word, or a limit below 1.
    """
    if overlength not in ("error", "cut", "drop"):
        raise ValueError(f"overlength={overlength!r} is unknown: choose 'error', 'cut' or 'drop'")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}, must be at least 1 (none: no limit)")
    lengths = np.asarray(lengths)
    every = np.arange(len(lengths), dtype=np.int32)
    over = lengths > (np.inf if max_length is None else max_length)
    if not over.any():
        return every, ""
    found = (
        f"{int(over.sum())} of {len(lengths)} utterances have more than max_length={max_length} units, "
        f"the longest {int(lengths.max())}"
    )
    if overlength == "error":
        raise ValueError(f"{found}: choose --config.overlength=cut or --config.overlength=drop")
    return (every, f"{found}: cut") if overlength == "cut" else (every[~over], f"{found}: dropped")


def few_shot(classes: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """A seeded subset with `per_class` utterances of every combination of labels (an intent).

    Combinations with fewer utterances give all they have (a warning is logged). Of one seed, fewer shots are a part of
    more shots.

    Args:
      classes: int [n, slots].
      per_class: utterances of each combination.
      seed: of the draw.

    Returns:
      Utterances, int32, ascending.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, not {per_class}")
    classes = np.asarray(classes)
    kinds, kind_of = np.unique(classes.reshape(len(classes), -1), axis=0, return_inverse=True)
    order = _permutation(len(classes), seed, 0, 2)
    order = order[np.argsort(kind_of.reshape(-1)[order], kind="stable")]
    number = np.bincount(kind_of.reshape(-1), minlength=len(kinds))
    if (short := int((number < per_class).sum())) > 0:
        _log.warning("%d of %d label combinations have fewer than %d utterances", short, len(kinds), per_class)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(number) - number, number)
    return np.sort(order[rank < per_class]).astype(np.int32)


def _permutation(n: int, seed: int, epoch: int, *purpose: int) -> np.ndarray:
    """An order of n things, from the raw bits of a generator of this purpose's own."""
    if seed < 0 or epoch < 0 or min(purpose) < 0:
        raise ValueError(f"seeds and epochs cannot be negative: seed={seed}, epoch={epoch}, of {purpose}")
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch], spawn_key=purpose))
    return np.argsort(bits.random_raw(n), kind="stable")
