"""Unit records: utterances as units and labels in the TFDS directory format, with a card that describes them.

A directory of unit records has sharded TFRecords, metadata for `tfds.builder_from_directory`, and `unit_card.json`,
which is written last: a directory without it is incomplete. A record is a `tf.train.Example` of

    id | units [T] | durations [T] or empty | f0 [T], optional | labels/<slot>: class within the slot | provenance

Records are read without TensorFlow, which takes seconds to import.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from spjax.data.tfrecords import RecordError as RecordError
from spjax.data.tfrecords import frame, read_frames
from spjax.data.unit_set import UnitSet, join, offsets_of, unit_dtype
from spjax.extras import needs
from spjax.tasks import Slot, Task

CARD = "unit_card.json"
FORMAT = "spjax-unit-records"
VERSION = 1
UTTERANCES_PER_SHARD = 50_000
_CARD_TYPES = {"vocabulary": int, "encoder": str, "layer": int, "kmeans": str, "merged": bool}
_CARD_TYPES |= {"durations": bool, "f0": bool, "sources": dict}
# Files of a directory of unit records; only these may be overwritten.
_RECORD_FILES = re.compile(r"(unit_card|dataset_info|features)\.json|.*\.labels\.txt|.*\.tfrecord-\d+-of-\d+")


class Utterance(NamedTuple):
    """One utterance to write.

    Attributes:
      id: unique in its split.
      units: int [T] in 0..vocabulary-1, at least one.
      classes: [slots] class ids over all slots (Task).
      durations: [T] frames of each unit, or None if unknown.
      f0: [T] log f0 of each unit minus the speaker's mean, or None if unknown.
      provenance: origin of the utterance, as text.
    """

    id: str
    units: Sequence[int] | np.ndarray
    classes: Sequence[int]
    durations: Sequence[int] | np.ndarray | None = None
    f0: Sequence[float] | np.ndarray | None = None
    provenance: str = ""


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
            "Make one with `python -m data_pipelines.extract` (recordings) or `data_pipelines.import_units` (text)"
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


def write_unit_records(
    directory: epath.PathLike,
    task: Task,
    splits: Mapping[str, Iterable[Utterance]],
    *,
    shards: int | None = None,
    overwrite: bool = False,
    vocabulary: int = 100,
    encoder: str = "hubert_base_ls960",
    layer: int = 6,
    kmeans: str = "km100",
    merged: bool = True,
    sources: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Card:
    """Write unit records that `tfds.builder_from_directory` and `read_unit_records` can read.

    Records are written to a temporary sibling directory and renamed when complete. Durations and f0 are written if the
    utterances have them: all or none.

    Args:
      directory: destination; must be absent or empty unless `overwrite`.
      task: slots and labels.
      splits: utterances of every split, in order.
      shards: files per split; by default one for every 50,000 utterances.
      overwrite: replace existing records when the new ones are complete.
      vocabulary, encoder, layer, kmeans, merged, sources, notes: see Card.

    Returns:
      The card.

    Raises:
      RecordError: the directory is not free (`check_free`), a name is invalid, a split is empty, or an utterance does
        not fit the card.
    """
    directory = epath.Path(directory)
    check_free(directory, overwrite)
    _check_names(task, splits)
    if not splits:
        raise RecordError(f"no splits to write for {task.name}: name at least one")
    card = Card(
        task,
        shards={},
        vocabulary=vocabulary,
        encoder=encoder,
        layer=layer,
        kmeans=kmeans,
        merged=merged,
        sources=dict(sources or {}),
        notes=tuple(notes),
    )
    with _atomic_directory(directory) as folder:
        for split, source in splits.items():
            utterances = list(source)
            if not utterances:
                raise RecordError(f"split {split!r} of {task.name} has no utterances: remove it or add some")
            if not card.shards:
                first = utterances[0]
                card = dataclasses.replace(card, durations=first.durations is not None, f0=first.f0 is not None)
            _check_utterances(utterances, split, card)
            written = _write_split(folder, split, utterances, shards, card)
            card = dataclasses.replace(card, shards={**card.shards, split: written})
        _write_tfds_metadata(folder, card)
        _write_file(folder / CARD, _card_json(card).encode())
    return card


def check_free(directory: epath.PathLike, overwrite: bool) -> None:
    """Raise RecordError if a directory has files other than unit records, or unit records without `overwrite`."""
    directory = epath.Path(directory)
    present = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    foreign = [name for name in present if not _RECORD_FILES.fullmatch(name)]
    if foreign:
        raise RecordError(
            f"{directory} has files other than unit records ({', '.join(foreign[:3])}) and is not replaced: choose "
            "another directory"
        )
    if present and not overwrite:
        raise RecordError(
            f"{directory} is not empty: choose another directory, or replace its records with --overwrite of "
            "data_pipelines.extract or data_pipelines.import_units"
        )


# ---- reading


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
    fault = _first_fault(flat, frames, pitch, np.asarray(lengths, np.int64).reshape(-1, 3), within, card)
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


def _first_fault(
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


# ---- writing


def _check_names(task: Task, splits: Mapping[str, Any]) -> None:
    """Raise RecordError for names that are not valid in file names or label files."""
    for what, name in [("task", task.name), *(("split", split) for split in splits)]:
        if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
            raise RecordError(
                f"{what} name {name!r} is not a valid file name: use letters, digits and _, starting with a letter"
            )
    if not task.slots:
        raise RecordError(f"task {task.name} has no slots: give at least one with its labels")
    if len({slot.name for slot in task.slots}) < len(task.slots):
        raise RecordError(f"task {task.name} has a slot twice: {[slot.name for slot in task.slots]}")
    for slot in task.slots:
        if not re.fullmatch(r"\w[\w .-]*", slot.name):
            raise RecordError(
                f"slot name {slot.name!r} is not valid: use letters, digits and _ (after the first also . -)"
            )
        for label in slot.labels:
            if not label or label != label.strip() or len(label.splitlines()) > 1:
                raise RecordError(
                    f"label {label!r} of slot {slot.name!r} is not valid: it must be one line of text "
                    "without leading or trailing spaces"
                )


def _check_utterances(utterances: Sequence[Utterance], split: str, card: Card) -> None:
    slots = len(card.task.slots)
    seen: set[str] = set()
    for number, one in enumerate(utterances):
        what = f"split {split!r}, utterance {number} ({one.id!r})"
        if one.id in seen:
            raise RecordError(f"{what} has a duplicate id: ids must be unique in a split")
        seen.add(one.id)
        if len(one.classes) != slots:
            raise RecordError(f"{what} has {len(one.classes)} classes, but {card.task.name} has {slots} slots")
    streams = [(one.units, one.durations, one.f0) for one in utterances]
    lengths = [[0 if stream is None else len(stream) for stream in three] for three in streams]
    flat = np.concatenate([np.asarray(one.units, np.int64) for one in utterances])
    durations, f0 = (
        np.concatenate([np.zeros(0, np.int64), *(np.asarray(stream) for stream in streams if stream is not None)])
        for streams in ([one.durations for one in utterances], [one.f0 for one in utterances])
    )
    if durations.dtype.kind not in "iu":
        raise RecordError(f"split {split!r} has durations of type {durations.dtype}: give integers (frames)")
    fault = _first_fault(flat, durations, f0, np.asarray(lengths), _labels(utterances, card.task), card)
    if fault:
        raise RecordError(f"split {split!r}, utterance {fault[0]} ({utterances[fault[0]].id!r}) {fault[1]}")


def _labels(utterances: Sequence[Utterance], task: Task) -> np.ndarray:
    """Class within each slot, int64 [n, slots]; out of range if the class belongs to another slot."""
    labels: np.ndarray = np.asarray([one.classes for one in utterances], np.int64) - np.asarray(task.slot_offsets[:-1])
    return labels


def _write_split(
    folder: epath.Path, split: str, utterances: Sequence[Utterance], shards: int | None, card: Card
) -> tuple[Shard, ...]:
    with needs("data", "writing unit records"):
        from tensorflow_datasets.proto import tf_example_pb2

    total = len(utterances)
    if shards is not None and shards < 1:
        raise RecordError(f"shards must be at least 1, not {shards}")
    pieces = min(total, shards or -(-total // UTTERANCES_PER_SHARD))
    bounds = [total * piece // pieces for piece in range(pieces + 1)]
    labels = _labels(utterances, card.task)
    written: list[Shard] = []
    with tqdm(total=total, desc=f"{card.task.name} {split}", unit=" utterances", leave=False) as bar:
        for piece, (first, last) in enumerate(itertools.pairwise(bounds)):
            frames = []
            for i in range(first, last):
                frames.append(frame(_serialize(utterances[i], labels[i], card, tf_example_pb2)))
                bar.update()
            content = b"".join(frames)
            name = f"{card.task.name}-{split}.tfrecord-{piece:05d}-of-{pieces:05d}"
            _write_file(folder / name, content)
            written.append(Shard(name, last - first, len(content), hashlib.sha256(content).hexdigest()))
    return tuple(written)


def _serialize(utterance: Utterance, labels: np.ndarray, card: Card, pb: Any) -> bytes:
    """Serialise a tf.train.Example with the feature names of TFDS."""
    example = pb.Example()
    feature = example.features.feature
    feature["id"].bytes_list.value.append(utterance.id.encode())
    feature["provenance"].bytes_list.value.append(utterance.provenance.encode())
    feature["units"].int64_list.value.extend(np.asarray(utterance.units).tolist())
    feature["durations"].int64_list.value.extend(np.asarray(utterance.durations).tolist() if card.durations else ())
    if card.f0:
        feature["f0"].float_list.value.extend(np.asarray(utterance.f0).tolist())
    for slot, label in zip(card.task.slots, labels.tolist(), strict=True):
        feature[f"labels/{slot.name}"].int64_list.value.append(label)
    serialized: bytes = example.SerializeToString(deterministic=True)
    return serialized


def _write_tfds_metadata(folder: epath.Path, card: Card) -> None:
    with needs("data", "writing unit records"):
        import tensorflow_datasets as tfds

    features: dict[str, Any] = {
        "id": tfds.features.Text(),
        "units": tfds.features.Sequence(np.int32),
        "durations": tfds.features.Sequence(np.int32),
        "labels": tfds.features.FeaturesDict(
            {slot.name: tfds.features.ClassLabel(names=list(slot.labels)) for slot in card.task.slots}
        ),
        "provenance": tfds.features.Text(),
    }
    if card.f0:
        features["f0"] = tfds.features.Sequence(np.float32)
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=card.task.name, filetype_suffix="tfrecord")
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[shard.records for shard in shards],
                num_bytes=sum(shard.bytes for shard in shards),
                filename_template=template.replace(split=split),
            )
            for split, shards in card.shards.items()
        ],
        filename_template=template,
        disable_shuffling=True,  # so that TFDS reads shards in order, like read_unit_records
        check_data=False,  # would import TensorFlow
        description=f"Speech units of {card.task.name}: {card.encoder}, layer {card.layer}, {card.kmeans}.",
    )


def _card_json(card: Card) -> str:
    fields = {"format": FORMAT, "version": VERSION, "counts": card.counts, **dataclasses.asdict(card)}
    return json.dumps(fields, indent=1, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _atomic_directory(directory: epath.Path) -> Iterator[epath.Path]:
    """Yield a temporary sibling that replaces `directory` after the block, or is removed if the block fails."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    folder = directory.parent / f".{directory.name}.incomplete-{mark}"
    old = directory.parent / f".{directory.name}.replaced-{mark}"
    folder.mkdir()
    try:
        yield folder
        if directory.exists():
            directory.rename(old)
        if "://" in os.fspath(
            directory
        ):  # buckets rename file by file: the card last, which marks the records as complete
            directory.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.iterdir(), key=lambda path: path.name == CARD):
                path.rename(directory / path.name)
            folder.rmtree()
        else:
            folder.rename(directory)
    except BaseException:
        folder.rmtree(missing_ok=True)
        if old.exists() and not directory.exists():
            old.rename(directory)
        raise
    old.rmtree(missing_ok=True)


def _write_file(path: epath.Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        if "://" not in os.fspath(path):
            os.fsync(file.fileno())
