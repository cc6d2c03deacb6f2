"""Unit records: utterances as units and labels in the TFDS directory format, with a card that describes them.

A directory of unit records has sharded TFRecords, metadata for `tfds.builder_from_directory`, and `unit_card.json`,
which is written last: a directory without it is incomplete. A record is a `tf.train.Example` of

    id | units [T] | durations [T] or empty | f0 [T], optional | labels/<slot>: class within the slot | provenance

Records are read without TensorFlow, which takes seconds to import.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os

import numpy as np
from etils import epath

from spjax.data.tfrecords import RecordError, read_frames
from spjax.data.unit_set import UnitSet, join, offsets_of, unit_dtype
from spjax.extras import needs
from spjax.io import atomic
from spjax.tasks import Slot, Task

CARD = "unit_card.json"
FORMAT = "spjax-unit-records"
VERSION = 1
_CARD_TYPES = {"vocabulary": int, "encoder": str, "layer": int, "kmeans": str, "merged": bool}
_CARD_TYPES |= {"durations": bool, "f0": bool, "sources": dict}


@dataclasses.dataclass(frozen=True)
class Shard:
    """A TFRecord file of a split: file name, number of records, size in bytes, and sha256."""

    file: str
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Card:
    """Contents of `unit_card.json`.

    Attributes:
      task: slots and their labels, in class order, and the metric.
      shards: files of every split, in order.
      vocabulary: number of units (k-means centroids).
      encoder: speech encoder whose features were quantised.
      layer: layer of the encoder.
      kmeans: name of the k-means model.
      merged: whether runs of equal units were merged.
      durations: whether records have durations.
      f0: whether records have f0.
      sources: sha256 of every source file.
      notes: remarks to be shown with results.
    """

    task: Task
    shards: dict[str, tuple[Shard, ...]]
    vocabulary: int = 100
    encoder: str = "hubert_base_ls960"
    layer: int = 6
    kmeans: str = "km100"
    merged: bool = True
    durations: bool = False
    f0: bool = False
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Number of utterances of every split."""
        return {split: sum(shard.records for shard in shards) for split, shards in self.shards.items()}


def load_card(directory: epath.PathLike) -> Card:
    """Read the card of a directory of unit records (local or gs://).

    Raises:
      RecordError: the directory or its card is missing, unreadable, or of another format.
    """
    path = epath.Path(directory) / CARD
    if not path.exists():
        lack = f"it has no {CARD}" if path.parent.exists() else "it does not exist"
        raise RecordError(
            f"{directory} is not a complete directory of unit records: {lack}. "
            "Make one with `python -m data_pipelines.extract` (recordings) or `data_pipelines.import_units` (text)."
            f"{atomic.where_aside(path.parent)}"
        )
    try:
        fields = json.loads(path.read_text())
        name, version = fields.pop("format"), fields.pop("version")
        fields.pop("counts")  # for human readers; redundant with the shards
        if (name, version) != (FORMAT, VERSION):
            raise RecordError(f"{path} is {name!r} version {version}; this code reads {FORMAT!r} version {VERSION}")
        task = fields.pop("task")
        if not all(isinstance(slot["labels"], list) for slot in task["slots"]):
            raise ValueError("labels are not a list")
        slots = tuple(Slot(slot["name"], tuple(slot["labels"])) for slot in task["slots"])
        card = Card(
            task=Task(task["name"], slots, task["metric"]),
            shards={split: tuple(Shard(**one) for one in some) for split, some in fields.pop("shards").items()},
            notes=tuple(fields.pop("notes")),
            **fields,
        )
        _check_card(card)
        return card
    except RecordError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path} is damaged ({error!r}): make the records again") from error


def _check_card(card: Card) -> None:
    """Raise ValueError for values of the wrong type, since a card may be edited or of another source."""
    for name, kind in _CARD_TYPES.items():
        if type(getattr(card, name)) is not kind:
            raise ValueError(f"{name} is {getattr(card, name)!r}")
    if card.vocabulary < 1:
        raise ValueError(f"vocabulary is {card.vocabulary}")
    for split, shards in card.shards.items():
        if not shards:
            raise ValueError(f"split {split!r} has no files")
        for shard in shards:
            if type(shard.records) is not int or os.path.basename(shard.file) != shard.file:
                raise ValueError(f"split {split!r} has a file {shard.file!r} of {shard.records!r} records")


def read_unit_records(directory: epath.PathLike, split: str, check: bool = True) -> tuple[UnitSet, Card]:
    """Read and validate a split of unit records.

    Args:
      directory: local or gs:// directory.
      split: name of the split.
      check: compare every shard with the sha256 in the card. Records are validated in any case.

    Returns:
      The utterances in the order of shards and records, and the card.

    Raises:
      RecordError: a shard is missing, truncated, damaged or differs from the card; a record is unreadable, has no
        units, a unit outside the vocabulary, an unknown label, or durations or f0 of the wrong length. Names the file
        and the record (from 0).
    """
    directory = epath.Path(directory)
    card = load_card(directory)
    if split not in card.shards:
        raise RecordError(f"{directory} has no split {split!r}: it has {', '.join(card.shards)}")
    parts = [_read_shard(directory / shard.file, shard, card, check) for shard in card.shards[split]]
    return join(parts), card


def _read_shard(path: epath.Path, shard: Shard, card: Card, check: bool) -> UnitSet:
    with needs("data", "reading unit records"):
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

    if not path.exists():
        raise RecordError(f"{path} is missing, but listed in {CARD}: restore it or make the records again")
    content = path.read_bytes()
    intact = not check or hashlib.sha256(content).hexdigest() == shard.sha256

    slots = [f"labels/{slot.name}" for slot in card.task.slots]
    ids: list[str] = []
    units: list[int] = []
    durations: list[int] = []
    f0: list[float] = []
    labels: list[list[int]] = []
    lengths: list[tuple[int, int, int]] = []
    for number, payload in enumerate(read_frames(content, path, check_crc=not intact)):
        try:
            feature = tf_example_pb2.Example.FromString(payload).features.feature
            (name,) = feature["id"].bytes_list.value
            ids.append(name.decode())
        except (DecodeError, ValueError) as error:
            raise RecordError(f"{path}, record {number} is not an utterance: make the records again") from error
        before = len(units), len(durations), len(f0)
        units.extend(feature["units"].int64_list.value)
        durations.extend(feature["durations"].int64_list.value)
        f0.extend(feature["f0"].float_list.value)
        lengths.append((len(units) - before[0], len(durations) - before[1], len(f0) - before[2]))
        found = [feature[slot].int64_list.value for slot in slots]
        labels.append([value[0] if len(value) == 1 else -1 for value in found])

    flat = np.asarray(units, np.int64)
    within = np.asarray(labels, np.int64).reshape(-1, len(slots))
    frames, pitch = np.asarray(durations, np.int64), np.asarray(f0, np.float32)
    fault = first_fault(flat, frames, pitch, np.asarray(lengths, np.int64).reshape(-1, 3), within, card)
    if fault:
        raise RecordError(f"{path}, record {fault[0]} ({ids[fault[0]]!r}) {fault[1]}: make the records again")
    if len(ids) != shard.records:
        raise RecordError(f"{path} has {len(ids)} records, {CARD} says {shard.records}: make the records again")
    if not intact:
        raise RecordError(f"{path} differs from {CARD} (sha256): make the records again")
    return UnitSet(
        units=flat.astype(unit_dtype(card.vocabulary)),
        offsets=offsets_of([length[0] for length in lengths]),
        classes=(within + np.asarray(card.task.slot_offsets[:-1])).astype(np.int32),
        ids=ids,
        durations=frames.astype(np.int32) if card.durations else None,
        f0=pitch if card.f0 else None,
    )


def first_fault(
    units: np.ndarray, durations: np.ndarray, f0: np.ndarray, lengths: np.ndarray, labels: np.ndarray, card: Card
) -> tuple[int, str] | None:
    """Find the first utterance that does not fit the card: (index, problem), or None.

    Args:
      units, durations, f0: flat arrays.
      lengths: int [n, 3], length of each of these for every utterance.
      labels: int [n, slots], class within the slot, -1 if missing.
      card: task, vocabulary and streams.
    """
    faults: list[tuple[int, str]] = []
    count = lengths[:, 0]
    if (empty := np.flatnonzero(count == 0)).size:
        faults.append((int(empty[0]), "has no units"))
    if (wrong := np.flatnonzero((units < 0) | (units >= card.vocabulary))).size:
        row = int(np.searchsorted(np.cumsum(count), wrong[0], side="right"))
        faults.append((row, f"has unit {units[wrong[0]]}, outside 0..{card.vocabulary - 1}"))
    sizes = np.asarray([len(slot.labels) for slot in card.task.slots])
    if (foreign := np.argwhere((labels < 0) | (labels >= sizes))).size:
        row, slot = (int(i) for i in foreign[0])
        name, label = card.task.slots[slot].name, labels[row, slot]
        known = f"whose labels are 0..{sizes[slot] - 1}"
        faults.append((row, f"has label {label} (-1: none) of slot {name!r} of {card.task.name}, {known}"))
    for column, name, has in ((1, "durations", card.durations), (2, "f0", card.f0)):
        expected = count if has else np.zeros_like(count)
        if (uneven := np.flatnonzero(lengths[:, column] != expected)).size:
            row = int(uneven[0])
            faults.append((row, f"has {lengths[row, column]} {name} for {count[row]} units, expected {expected[row]}"))
    longest = np.iinfo(np.int32).max
    if (wrong := np.flatnonzero((durations < 1) | (durations > longest))).size:
        row = int(np.searchsorted(np.cumsum(lengths[:, 1]), wrong[0], side="right"))
        faults.append((row, f"has a duration of {durations[wrong[0]]} frames, outside 1..{longest}"))
    if (wrong := np.flatnonzero(~np.isfinite(f0))).size:
        row = int(np.searchsorted(np.cumsum(lengths[:, 2]), wrong[0], side="right"))
        faults.append((row, f"has f0 {f0[wrong[0]]}, which is not finite"))
    return min(faults) if faults else None
