"""Write unit records (`spjax.data.records`)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from spjax.data.records import CARD, FORMAT, VERSION, Card, Shard, first_fault
from spjax.data.tfrecords import RecordError, frame
from spjax.extras import needs
from spjax.io import atomic
from spjax.tasks import Task

UTTERANCES_PER_SHARD = 50_000
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

    The directory appears when it is complete (`atomic.replaced_directory`). Durations and f0 are written if the
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
    check_free(directory, overwrite)
    _check_names(task, splits)
    if not splits:
        raise RecordError(f"no splits to write for {task.name}: name at least one")
    card = Card(
        task, shards={}, vocabulary=vocabulary, encoder=encoder, layer=layer, kmeans=kmeans, merged=merged,
        sources=dict(sources or {}), notes=tuple(notes),
    )  # fmt: skip
    with atomic.replaced_directory(directory, last=CARD) as folder:
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
        (folder / CARD).write_text(_card_json(card), encoding="utf-8")
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
    fault = first_fault(flat, durations, f0, np.asarray(lengths), _labels(utterances, card.task), card)
    if fault:
        raise RecordError(f"split {split!r}, utterance {fault[0]} ({utterances[fault[0]].id!r}) {fault[1]}")


def _labels(utterances: Sequence[Utterance], task: Task) -> np.ndarray:
    """Class within each slot, int64 [n, slots]; out of range if the class belongs to another slot."""
    labels: np.ndarray = np.asarray([one.classes for one in utterances], np.int64) - np.asarray(task.slot_offsets[:-1])
    return labels


def _write_split(
    folder: Path, split: str, utterances: Sequence[Utterance], shards: int | None, card: Card
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
            (folder / name).write_bytes(content)
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


def _write_tfds_metadata(folder: Path, card: Card) -> None:
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
