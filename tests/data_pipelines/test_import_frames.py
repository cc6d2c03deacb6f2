"""Import of unit text with one unit a frame: line format, splits of any source, folder lookup."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data_pipelines import extract, leaks
from data_pipelines.import_frames import import_frames, import_from, main
from data_pipelines.splits import BuildError
from spjax.data.records import load_card, read_unit_records
from spjax.data.tfrecords import RecordError
from spjax.encoders.units import expand
from spjax.tasks import TASKS
from tests.data_pipelines.builders.raw_trees import write
from tests.data_pipelines.builders.test_esd import plant as plant_esd

GOOD = "a|x|7 7 7 3 3 7\nb|y|1\n"


def source_lines(speakers: int = 4, sentences: int = 10, part: str = "") -> str:
    """Lines of a source, all with different frames."""
    return "".join(
        f"{part}s{speaker}_{number}|s{speaker}|{speaker} {speaker} {number}{' 0 0' * len(part)}\n"
        for speaker in range(speakers)
        for number in range(50, 50 + sentences)
    )


def ids(records: Path) -> dict[str, set[str]]:
    return {split: set(read_unit_records(records, split)[0].ids) for split in load_card(records).shards}


# ---- formats


def test_runs_are_merged_and_their_durations_kept(tmp_path: Path) -> None:
    text = "﻿ a | x |7 7  7 3 3\t7 \r\n\r\nb||1\r\nc d|y|99 0"
    for split in ("train", "val", "test"):
        write(tmp_path / "src", f"mine.{split}.frames.txt", text.replace("a |", f"{split} |"))
        write(tmp_path / "src", f"mine.{split}.frames.txt", text if split == "train" else f"{split}|x|{len(split)}\n")
    card = import_frames("mine", tmp_path / "src", tmp_path / "out", layer=9)
    assert (card.counts, card.merged, card.durations, card.f0, card.layer) == (
        {"train": 3, "valid": 1, "test": 1}, True, True, False, 9,
    )  # fmt: skip
    assert [(slot.name, slot.labels) for slot in card.task.slots] == [("speaker", ("unknown", "x", "y"))]
    assert card.notes == ("splits: as the files are named",)
    units, _ = read_unit_records(tmp_path / "out", "train")
    assert units.ids == ["a", "b", "c d"]
    assert [units.units_of(i).tolist() for i in range(3)] == [[7, 3, 7], [1], [99, 0]]
    assert units.durations.tolist() == [3, 2, 1, 1, 1, 1]
    assert expand(units.units_of(0), units.durations[:3]).tolist() == [7, 7, 7, 3, 3, 7]
    assert units.classes.tolist() == [[1], [0], [2]]
    digest = hashlib.sha256((tmp_path / "src" / "mine.val.frames.txt").read_bytes()).hexdigest()
    assert card.sources["mine.val.frames.txt"] == digest


def test_a_source_is_all_files_of_its_name_and_no_others(tmp_path: Path) -> None:
    write(tmp_path, "mine.frames.txt", source_lines())
    write(tmp_path, "mine.more.frames.txt", source_lines(part="zz"))
    write(tmp_path, "mine_v1.frames.txt", "other|o|1\n")
    write(tmp_path, "mine.frames.text", "other|o|1\n")
    write(tmp_path, "mine.a.b.frames.txt", "other|o|1\n")
    card = import_frames("mine", tmp_path, tmp_path / "out")
    assert sum(card.counts.values()) == 80
    with pytest.raises(BuildError, match="mine_v1 has too few utterances for 3 splits"):
        import_frames("mine_v1", tmp_path, tmp_path / "again")


def test_any_source_is_split_with_its_speakers_in_every_split(tmp_path: Path) -> None:
    write(tmp_path, "mine.val.frames.txt", source_lines())
    write(tmp_path, "mine.test.frames.txt", source_lines(part="zz") + "copy|s0|0 0 50\n")
    write(tmp_path, "mine.frames.txt", "".join(f"twin{i}|s1|8 8 9\n" for i in range(6)))
    card = import_frames("mine", tmp_path, tmp_path / "out")
    assert card.notes == (
        "splits: made here, with utterances of every speaker in each",
        "6 of 87 utterances repeat the frames of an earlier one",
    )
    found = ids(tmp_path / "out")
    assert sum(any(name.startswith("twin") for name in part) for part in found.values()) == 1
    for split in found:
        assert set(read_unit_records(tmp_path / "out", split)[0].classes[:, 0].tolist()) == {0, 1, 2, 3}
    assert import_frames("mine", tmp_path, tmp_path / "again") == card


def test_copies_in_given_splits_are_counted(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        write(tmp_path, f"mine.{split}.frames.txt", f"{split}1|x|1\n{split}2|x|1\n{split}3|x|{len(split)}\n")
    assert import_frames("mine", tmp_path, tmp_path / "out").notes == (
        "splits: as the files are named",
        "5 of 9 utterances repeat the frames of an earlier one, 2 of them in another split",
    )


def test_labels_of_a_table_leave_no_speaker_in_two_splits(tmp_path: Path) -> None:
    write(tmp_path, "mine.frames.txt", source_lines(speakers=10))
    rows = [f"s{s}_{n}\ts{s}\t{('calm', 'loud')[n % 2]}\t{n}\n" for s in range(10) for n in range(50, 60)]
    write(tmp_path, "mine.labels.tsv", "id\tspeaker\tmood\tsentence\n" + "".join(reversed(rows)))
    card = import_frames("mine", tmp_path, tmp_path / "out", labels=("mood", "speaker"))
    assert [slot.name for slot in card.task.slots] == ["mood", "speaker"]
    assert card.task.metric == "exact_match"
    card = import_frames("mine", tmp_path, tmp_path / "out", labels=("mood",), overwrite=True)
    assert card.task.slots[0].labels == ("calm", "loud")
    assert card.notes == ("splits: made here, no speaker in two",)
    assert set(card.sources) == {"mine.frames.txt", "mine.labels.tsv"}
    speakers = [{name[:2] for name in part} for part in ids(tmp_path / "out").values()]
    assert sorted(map(len, speakers)) == [1, 1, 8]
    units, _ = read_unit_records(tmp_path / "out", "test")
    assert [card.task.slots[0].labels[c] for (c,) in units.classes] == [
        ("calm", "loud")[int(name[3:]) % 2] for name in units.ids
    ]


def test_a_known_task_has_its_own_slots(tmp_path: Path) -> None:
    write(tmp_path, "fsc.frames.txt", source_lines())
    rows = "".join(f"s{s}_{n}\tbring\tnone\tkitchen\n" for s in range(4) for n in range(50, 60))
    write(tmp_path, "fsc.labels.tsv", "id\taction\tobject\tlocation\n" + rows)
    card = import_frames("fsc", tmp_path, tmp_path / "out")
    assert card.task == TASKS["fsc"]
    write(tmp_path, "fsc.labels.tsv", "id\taction\tobject\tlocation\n" + rows.replace("bring", "fetch"))
    with pytest.raises(BuildError, match=r"fsc\.frames\.txt:\d+ has the label 'fetch \| none \| kitchen'"):
        import_frames("fsc", tmp_path, tmp_path / "no")


# ---- errors


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a 1 2 3", "'a 1 2 3' is not `id|speaker|frames`"),
        ("c|x|1 2|3", "is not `id|speaker|frames`"),
        ("|x|1 2", "is not `id|speaker|frames`"),
        ("c|x|", "(c) has no frames"),
        ("c|x| \t", "(c) has no frames"),
        ("c|x|1 x2", "(c) has the frame 'x2', which is not a unit"),
        ("c|x|1 2.0", "has the frame '2.0'"),
        ("c|x|1 -1", "has the frame '-1'"),
        ("c|x|1 007", "has the frame '007'"),
        ("c|x|1 ７", "has the frame '７'"),
        ("c|x|1,2", "has the frame '1,2'"),
        ("c|x|1 99999999999999999999", "has the frame '99999999999999999999'"),
        ("id|speaker|frames", "(id) has the frame 'frames'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path / "src", "mine.frames.txt", GOOD + "\n" + line + "\n")
    with pytest.raises(BuildError) as error:
        import_frames("mine", tmp_path / "src", tmp_path / "out")
    assert "mine.frames.txt, line 4" in str(error.value)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_other_faults_are_named(tmp_path: Path) -> None:
    write(tmp_path, "mine.frames.txt", GOOD + "c|x|1 100\nd|x|2\n")
    with pytest.raises(
        BuildError, match=r"mine\.frames\.txt:3 \(c\) has the unit 100, not one of 0\.\.99: .*--vocabulary"
    ):
        import_frames("mine", tmp_path, tmp_path / "out")
    write(tmp_path, "mine.two.frames.txt", "b|x|1\n")
    with pytest.raises(BuildError, match=r"two\.frames\.txt:1: 'b' is in mine\.frames\.txt:2 already"):
        import_frames("mine", tmp_path, tmp_path / "out")
    write(tmp_path, "mine.two.frames.txt", "\n")
    with pytest.raises(BuildError, match=r"two\.frames\.txt holds no utterance"):
        import_frames("mine", tmp_path, tmp_path / "out")
    with pytest.raises(BuildError, match=r"has no yours\.frames\.txt and no yours\.PART\.frames\.txt"):
        import_frames("yours", tmp_path, tmp_path / "out")
    (tmp_path / "mine.two.frames.txt").unlink()
    with pytest.raises(BuildError, match=r"neither mine\.labels\.tsv nor mine\.PART\.labels\.tsv"):
        import_frames("mine", tmp_path, tmp_path / "out", labels=("mood",))
    rows = "id\tspeaker\tmood\n" + "".join(f"{name}\t{who}\tcalm\n" for name, who in zip("abcd", "xyxx", strict=True))
    for text, message in (
        (rows.replace("mood", "tone"), "lacks mood"),
        (rows.replace("c\tx\tcalm", "c\tx\t "), "line 4 has no mood"),
        (rows.replace("c\tx\tcalm\n", ""), r"mine\.frames\.txt:3 \(c\) is in none of mine\.labels\.tsv"),
        (rows + "a\tx\tcalm\n", "line 6: 'a' is in an earlier row"),
        (rows.replace("b\ty", "b\tz"), r"frames\.txt:2 \(b\) has the speaker 'y', its row .* 'z'"),
    ):
        write(tmp_path, "mine.labels.tsv", text)
        with pytest.raises(BuildError, match=message):
            import_frames("mine", tmp_path, tmp_path / "out", labels=("mood",))
    write(tmp_path, "mine.labels.tsv", rows)
    with pytest.raises(BuildError, match=r"2 groups .* are too few for 3 splits.*mine\.train\.frames\.txt"):
        import_frames("mine", tmp_path, tmp_path / "out", labels=("mood",))
    with pytest.raises(BuildError, match="protocol 'fair' is unknown"):
        import_frames("mine", tmp_path, tmp_path / "out", protocol="fair")
    with pytest.raises(BuildError, match="task esd_emotion is known and has its own labels"):
        import_frames("esd_emotion", tmp_path, tmp_path / "out", labels=("mood",))


# ---- lookup


def test_both_formats_are_found_in_a_folder_or_its_subfolders(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write(tmp_path / "units" / "plain" / "fsc", f"{split}.txt", "1 2 <s> 0 6 20\n")
    plant_esd(tmp_path / "units" / "framed", 0)
    for units in ("units", "units/plain"):
        out = tmp_path / f"{units.replace('/', '_')}_fsc"
        assert import_from(str(tmp_path / units), "fsc", str(out)).task.name == "fsc"
    for units in ("units", "units/framed"):
        out = tmp_path / f"{units.replace('/', '_')}_esd"
        assert import_from(str(tmp_path / units), "esd_speaker", str(out)).task.name == "esd_speaker"
    write(tmp_path / "units" / "other", "esd.frames.txt", GOOD)
    with pytest.raises(BuildError, match=r"units of esd_emotion are in .*framed and in .*other: give --units"):
        import_from(str(tmp_path / "units"), "esd_emotion", str(tmp_path / "no"))
    # the folder comes before its subfolders, and a subfolder may have the name of its source
    write(tmp_path / "units" / "esd", "esd.frames.txt", source_lines())
    assert import_from(str(tmp_path / "units" / "esd"), "esd", str(tmp_path / "once")).task.name == "esd"
    assert import_from(str(tmp_path / "units" / "plain"), "fsc", str(tmp_path / "twice")).task.name == "fsc"
    write(tmp_path / "units" / "plain" / "old" / "fsc", "train.txt", "1 <s> 0 6 20\n")
    assert import_from(str(tmp_path / "units" / "plain"), "fsc", str(tmp_path / "still")).counts["train"] == 1
    write(tmp_path / "sources" / "solo", "solo.frames.txt", source_lines())
    assert import_from(str(tmp_path / "sources"), "solo", str(tmp_path / "solo")).task.name == "solo"
    with pytest.raises(BuildError, match=r"units and its subfolders hold no units of mine: put mine/train\.txt"):
        import_from(str(tmp_path / "units"), "mine", str(tmp_path / "no"))
    with pytest.raises(RecordError, match=r"units/gsc/train\.txt is missing"):
        import_from(str(tmp_path / "units"), "gsc", str(tmp_path / "no"))
    with pytest.raises(BuildError, match=r"plain has no vctk\.frames\.txt and no vctk\.PART\.frames\.txt"):
        import_from(str(tmp_path / "units" / "plain"), "vctk_gender", str(tmp_path / "no"))


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant_esd(tmp_path / "src", 0)
    args = ["--task=esd_emotion", f"--src={tmp_path / 'src'}", f"--out={tmp_path / 'out'}"]
    main(args)
    assert "note: protocol: paper" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .* is not empty"):
        main(args)
    main([*args, "--overwrite", "--protocol=speakers", "--vocabulary=200"])
    assert load_card(tmp_path / "out").vocabulary == 200
    with pytest.raises(SystemExit, match="error: the vocabulary is 0: give the number of units, at least 1"):
        main([*args, "--overwrite", "--vocabulary=0"])
    with pytest.raises(SystemExit, match="error: protocol 'fair' is unknown"):
        main([*args, "--overwrite", "--protocol=fair"])
    capsys.readouterr()
    for flags in (["--out", str(tmp_path / "splits")], ["--no-files"]):
        leaks.main(["--task=esd_emotion", f"--raw={tmp_path / 'src'}", *flags])
        assert capsys.readouterr().out.count("None found.") == 2
    leaks.main([f"--splits={tmp_path / 'splits'}", f"--raw={tmp_path / 'src'}"])
    with pytest.raises(
        SystemExit, match=r"published as unit text.*import it by python -m data_pipelines\.import_frames"
    ):
        extract.main(
            [
                "--task=esd_emotion",
                f"--raw={tmp_path / 'src'}",
                f"--out={tmp_path / 'x'}",
                "--encoder=mfcc",
                "--clusters=9",
            ]
        )
