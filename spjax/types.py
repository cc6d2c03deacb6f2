"""Containers shared by several packages. docs/design.md explains the shape letters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # commands that only read files should not import JAX
    import jax

PyTree = Any  # nested dicts, tuples and lists of arrays
Json = dict[str, Any]  # a JSON object
Params = dict[str, Any]  # a tree of arrays with string keys
State = dict[str, Any]  # training state: trees of arrays by name
Rows = Any  # an array whose first axis is the batch: numpy on the host, a JAX array on devices


class KV(NamedTuple):
    """Keys and values of C columns in every layer: a deep prompt, or the cache after a prefill.

    Attributes:
      key: [L, B or 1, G, C, Dh]
      value: [L, B or 1, G, C, Dh]
    """

    key: jax.Array
    value: jax.Array


class Streams(NamedTuple):
    """Prosody of a multi-stream LM's input, one value per column (docs/design.md, Prosody).

    Attributes:
      duration: int32 [..., T], frames; 0 in columns without a segment.
      f0: float32 [..., T], log f0 less the speaker's mean, 0 if unvoiced; F0_PAD, F0_BOS in columns without a segment.
    """

    duration: Rows
    f0: Rows


class Batch(NamedTuple):
    """Utterances as source block and tail (docs/design.md). B rows; K label steps.

    Attributes:
      source: int32 [B, T], opener (`</s>`; `<s>` for a multi-stream LM) and all units but the last, as tokens,
        right-padded with PAD.
      source_length: int32 [B], tokens of `source` before padding (at least 1 for a real row).
      last: int32 [B], the last unit's token, which opens the tail.
      classes: int32 [B, slots], class id per slot (over all slots, see Task).
      prompt_id: int32 [B], bank member of each row; None if rows are member-major, equally many for each member.
      weight: float32 [B], 1 for a real row, 0 for a padding row.
      index: int32 [B], index of the utterance in its split, -1 in padding rows.
      streams: [B, T + 2] for a multi-stream LM: prosody of the source columns, of `last` and of the first separator;
        None for a unit LM.
    """

    source: Rows
    source_length: Rows
    last: Rows
    classes: Rows
    prompt_id: Rows | None
    weight: Rows
    index: Rows  # type: ignore[assignment]  # tuple.index is of no use here
    streams: Streams | None = None


class Encoded(NamedTuple):
    """An utterance as units. U segments, one per unit.

    Attributes:
      units: int32 [U], k-means clusters; runs of equal units are merged unless disabled.
      durations: int32 [U], encoder frames of each segment; their sum is the number of frames.
      f0: float32 [U], mean log f0 (Hz) of the segment's voiced frames less the speaker's mean, 0 if none is voiced;
        None if f0 was not requested.
      notes: repairs of the recording (`Audio.repairs`).
    """

    units: np.ndarray
    durations: np.ndarray
    f0: np.ndarray | None = None
    notes: tuple[str, ...] = ()
