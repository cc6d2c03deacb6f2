"""Unit records: round trip, TFDS's view of them, atomic writing, and every kind of damage."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spjax.data import tfrecords, write_records
from spjax.data.records import CARD, load_card, read_unit_records
from spjax.data.tfrecords import RecordError
from spjax.data.unit_set import UnitSet
from spjax.data.write_records import Utterance, write_unit_records
from spjax.tasks import Slot, Task

TASK = Task(
    "rooms",
    (Slot("action", ("turn on", "turn off", "none")), Slot("room", ("none", "größe kitchen"))),
    metric="exact_match",
)


def _utterances(count: int, seed: int = 0, streams: bool = False) -> list[Utterance]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        length = int(rng.integers(1, 30))
        made.append(
            Utterance(
                id=f"spk/{i}.wav",
                units=rng.integers(0, 100, length),
                classes=(int(rng.integers(0, 3)), 3 + int(rng.integers(0, 2))),
                durations=rng.integers(1, 9, length) if streams else None,
                f0=rng.normal(size=length).astype(np.float32) if streams else None,
                provenance=f"made:{i}",
            )
        )
    return made


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records") / "rooms"
    write_unit_records(folder, TASK, {"train": _utterances(25), "test": _utterances(7, 1)}, shards=3)
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "rooms"))


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("shards", [None, 1, 4, 100])
def test_written_records_are_read_back_in_order(tmp_path: Path, streams: bool, shards: int | None) -> None:
    wrote = _utterances(11, streams=streams)
    card = write_unit_records(
        tmp_path / "out", TASK, {"train": wrote}, shards=shards, layer=9, sources={"a.txt": "00"}, notes=["seen"]
    )
    read, again = read_unit_records(tmp_path / "out", "train")
    assert again == card == load_card(tmp_path / "out")
    assert card.task == TASK
    assert card.counts == {"train": 11}
    assert (card.layer, card.sources, card.notes) == (9, {"a.txt": "00"}, ("seen",))
    assert len(card.shards["train"]) == min(shards or 1, 11)
    assert read.ids == [one.id for one in wrote]
    assert read.units.dtype == np.int16
    assert read.classes.dtype == np.int32
    np.testing.assert_array_equal(read.classes, [one.classes for one in wrote])
    np.testing.assert_array_equal(read.lengths, [len(one.units) for one in wrote])
    for i, one in enumerate(wrote):
        np.testing.assert_array_equal(read.units_of(i), one.units)
    assert (card.durations, card.f0) == (streams, streams)
    if streams:
        np.testing.assert_array_equal(read.durations, np.concatenate([one.durations for one in wrote]))
        np.testing.assert_array_equal(read.f0, np.concatenate([one.f0 for one in wrote]))
    else:
        assert read.durations is None
        assert read.f0 is None


@pytest.mark.parametrize("streams", [False, True])
def test_tfds_reads_the_directory(tmp_path: Path, streams: bool) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")
    wrote = _utterances(9, streams=streams)
    write_unit_records(tmp_path / "out", TASK, {"train": wrote, "test": _utterances(2, 1, streams)}, shards=2)
    builder = tfds.builder_from_directory(str(tmp_path / "out"))
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 9, "test": 2}
    assert builder.info.features["labels"]["action"].names == ["turn on", "turn off", "none"]
    assert builder.info.features["labels"]["room"].names == ["none", "größe kitchen"]
    found = list(tfds.as_numpy(builder.as_dataset("train")))
    assert len(found) == len(wrote)
    for one, example in zip(wrote, found, strict=True):
        assert example["id"].decode() == one.id
        assert example["provenance"].decode() == one.provenance
        np.testing.assert_array_equal(example["units"], one.units)
        assert (example["labels"]["action"], example["labels"]["room"] + 3) == one.classes
        np.testing.assert_array_equal(example["durations"], one.durations if streams else [])
        if streams:
            np.testing.assert_array_equal(example["f0"], one.f0)


def test_frames_equal_tensorflows(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    payloads = [b"", b"a", bytes(range(256)) * 5]
    with tf.io.TFRecordWriter(str(tmp_path / "theirs")) as writer:
        for payload in payloads:
            writer.write(payload)
    assert b"".join(map(tfrecords.frame, payloads)) == (tmp_path / "theirs").read_bytes()


def test_crc_of_the_standard_check_string() -> None:
    crc = 0xE3069283  # CRC-32C of "123456789" (RFC 3720's polynomial)
    assert tfrecords.masked_crc(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_the_same_utterances_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write_unit_records(tmp_path / "again", TASK, {"train": _utterances(25), "test": _utterances(7, 1)}, shards=3)
    for path in sorted(written.iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


# ---- damage: always an error that names the file and the record, never a silent skip


def _shard(folder: Path, number: int = 1, split: str = "train") -> Path:
    return folder / load_card(folder).shards[split][number].file


def _payloads(path: Path) -> list[bytes]:
    return list(tfrecords.read_frames(path.read_bytes(), path, check_crc=True))


def _forge(folder: Path, change: dict[str, list], record: int = 2) -> Path:
    """Rewrite a record with correct frames, CRCs and sha256, so that only its content is wrong."""
    from tensorflow_datasets.proto import tf_example_pb2

    path = _shard(folder)
    payloads = _payloads(path)
    example = tf_example_pb2.Example.FromString(payloads[record])
    for key, values in change.items():
        del example.features.feature[key]
        if values:
            example.features.feature[key].int64_list.value.extend(values)
    payloads[record] = example.SerializeToString()
    _rewrite(folder, path, payloads)
    return path


def _rewrite(folder: Path, path: Path, payloads: list[bytes]) -> None:
    content = b"".join(map(tfrecords.frame, payloads))
    path.write_bytes(content)
    fields = json.loads((folder / CARD).read_text())
    for shard in fields["shards"]["train"]:
        if shard["file"] == path.name:
            shard["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / CARD).write_text(json.dumps(fields))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found_in_its_record(
    written: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flip") / "rooms"
    shutil.copytree(written, folder)
    path = _shard(folder)
    ends = np.cumsum([len(payload) + 16 for payload in _payloads(path)])
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    record = int(np.searchsorted(ends, place, side="right"))
    with pytest.raises(RecordError, match=rf"{path.name}, record {record} is damaged") as error:
        read_unit_records(folder, "train")
    assert "again" in str(error.value)
    read_unit_records(folder, "test")  # the other split is intact


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_truncated_shard_is_found(
    written: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cut") / "rooms"
    shutil.copytree(written, folder)
    path = _shard(folder)
    ends = [0, *np.cumsum([len(payload) + 16 for payload in _payloads(path)]).tolist()]
    size = data.draw(st.one_of(st.integers(0, ends[-1] - 1), st.sampled_from(ends[:-1])))
    path.write_bytes(path.read_bytes()[:size])
    complete = max(i for i, end in enumerate(ends) if end <= size)
    expected = f"has {complete} records, " if size in ends else f"ends inside record {complete}"
    with pytest.raises(RecordError, match=f"{path.name}.* {expected}"):
        read_unit_records(folder, "train")


def test_a_missing_shard_is_named(copy: Path) -> None:
    path = _shard(copy, 2)
    path.unlink()
    with pytest.raises(RecordError, match=f"{path.name} is missing"):
        read_unit_records(copy, "train")


def test_a_shard_of_other_records_is_detected_by_its_hash(copy: Path, tmp_path: Path) -> None:
    write_unit_records(tmp_path / "other", TASK, {"train": _utterances(25, seed=5)}, shards=3)
    path = _shard(copy)
    shutil.copy(tmp_path / "other" / path.name, path)
    with pytest.raises(RecordError, match=f"{path.name} differs from .*sha256"):
        read_unit_records(copy, "train")
    read_unit_records(copy, "train", check=False)  # valid records


def test_a_record_appended_is_counted(copy: Path) -> None:
    path = _shard(copy)
    payloads = _payloads(path)
    _rewrite(copy, path, [*payloads, payloads[0]])
    with pytest.raises(RecordError, match=rf"{path.name} has {len(payloads) + 1} records"):
        read_unit_records(copy, "train")


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"units": [1, 100, 2]}, "has unit 100, outside 0..99"),
        ({"units": [1, -1, 2]}, "has unit -1"),
        ({"units": [2**40]}, f"has unit {2**40}"),
        ({"units": []}, "has no units"),
        ({"labels/room": [2]}, "has label 2 .*'room' of rooms, whose labels are 0..1"),
        ({"labels/room": []}, "has label -1 .*'room'"),
        ({"labels/action": [0, 1]}, "has label -1 .*'action'"),
        ({"durations": [4]}, "has 1 durations for .* expected 0"),
    ],
)
def test_a_record_that_does_not_fit_is_named(copy: Path, change: dict[str, list], says: str, check: bool) -> None:
    path = _forge(copy, change)
    with pytest.raises(RecordError, match=rf"{path.name}, record 2 \('spk/10.wav'\) {says}"):
        read_unit_records(copy, "train", check=check)


def test_there_must_be_a_duration_for_each_unit(tmp_path: Path) -> None:
    one, two, *_ = _utterances(2, streams=True)
    with pytest.raises(RecordError, match=r"utterance 1 .* durations for"):
        write_unit_records(tmp_path / "out", TASK, {"train": [one, two._replace(durations=[1] * 40)]})
    with pytest.raises(RecordError, match=r"utterance 1 .* 0 f0 for"):
        write_unit_records(tmp_path / "out", TASK, {"train": [one, two._replace(f0=None)]})
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_are_not_an_example_are_named(copy: Path) -> None:
    path = _shard(copy)
    payloads = _payloads(path)
    payloads[4] = b"\xff\xff\xff no example"
    _rewrite(copy, path, payloads)
    with pytest.raises(RecordError, match=rf"{path.name}, record 4 is not an utterance"):
        read_unit_records(copy, "train")


@pytest.mark.parametrize(
    "change",
    [
        {"vocabulary": "100"}, {"vocabulary": None}, {"vocabulary": 0}, {"layer": "6"}, {"merged": 1},
        {"shards": {"train": []}},
        {"shards": {"train": [{"file": "../elsewhere", "records": 1, "bytes": 1, "sha256": ""}]}},
    ],
)  # fmt: skip
def test_a_card_with_invalid_values_is_refused(copy: Path, change: dict) -> None:
    (copy / CARD).write_text(json.dumps({**json.loads((copy / CARD).read_text()), **change}))
    with pytest.raises(RecordError, match=rf"{CARD} is damaged .*make the records again"):
        read_unit_records(copy, "train")


def test_take_selects_utterances() -> None:
    some = UnitSet.of([[1, 2], [3], [4, 5, 6]], [[0], [1], [2]], ids="abc")
    taken = some.take(np.asarray([2, 0]))
    assert [taken.units_of(i).tolist() for i in range(2)] == [[4, 5, 6], [1, 2]]
    assert (taken.classes.tolist(), taken.ids) == ([[2], [0]], ["c", "a"])


def test_a_directory_without_its_card_or_split_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"no split 'valid': it has train, test"):
        read_unit_records(copy, "valid")
    (copy / CARD).write_text('{"format": ')
    with pytest.raises(RecordError, match=f"{CARD} is damaged"):
        load_card(copy)
    (copy / CARD).write_text('{"format": "other", "version": 3, "counts": {}}')
    with pytest.raises(RecordError, match=r"'other' version 3; this code reads"):
        load_card(copy)
    (copy / CARD).unlink()
    with pytest.raises(RecordError, match="not a complete directory"):
        read_unit_records(copy, "train")
    with pytest.raises(RecordError, match="not a complete directory of unit records: it does not exist"):
        load_card(tmp_path / "nowhere")


# ---- writing


def test_a_full_disk_leaves_nothing_that_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes
    calls = []

    def full(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_unit_records(tmp_path / "out", TASK, {"train": _utterances(20)}, shards=5)
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


def test_until_the_end_only_a_hidden_incomplete_sibling_exists(tmp_path: Path) -> None:
    seen: list[str] = []

    def late() -> list[Utterance]:
        seen.extend(path.name for path in tmp_path.iterdir())
        (half,) = tmp_path.iterdir()
        with pytest.raises(RecordError, match="not a complete"):  # what kill -9 would leave behind here
            load_card(half)
        return _utterances(3)

    later = itertools.chain.from_iterable(late() for _ in range(1))
    write_unit_records(tmp_path / "out", TASK, {"train": _utterances(5), "test": later})
    assert len(seen) == 1
    assert seen[0].startswith(".out.")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_message_about_absent_records_names_what_an_interrupted_save_left(copy: Path) -> None:
    copy.rename(copy.with_name(".rooms.replaced"))
    with pytest.raises(
        RecordError, match=r"does not exist\. Make one .* left the previous version in .*\.replaced: move"
    ):
        load_card(copy)


def test_overwriting_needs_the_flag_and_fails_safely(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_card(copy)
    with pytest.raises(RecordError, match="not empty"):
        write_unit_records(copy, TASK, {"train": _utterances(4)})
    with pytest.raises(RecordError, match="has no utterances"):
        write_unit_records(copy, TASK, {"train": []}, overwrite=True)
    assert load_card(copy) == before
    read_unit_records(copy, "train")
    (copy / "a.wav").write_bytes(b"a recording")
    for overwrite in (False, True):
        with pytest.raises(RecordError, match=r"has files other than unit records \(a.wav\) and is not replaced"):
            write_unit_records(copy, TASK, {"train": _utterances(4)}, overwrite=overwrite)
    (copy / "a.wav").unlink()
    write_unit_records(copy, TASK, {"train": _utterances(4)}, overwrite=True)
    assert load_card(copy).counts == {"train": 4}
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"units": [100]}, "unit 100"),
        ({"units": []}, "no units"),
        ({"classes": (3, 3)}, "label 3 .*'action'"),
        ({"classes": (0, 0)}, "label -3 .*'room'"),
        ({"classes": (0,)}, "1 classes, but rooms has 2 slots"),
        ({"id": "spk/0.wav"}, "has a duplicate id"),
    ],
)
def test_an_utterance_that_does_not_fit_is_not_written(tmp_path: Path, change: dict, says: str) -> None:
    wrote = _utterances(5)
    wrote[3] = wrote[3]._replace(**change)
    with pytest.raises(RecordError, match=rf"split 'train', utterance 3 .*{says}"):
        write_unit_records(tmp_path / "out", TASK, {"train": wrote})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (Task("my task", (Slot("a", ("x",)),)), "task name 'my task'"),
        (Task("t", ()), "no slots"),
        (Task("t", (Slot("a/b", ("x",)),)), "slot name 'a/b'"),
        (Task("t", (Slot("a", ("x",)), Slot("a", ("y",)))), "a slot twice"),
        (Task("t", (Slot("a", (" x",)),)), "label ' x'"),
        (Task("t", (Slot("a", ("x\ny",)),)), "label"),
    ],
)
def test_names_that_are_not_valid_in_files_are_refused(tmp_path: Path, task: Task, says: str) -> None:
    with pytest.raises(RecordError, match=says):
        write_unit_records(tmp_path / "out", task, {"train": [Utterance("a", [1], [0])]})


# ---- in memory


@given(
    units=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=12), min_size=1, max_size=8),
    limit=st.integers(1, 12),
)
def test_cut_keeps_the_first_units_of_each(units: list[list[int]], limit: int) -> None:
    whole = UnitSet.of(units, [[0]] * len(units))
    whole = dataclasses.replace(whole, durations=whole.units.astype(np.int32) + 1)
    short = whole.cut(limit)
    assert len(short) == len(units)
    assert [short.units_of(i).tolist() for i in range(len(units))] == [one[:limit] for one in units]
    np.testing.assert_array_equal(short.durations, short.units + 1)
    assert short.ids == whole.ids


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"f0": [0.1, float("nan")]}, "has f0 nan, which is not finite"),
        ({"f0": [float("inf"), 0.1]}, "has f0 inf, which is not finite"),
        ({"durations": [3, 0]}, "has a duration of 0 frames"),
        ({"durations": [-2, 1]}, "has a duration of -2 frames"),
        ({"durations": [1, 2**33]}, "has a duration of 8589934592 frames"),
        ({"durations": [1, 2.5]}, "durations of type float64: give integers"),
    ],
)
def test_invalid_prosody_is_refused(wrong: dict[str, list[float]], message: str, tmp_path: Path) -> None:
    good = Utterance("good", [1, 2], (0, 3), durations=[1, 2], f0=[0.0, 0.1])
    bad = good._replace(id="bad", **wrong)
    with pytest.raises(RecordError, match=message):
        write_unit_records(tmp_path / "made", TASK, {"train": [good, bad]})


def test_invalid_prosody_is_refused_when_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written without checks."""
    rows = _utterances(3, streams=True)
    rows[1].f0[0] = np.nan
    with monkeypatch.context() as unchecked:
        unchecked.setattr(write_records, "first_fault", lambda *_: None)
        write_unit_records(tmp_path / "made", TASK, {"train": rows})
    with pytest.raises(RecordError, match=r"record 1 \('spk/1.wav'\) has f0 nan"):
        read_unit_records(tmp_path / "made", "train")
