"""Plain containers that more than one room handles. Shape letters: docs/design.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # importing JAX takes longer than many a command that reads files alone
    import jax

Params = dict[str, Any]  # a tree of arrays under plain string keys
Rows = Any  # an array whose first axis is a batch's rows: numpy on the host, a JAX array on devices


class KV(NamedTuple):
    """Keys and values of C columns in every layer: a deep prompt, or the cache after a prefill.

    Attributes:
      key: [L, B or 1, H, C, Dh]
      value: [L, B or 1, H, C, Dh]
    """

    key: jax.Array
    value: jax.Array


class Streams(NamedTuple):
    """Prosody beside units, column by column as the multi-stream LM takes it (docs/design.md, Prosody).

    Attributes:
      duration: int32 [..., T], frames; 0 for what is no speech.
      f0: float32 [..., T], log f0 less the speaker's mean, 0 where unvoiced; F0_PAD, F0_BOS where there is no segment.
    """

    duration: Rows
    f0: Rows


class Batch(NamedTuple):
    """Utterances laid out as source block and tail (docs/design.md). B rows; K label steps.

    Attributes:
      source: int32 [B, T], opener (`</s>`; of a multi-stream LM `<s>`) and all units but the last, as tokens,
        right-padded with PAD.
      source_length: int32 [B], tokens of `source` that are real (at least 1 for a real row).
      last: int32 [B], the last unit's token, which opens the tail.
      classes: int32 [B, slots], class id per slot (over all slots, see Task).
      prompt_id: int32 [B], row of the bank that answers; None where rows are member-major, as many of each member.
      weight: float32 [B], 1 for a real utterance, 0 for a row that only fills the shape.
      index: int32 [B], number of the utterance in its split, -1 in filling rows.
      streams: [B, T + 2] for a multi-stream LM: what goes with the source columns, with `last` and with the first
        separator; None for a unit LM.
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
    """An utterance as units. U segments, one a unit.

    Attributes:
      units: int32 [U], k-means centroids; runs of equal ones are merged unless asked otherwise.
      durations: int32 [U], encoder frames of each segment; their sum is the number of frames.
      f0: float32 [U], mean log f0 (Hz) of the segment's voiced frames less the speaker's mean, 0 where none is voiced;
        None where it was not asked for.
      notes: what was put right in the recording (`Audio.repairs`).
    """

    units: np.ndarray
    durations: np.ndarray
    f0: np.ndarray | None = None
    notes: tuple[str, ...] = ()
