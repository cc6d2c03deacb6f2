"""In-memory unit sets: ragged utterances in flat arrays."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from spjax.types import Streams


@dataclasses.dataclass(frozen=True, eq=False)
class UnitSet:
    """A split of n utterances; utterance i is `units[offsets[i]:offsets[i + 1]]`.

    Attributes:
      units: int16 (int32 for a vocabulary above 32,768), [total length].
      offsets: int64 [n + 1].
      classes: int32 [n, slots], class ids over all slots (Task).
      ids: names of the utterances.
      durations: int32 [total length], frames; None if unknown.
      f0: float32 [total length]; None if unknown.
    """

    units: np.ndarray
    offsets: np.ndarray
    classes: np.ndarray
    ids: list[str]
    durations: np.ndarray | None = None
    f0: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        units: Sequence[Sequence[int] | np.ndarray],
        classes: Any,
        ids: Sequence[str] | None = None,
        durations: Sequence[Sequence[int] | np.ndarray] | None = None,
        f0: Sequence[Sequence[float] | np.ndarray] | None = None,
    ) -> UnitSet:
        """Make a set from lists of units and classes [n, slots]; ids default to the index of the utterance."""
        lengths = [len(one) for one in units]

        def joined(lists: Sequence[Any], dtype: Any) -> np.ndarray:
            return np.concatenate([np.zeros(0, dtype), *(np.asarray(one, dtype) for one in lists)])

        flat = joined(units, np.int64)
        return cls(
            units=flat.astype(unit_dtype(int(flat.max(initial=0)) + 1)),
            durations=None if durations is None else joined(durations, np.int32),
            f0=None if f0 is None else joined(f0, np.float32),
            offsets=offsets_of(lengths),
            classes=np.asarray(classes, np.int32).reshape(len(lengths), -1),
            ids=list(ids) if ids is not None else [str(i) for i in range(len(lengths))],
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Number of units of every utterance, int64 [n]."""
        return np.diff(self.offsets)

    def units_of(self, i: int) -> np.ndarray:
        """Units of utterance i, [T]."""
        return self.units[self.offsets[i] : self.offsets[i + 1]]

    def take(self, ids: np.ndarray) -> UnitSet:
        """Select utterances `ids` (int [m]), in that order."""
        flat = np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in ids])
        return UnitSet(
            units=self.units[flat],
            offsets=offsets_of(self.lengths[ids]),
            classes=self.classes[ids],
            ids=[self.ids[i] for i in ids],
            durations=None if self.durations is None else self.durations[flat],
            f0=None if self.f0 is None else self.f0[flat],
        )

    @property
    def streams(self) -> Streams | None:
        """Durations and f0 for a multi-stream LM; None unless both are known."""
        return None if self.durations is None or self.f0 is None else Streams(self.durations, self.f0)

    def without_streams(self) -> UnitSet:
        """Copy without durations and f0, for a unit LM."""
        return dataclasses.replace(self, durations=None, f0=None)

    def with_interpolated_f0(self) -> UnitSet:
        """Interpolate f0 linearly in Hz over unvoiced segments between voiced ones (fairseq's `interpolate_f0`).

        The subtracted speaker mean has no effect, since it scales all values in Hz.
        """
        if self.f0 is None:
            return self
        f0 = self.f0.copy()
        for start, stop in itertools.pairwise(self.offsets.tolist()):
            utterance = f0[start:stop]
            (voiced,) = np.nonzero(utterance)
            if len(voiced) > 1:
                (gaps,) = np.nonzero(utterance[voiced[0] : voiced[-1]] == 0)
                utterance[gaps + voiced[0]] = np.log(np.interp(gaps + voiced[0], voiced, np.exp(utterance[voiced])))
        return dataclasses.replace(self, f0=f0)

    def cut(self, max_length: int) -> UnitSet:
        """Truncate every utterance to its first `max_length` units."""
        lengths = self.lengths
        if not (lengths > max_length).any():
            return self
        keep = np.arange(len(self.units)) - np.repeat(self.offsets[:-1], lengths) < max_length
        return dataclasses.replace(
            self,
            units=self.units[keep],
            offsets=offsets_of(np.minimum(lengths, max_length)),
            durations=None if self.durations is None else self.durations[keep],
            f0=None if self.f0 is None else self.f0[keep],
        )


def join(parts: Sequence[UnitSet]) -> UnitSet:
    """Concatenate sets with the same streams; sets with fewer slots are padded with class 0."""

    def flat(pick: Callable[[UnitSet], np.ndarray | None]) -> np.ndarray | None:
        arrays = [array for array in map(pick, parts) if array is not None]
        return np.concatenate(arrays) if arrays else None

    if len(parts) == 1:
        return parts[0]
    slots = max(part.classes.shape[1] for part in parts)
    return UnitSet(
        units=np.concatenate([part.units for part in parts]),
        offsets=offsets_of(np.concatenate([part.lengths for part in parts])),
        classes=np.concatenate([np.pad(p.classes, ((0, 0), (0, slots - p.classes.shape[1]))) for p in parts]),
        ids=[name for part in parts for name in part.ids],
        durations=flat(lambda part: part.durations),
        f0=flat(lambda part: part.f0),
    )


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Start of each utterance in the flat arrays, and the end of the last: int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def unit_dtype(vocabulary: int) -> type[np.signedinteger]:
    """Smallest dtype for a vocabulary of this size."""
    return np.int16 if vocabulary <= 2**15 else np.int32
