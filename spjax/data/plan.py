"""Plan batches: which utterances make up each step of an epoch. Pure numpy, the same on every host.

A plan is a function of utterance lengths, seed and epoch. So a position in training is given by (epoch, step), and
hosts need no communication. Permutations use the raw bits of PCG64, which do not change between numpy versions.
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
    """One batch: M rows for each of N members.

    Attributes:
      bucket: T, source columns; the maximum number of units of an utterance.
      ids: int32 [N, M], utterance index in the split; -1: padding row.
      members: int32 [N], index of each member in its bank; the bank's size: padding. None: all members in order.
    """

    bucket: int
    ids: np.ndarray
    members: np.ndarray | None = None


def buckets(lengths: np.ndarray, count: int = 6, multiple: int = 8) -> tuple[int, ...]:
    """Choose at most `count` bucket lengths that minimise the number of padded columns.

    Args:
      lengths: int [n], units of the utterances.
      count: maximum number of buckets; each is a shape to compile.
      multiple: bucket lengths are multiples of this.

    Returns:
      Ascending bucket lengths; the last one fits the longest utterance.
    """
    lengths = np.asarray(lengths)
    if lengths.size == 0 or lengths.min() < 1 or count < 1 or multiple < 1:
        raise ValueError(
            "buckets need at least one utterance, one unit in each, one bucket and a multiple of 1 or more"
        )
    edges, number = np.unique(-(-lengths // multiple) * multiple, return_counts=True)
    before = np.concatenate([[0], np.cumsum(number)])
    # columns[i, j]: total columns of the utterances of edges i..j in a bucket of length edges[j]
    columns = (before[None, 1:] - before[:-1, None]).astype(np.float64) * edges[None, :]
    columns[np.tril_indices(len(edges), -1)] = np.inf
    cost, cuts = columns[0], []
    for _ in range(min(count, len(edges)) - 1):
        # add a bucket that starts at edge i to the best buckets that end at edge i - 1
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
    """M, rows per member in a step of this bucket: the largest multiple of `row_multiple` within both limits.

    Raises:
      ValueError: fewer than `row_multiple` rows fit.
    """
    rows = min(max_rows, max_tokens // bucket) // row_multiple * row_multiple
    if rows < 1:
        needed = {"max_rows": (max_rows, row_multiple), "max_tokens": (max_tokens, bucket * row_multiple)}
        flags = [f"--config.train.{name}={least}" for name, (limit, least) in needed.items() if limit < least]
        raise ValueError(
            f"a step of bucket {bucket} needs at least row_multiple={row_multiple} rows, {bucket * row_multiple} "
            f"tokens, but max_rows={max_rows}, max_tokens={max_tokens}: give {' and '.join(flags)}, or limit the "
            "length of utterances with --config.max_length"
        )
    return rows


def longest(max_tokens: int, max_rows: int, multiple: int = 8) -> int:
    """Maximum number of units of an utterance in a training batch with these limits of `TrainConfig`.

    Raises:
      ValueError: a batch of the shortest bucket does not fit.
    """
    rows = math.gcd(8, max_rows)
    if max_tokens < multiple * rows:
        raise ValueError(
            f"train.max_tokens={max_tokens} is too small for a batch of {rows} utterances of {multiple} units: "
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
    """Plan an epoch: every utterance exactly once for every member of the bank.

    All members share the bucket of a step; each has a different order of utterances, which depends only on `seed` and
    the member's seed, so a member gets the same batches alone and in a bank. The number of steps does not depend on the
    seeds. The last step of a bucket is padded with -1.

    Args:
      lengths: int [n], units of every utterance of the split.
      seed: seed of the order of steps, shared by all members.
      epoch: index of the epoch.
      buckets: ascending bucket lengths; the last one must fit the longest utterance.
      max_tokens: maximum of bucket length × rows of a member.
      max_rows: maximum rows of a member.
      row_multiple: rows of a member are a multiple of this.
      members: seeds of the N members.
      shuffle: False: evaluation order, by bucket and utterance index, the same for all members.
      ids: int [m], utterances to plan; None: all.

    Returns:
      Steps with ids int32 [N, rows_per_step(bucket)].

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
            f"utterance {worst} has {lengths[worst]} units, outside 1..{edges[-1]} (last bucket): "
            "add a longer bucket, or cut or drop long utterances"
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
        for member, member_seed in enumerate(members):
            # keyed by the bucket's length, so that it does not depend on the other buckets
            order = _permutation(len(inside), seed, epoch, 1, member_seed, bucket) if shuffle else slice(None)
            table[member, : len(inside)] = inside[order]
        steps += [Step(bucket, table[:, i * rows : (i + 1) * rows]) for i in range(count)]
    if shuffle:
        steps = [steps[i] for i in _permutation(len(steps), seed, epoch, 0)]
    return steps


def updates(batches: Sequence[int], sampling: float) -> list[int]:
    """Updates of each task in an epoch: m^(1 - sampling) n^sampling, rounded.

    Args:
      batches: n of each task, batches of a pass over its train set; m is their maximum.
      sampling: 1: n updates, 0: m updates.
    """
    return [round(max(batches) ** (1 - sampling) * count**sampling) for count in batches]


def check_rows(rows: int, bank: int, shards: int) -> None:
    """Raise ValueError if a batch of all members of a bank is not divisible by the batch shards.

    Args:
      rows: rows of a member in a batch.
      bank: number of members.
      shards: batch shards of the mesh.

    Raises:
      ValueError: not divisible; the message has numbers of rows that are.
    """
    if rows * bank % shards:
        fitting = shards // math.gcd(bank, shards)
        raise ValueError(
            f"batches of {rows} utterances for each of {bank} members are not divisible by {shards} devices: set "
            f"train.max_rows to a multiple of {fitting}, such as {-(-rows // fitting) * fitting}, and train.max_tokens "
            "to at least that times the longest bucket"
        )


def interleave(plans: Sequence[Sequence[Step]]) -> list[Step]:
    """Merge plans so that all progress at the same rate; the order within each plan is kept."""
    turns = [((2 * n + 1) / len(steps), number, n) for number, steps in enumerate(plans) for n in range(len(steps))]
    return [plans[number][n] for _, number, n in sorted(turns)]


def host_slice(step: Step, host: int | Sequence[int], hosts: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a step that a host reads. The member-major rows are split into `hosts` equal shards.

    Args:
      step: the same on every host.
      host: index of the host's shard, or ascending indices of several (`sharding.local_shards`).
      hosts: number of shards.

    Returns:
      ids, int32 [rows of the host], and the member of each row, int32 [rows of the host].

    Raises:
      ValueError: the rows are not divisible by `hosts`, or `host` is out of range.
    """
    shards, total = np.atleast_1d(np.asarray(host, np.int64)), step.ids.size
    if not shards.size or shards.min() < 0 or shards.max() >= hosts or total % hosts:
        raise ValueError(
            f"host {host} of {hosts}: {total} rows are not divisible by {hosts}: give a row_multiple that is"
        )
    rows = np.arange(total).reshape(hosts, -1)[shards].reshape(-1)
    return step.ids.reshape(-1)[rows], (rows // step.ids.shape[1]).astype(np.int32)


def within_limit(
    lengths: np.ndarray, max_length: int | None, overlength: Overlength = "error"
) -> tuple[np.ndarray, str]:
    """Apply a length limit: which utterances to plan.

    Args:
      lengths: int [n], units of every utterance.
      max_length: maximum number of units of an utterance; None: no limit.
      overlength: for longer utterances, "error" raises, "cut" keeps them (for `UnitSet.cut`), "drop" removes them.

    Returns:
      Utterances to plan, int32, and a message with the number of long ones ("" if there are none).

    Raises:
      ValueError: there are longer utterances and `overlength` is "error"; or an argument is invalid.
    """
    if overlength not in ("error", "cut", "drop"):
        raise ValueError(f"overlength={overlength!r} is unknown: give 'error', 'cut' or 'drop'")
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
    """Draw a random subset with `per_class` utterances of every label combination.

    Combinations with fewer utterances are used in full, with a warning. For one seed, smaller subsets are contained in
    larger ones.

    Args:
      classes: int [n, slots].
      per_class: utterances of each combination.
      seed: random seed.

    Returns:
      Utterance indices, int32, ascending.
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
    """Random permutation of 0..n-1 from the raw bits of PCG64; `purpose` separates the random streams."""
    if seed < 0 or epoch < 0 or min(purpose) < 0:
        raise ValueError(f"seeds and epochs cannot be negative: seed={seed}, epoch={epoch}, of {purpose}")
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch], spawn_key=purpose))
    return np.argsort(bits.random_raw(n), kind="stable")
