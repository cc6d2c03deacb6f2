"""Import of unit text: the published sets, line formats, and errors of invalid lines."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from data_pipelines.import_units import import_units, main, read_slots
from spjax.data.records import load_card, read_unit_records
from spjax.data.tfrecords import RecordError
from spjax.tasks import TASKS, Slot, Task

GOOD = ["71 12 99 <s> 0 6 20", "0 <s> 5 19 23", "71 12 99 <s> 0 6 20"]
HOME = Task("home", (Slot("action", ("turn on", "none")), Slot("room", ("none", "living room"))), "exact_match")


def _text(folder: Path, lines: list[str], name: str = "train.txt") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


# ---- published sets (read from outside the repository)


@pytest.mark.parametrize(
    ("task", "counts"),
    [
        ("fsc", {"train": 23132, "valid": 3118, "test": 3793}),
        ("gsc", {"train": 51094, "valid": 6804, "test": 3081}),
    ],
)
def test_real_units_arrive_complete(unit_text: Path, tmp_path: Path, task: str, counts: dict[str, int]) -> None:
    card = import_units(task, unit_text / task, tmp_path / task)
    assert card.counts == counts
    assert card.task == TASKS[task]
    for split in counts:
        units, again = read_unit_records(tmp_path / task, split)
        assert again == card
        lines = (unit_text / task / f"{split}.txt").read_text().splitlines()
        found = [[*units.units_of(i).tolist(), "<s>", *units.classes[i].tolist()] for i in range(len(units))]
        assert [" ".join(map(str, words)) for words in found] == lines
        assert len(set(units.ids)) == len(lines)
    named = (unit_text / task / "valid.named").read_text().splitlines()
    units, _ = read_unit_records(tmp_path / task, "valid")
    assert [name.split("#")[0] for name in units.ids] == [line.split("|")[0] for line in named]
    assert set(card.sources) == {path.name for path in (unit_text / task).iterdir()}
    digest = hashlib.sha256((unit_text / task / "train.txt").read_bytes()).hexdigest()
    assert card.sources["train.txt"] == digest


def test_resampled_lines_are_counted_and_dropped_on_request(unit_text: Path, tmp_path: Path) -> None:
    card = import_units("gsc", unit_text / "gsc", tmp_path / "gsc", splits=("valid", "test"), dedup=True)
    lines = (unit_text / "gsc" / "valid.named").read_text().splitlines()
    assert card.counts == {"valid": len(set(lines)), "test": 3081}
    assert f"valid: {len(lines) - len(set(lines))} of 6804 lines repeat an earlier one, dropped" in card.notes
    assert any("resamples with replacement" in note for note in card.notes)


# ---- formats


def test_lines_become_utterances(tmp_path: Path) -> None:
    card = import_units("fsc", _text(tmp_path / "src", GOOD), tmp_path / "out", splits=["train"], layer=7)
    units, _ = read_unit_records(tmp_path / "out", "train")
    assert [units.units_of(i).tolist() for i in range(3)] == [[71, 12, 99], [0], [71, 12, 99]]
    assert units.classes.tolist() == [[0, 6, 20], [5, 19, 23], [0, 6, 20]]
    assert units.ids == ["train-000000", "train-000001", "train-000002"]
    assert (card.durations, units.durations, card.layer) == (False, None, 7)
    assert card.notes[0] == "train: 1 of 3 lines repeat an earlier one, kept"


def test_dedup_drops_repeats_but_not_of_test(tmp_path: Path) -> None:
    src = _text(_text(tmp_path / "src", GOOD), GOOD, "test.txt")
    assert import_units("fsc", src, tmp_path / "out", splits=["train", "test"], dedup=True).counts == {
        "train": 2,
        "test": 3,
    }
    units, _ = read_unit_records(tmp_path / "out", "train")
    assert units.ids == ["train-000000", "train-000001"]


def test_named_lines_give_ids_and_need_no_text_beside_them(tmp_path: Path) -> None:
    lines = ["a b.wav|1 2|0 6 20", "c.wav|3|1 7 21", "a b.wav|1 2|0 6 20"]
    src = _text(tmp_path / "src", lines, "train.named")
    import_units("fsc", src, tmp_path / "out", splits=["train"])
    assert read_unit_records(tmp_path / "out", "train")[0].ids == ["a b.wav", "c.wav", "a b.wav#2"]
    import_units("fsc", src, tmp_path / "out", splits=["train"], dedup=True, overwrite=True)
    assert read_unit_records(tmp_path / "out", "train")[0].ids == ["a b.wav", "c.wav"]


@pytest.mark.parametrize("named", [False, True])
def test_labels_by_name_may_have_spaces(tmp_path: Path, named: bool) -> None:
    if named:
        src = _text(tmp_path / "src", ["x|1 2|turn on | living room", "y|3|none|none"], "train.named")
    else:
        src = _text(tmp_path / "src", ["1 2 <s> turn on | living room", "3 <s> none|none"])
    (tmp_path / "slots.json").write_text('{"action": ["turn on", "none"], "room": ["none", "living room"]}')
    assert read_slots(tmp_path / "slots.json", "home") == HOME
    options = [
        "--task=home",
        f"--slots={tmp_path}/slots.json",
        "--labels=names",
        "--splits=train",
        "--metric=weighted_f1",
    ]
    main([*options, f"--src={src}", f"--out={tmp_path}/out"])
    units, card = read_unit_records(tmp_path / "out", "train")
    assert units.classes.tolist() == [[0, 3], [1, 2]]
    assert card.task == dataclasses.replace(HOME, metric="weighted_f1")
    assert read_slots(tmp_path / "slots.json", "home", "accuracy").metric == "accuracy"


def test_labels_by_name_may_be_digits(tmp_path: Path) -> None:
    digits = Task("digits", (Slot("digit", ("1", "0")),))
    src = _text(tmp_path / "src", ["5 <s> 1", "6 <s> 0"])
    for labels, classes in (("names", [[0], [1]]), ("ids", [[1], [0]])):
        import_units(digits, src, tmp_path / "out", splits=["train"], labels=labels, overwrite=True)
        assert read_unit_records(tmp_path / "out", "train")[0].classes.tolist() == classes


# ---- invalid lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 x2 <s> 0 6 20", "'x2' is not a unit"),
        ("1 2.0 <s> 0 6 20", "'2.0' is not a unit"),
        ("1 100 <s> 0 6 20", "unit 100 is not one of 0..99 .*--vocabulary"),
        ("1 -1 <s> 0 6 20", "unit -1 is not one of 0..99"),
        ("1 007 <s> 0 6 20", "unit 007 .* without leading zeros"),
        ("1 ７ <s> 0 6 20", "'７' is not a unit"),
        ("<s> 0 6 20", "the utterance has no units"),
        ("1 2 0 6 20", "has no <s> between units and labels"),
        ("", "has no <s>"),
        ("1 2 <s> 0 6", "'0 6' should be 3 class ids .*action, object, location"),
        ("1 2 <s> 0 6 20 21", "should be 3 class ids"),
        ("1 2 <s>", "should be 3 class ids"),
        ("1 2 <s> 6 0 20", r"'6' is not a label of slot 'action' of fsc \(it is one of slot 'object'\)"),
        ("1 2 <s> 0 6 24", "'24' is not a label of slot 'location' of fsc: correct it to one of '20, 21, 22, 23'"),
        ("1 2 <s> bring 6 20", "'bring' is not a label of slot 'action'"),
        ("1 2 <s> 0 6 <s>", "'<s>' is not a label of slot 'location'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    src = _text(tmp_path / "src", [*GOOD, line, *GOOD])
    with pytest.raises(RecordError, match=rf"train\.txt, line 4: .*{message}"):
        import_units("fsc", src, tmp_path / "out", splits=["train"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 <s> turn on", "'turn on' should be 2 labels separated by |"),
        ("1 <s> turn on|", "'turn on|' should be 2 labels"),
        ("1 <s> turn on|kitchen", "'kitchen' is not a label of slot 'room' of home"),
        (
            "1 <s> living room|none",
            r"'living room' is not a label of slot 'action' of home \(it is one of slot 'room'\)",
        ),
    ],
)
def test_an_invalid_label_name_is_named(tmp_path: Path, line: str, message: str) -> None:
    src = _text(tmp_path / "src", [line])
    with pytest.raises(RecordError, match=rf"train\.txt, line 1: {message}".replace("|", r"\|")):
        import_units(HOME, src, tmp_path / "out", splits=["train"], labels="names")


def test_names_and_text_must_agree(tmp_path: Path) -> None:
    src = _text(tmp_path / "src", GOOD[:2])
    _text(src, ["a|71 12 99|0 6 20", "b|1|5 19 23"], "train.named")
    with pytest.raises(RecordError, match=r"train\.named, line 2 and the same line of train\.txt differ"):
        import_units("fsc", src, tmp_path / "out", splits=["train"])
    _text(src, ["a|71 12 99|0 6 20"], "train.named")
    with pytest.raises(RecordError, match=r"train\.named has 1 lines where train\.txt has 2"):
        import_units("fsc", src, tmp_path / "out", splits=["train"])
    _text(src, ["a|71 12 99|0 6 20", "0|5 19 23"], "train.named")
    with pytest.raises(RecordError, match=r"line 2: '0\|5 19 23' is not `file\|units\|labels`"):
        import_units("fsc", src, tmp_path / "out", splits=["train"])


def test_missing_empty_and_binary_files_are_named(tmp_path: Path) -> None:
    src = _text(tmp_path / "src", GOOD)
    with pytest.raises(RecordError, match=r"valid\.txt is missing, and so is valid\.named: .*--splits"):
        import_units("fsc", src, tmp_path / "out")
    _text(src, [], "valid.txt")
    with pytest.raises(RecordError, match=r"valid\.txt is empty"):
        import_units("fsc", src, tmp_path / "out", splits=["valid"])
    (src / "test.txt").write_bytes(b"1 2 \xff <s> 0 6 20\n")
    with pytest.raises(RecordError, match=r"test\.txt, line 1 is not UTF-8"):
        import_units("fsc", src, tmp_path / "out", splits=["test"])


def test_marks_spaces_and_line_ends_change_nothing(tmp_path: Path) -> None:
    """As in a CSV: byte order marks, surrounding blanks, CR and CRLF are accepted."""
    plain = _text(tmp_path / "src", ["71 12 <s> 0 6 20", "5 <s> 5 19 23", "5 <s> 5 19 23"])
    other = tmp_path / "other"
    other.mkdir()
    for name, end in (("cr", "\r"), ("crlf", "\r\n")):
        content = f"\ufeff 71  12 <s> 0 6 20 {end}5 <s>\t5 19 23{end}  5 <s> 5 19 23"
        (other / "train.txt").write_text(content, newline="", encoding="utf-8")
        import_units("fsc", other, tmp_path / name, splits=["train"], dedup=True)
    import_units("fsc", plain, tmp_path / "plain", splits=["train"], dedup=True)
    expected, card = read_unit_records(tmp_path / "plain", "train")
    assert card.counts == {"train": 2}
    for name in ("cr", "crlf"):
        found, _ = read_unit_records(tmp_path / name, "train")
        assert found.units.tolist() == expected.units.tolist()
        assert found.classes.tolist() == expected.classes.tolist()
    (other / "train.txt").write_text("71 <s> 0 6 20\n", encoding="utf-16")
    with pytest.raises(RecordError, match=r"train\.txt is text in UTF-16: save it as text in UTF-8"):
        import_units("fsc", other, tmp_path / "no", splits=["train"])
    (tmp_path / "slots.json").write_text('\ufeff {"a": ["x", "y"]}', encoding="utf-8")
    assert read_slots(tmp_path / "slots.json", "mine").slots[0].labels == ("x", "y")


# ---- command line


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = _text(tmp_path / "src", GOOD)
    args = ["--task=fsc", f"--src={src}", f"--out={tmp_path / 'out'}", "--splits=train", "--shards=2", "--dedup"]
    main(args)
    assert "train: 2 utterances in 2 file(s)" in capsys.readouterr().out
    assert load_card(tmp_path / "out").counts == {"train": 2}
    with pytest.raises(SystemExit, match=r"error: .* is not empty"):
        main(args)
    main([*args, "--overwrite"])
    with pytest.raises(SystemExit, match=r"error: unknown task 'asr': choose fsc, .*--slots"):
        main(["--task=asr", *args[1:]])
    with pytest.raises(SystemExit, match="error: task fsc is known"):
        main([*args, f"--slots={src}/train.txt"])


@pytest.mark.parametrize(
    "content", ["[1, 2]", "{", '{"a": "yes"}', '{"a": [1]}', '{"a": []}', '{"a": ["x", "x"]}', "3", '{"a": null}']
)
def test_slots_of_another_format_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "slots.json").write_text(content)
    with pytest.raises(RecordError, match=r"slots\.json is not a JSON object"):
        read_slots(tmp_path / "slots.json", "mine")


def test_a_duplicate_slot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "slots.json").write_text(json.dumps({"a": ["x"], "b": ["y"]}).replace('"b"', '"a"'))
    task = read_slots(tmp_path / "slots.json", "mine")
    with pytest.raises(RecordError, match="has a slot twice"):
        import_units(task, _text(tmp_path / "src", ["1 <s> 0 1"]), tmp_path / "out", splits=["train"])


def test_text_whose_units_were_not_merged_is_recorded_as_such(tmp_path: Path) -> None:
    plain = [f"{number} {' '.join(map(str, range(50)))} <s> turn on | none" for number in range(60, 80)]
    some = [line.replace("7 8", "7 7 8") for line in plain[:5]] + plain[5:]
    every = [" ".join(f"{unit} {unit}" for unit in range(30)) + " <s> turn on | none"] * 20
    note_text = "lines have equal neighbouring units, which merging would remove"
    for name, lines, merged, notes in (
        ("plain", plain, True, []),
        ("some", some, True, [f"train: 5 of 20 {note_text}"]),
        ("every", every, False, [f"train: 20 of 20 {note_text}"]),
    ):
        src = _text(tmp_path / name, lines)
        card = import_units(HOME, src, tmp_path / f"{name}_out", splits=("train",), labels="names")
        assert card.merged is merged, name
        assert [note for note in card.notes if note_text in note] == notes
        assert any(f"units were {'merged' if merged else 'not merged'}" in note for note in card.notes)
