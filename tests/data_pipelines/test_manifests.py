"""The user's data: CSVs and folders, and errors that name row and column."""

from __future__ import annotations

import argparse
import os
import tempfile
import unicodedata
from collections import Counter
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipelines import data_flags, leaks
from data_pipelines.clips import Splits
from data_pipelines.manifests import read_folders, read_manifest, read_user_data
from data_pipelines.split_manifests import read_splits
from data_pipelines.splits import BuildError
from tests.data_pipelines.builders.raw_trees import counts, distinct, everything, labels, record, shared


def plant(root: Path, header: str, rows: list[str], name: str = "my data.csv") -> Path:
    """Writes a CSV, and the files in its first column, all with different content."""
    distinct(root, [row.split(",")[0] for row in rows])
    path = root / name
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def speaker_rows(per_speaker: int = 4) -> list[str]:
    return [
        f"{speaker}/{word}{take}.wav,{speaker},{word}"
        for speaker in "abcdefghij"
        for word in ("yes", "no")
        for take in range(per_speaker)
    ]


def test_splits_are_made_disjoint_in_speakers(tmp_path: Path):
    task, splits, *_ = read_manifest(plant(tmp_path, "path,speaker,word", speaker_rows()))
    assert (task.name, task.metric) == ("my_data", "accuracy")
    assert [(slot.name, slot.labels) for slot in task.slots] == [("word", ("no", "yes"))]
    assert counts(splits) == (64, 8, 8)
    assert not shared(splits, "speaker")
    assert all(labels(part) == {"no", "yes"} for part in splits.values())
    again = read_manifest(plant(tmp_path, "path,speaker,word", list(reversed(speaker_rows()))))
    assert again[:2] == (task, splits)
    assert read_manifest(tmp_path / "my data.csv", seed=1)[1] != splits


def test_splits_are_stratified_without_speakers(tmp_path: Path):
    rows = [row.replace(f",{row[0]},", ",") for row in speaker_rows()]
    splits = read_manifest(plant(tmp_path, "path,word", rows)).splits
    assert counts(splits) == (64, 8, 8)
    assert {len([c for c in splits["valid"] if c.labels == (word,)]) for word in ("yes", "no")} == {4}


def test_given_splits_and_several_slots(tmp_path: Path):
    names = ["Train", "training", "dev", "validation", "eval", "TEST"]
    rows = [
        f"{split}{number}.wav,{split},turn on,{room}" for split in names for number, room in enumerate(["hall", "none"])
    ]
    rows += ["more.wav,train,off,none"]
    task, splits, *_ = read_manifest(plant(tmp_path, "path,split,action,room", rows), name="9 rooms")
    assert counts(splits) == (5, 4, 4)
    assert (task.name, task.metric) == ("task_9_rooms", "exact_match")
    assert [slot.labels for slot in task.slots] == [("off", "turn on"), ("hall", "none")]
    assert {clip.labels for clip in splits["test"]} == {("turn on", "hall"), ("turn on", "none")}
    only = read_manifest(tmp_path / "my data.csv", labels=["room"], metric="weighted_f1")[0]
    assert ([slot.name for slot in only.slots], only.metric) == (["room"], "weighted_f1")


def test_missing_valid_is_taken_from_train(tmp_path: Path):
    rows = [f"{row},{'test' if row[0] in 'ab' else 'train'}" for row in speaker_rows()]
    splits = read_manifest(plant(tmp_path, "path,speaker,word,split", rows)).splits
    assert counts(splits) == (56, 8, 16)
    assert {clip.speaker for clip in splits["test"]} == {"a", "b"}
    assert not shared(splits, "speaker")


def test_crops_root_and_unicode_forms(tmp_path: Path):
    distinct(tmp_path / "audio", [unicodedata.normalize("NFD", "ačiū.wav"), "b.wav", "c.wav"])
    rows = [
        f"{path},{start},{end},{label}"
        for number, path in enumerate(["ačiū.wav", f"file://{tmp_path}/audio/x/../ačiū.wav"])
        for start, end, label in [(number, 0.5, "a"), (number + 0.5, "", "b"), (number + 0.25, 1, "a")]
    ] + [f"{name}.wav,{start},,{label}" for name in "bc" for start, label in [(7, "a"), (8.5, "b")]]
    path = tmp_path / "crops.csv"
    path.write_text("path,start,duration,word\n" + "\n".join(rows), encoding="utf-8-sig")
    (tmp_path / "audio" / "x").mkdir()
    _, splits, root, _ = read_user_data(path, tmp_path / "audio", crops=True)
    assert root == str(tmp_path / "audio")
    clips = everything(splits)
    assert {clip.id for clip in clips} >= {"ačiū.wav@0+0.5", "ačiū.wav@0.5", "ačiū.wav@1.25+1", "b.wav@7"}
    assert not shared(splits, "path")
    assert all((tmp_path / "audio" / clip.path).is_file() for clip in clips)
    assert {(clip.start, clip.duration) for clip in clips} >= {(0.0, 0.5), (0.5, None), (1.25, 1.0)}


@pytest.mark.parametrize(
    ("header", "rows", "fault"),
    [
        ("path,word", ["a.wav,yes", "b.wav, "], r"my data.csv, line 3, column word: the label is empty"),
        ("path,word", ["a.wav,yes", "a.wav,no"], r"line 3 repeats .*line 2, column path: 'a.wav'"),
        ("path,word", ["a.wav,yes", "b.wav,yes"], r"word: every label is 'yes'"),
        ("path,word", ["a.wav,yes", "b.wav"], r"line 3 has 1 fields where the header has 2"),
        ("path,word", ["a.wav,yes"] * 1 + ["b.wav,no"] * 1, r"word: 'no' has fewer than 3 clips"),
        ("path;word", ["a.wav;yes"], r"line 1: 'path;word' is separated by semicolons: save it with commas"),
        ("path\tword", ["a.wav\tyes"], r"is separated by tabs"),
        ("file,word", ["a.wav,yes"], r"has the columns \['file', 'word'\] but no path"),
        ("Path,path,word", ["a.wav,a.wav,yes"], r"line 1: both Path and path are the column path: rename one"),
        ("path", ["a.wav"], r"has no label column, only path"),
        ("path,", ["a.wav,yes"], r"line 1, column 2 has no name"),
        ("path,split,word", ["a.wav,tset,yes"], r"line 2, column split: 'tset' is unknown; use one of train, valid"),
        ("path,split,word", ["a.wav,train,yes", "b.wav,,no"], r"line 3 has no split, but other rows have"),
        ("path,split,word", ["a.wav,train,yes", "b.wav,dev,no"], r"has train, valid but no test"),
        (
            "path,split,word",
            ["a.wav,train,yes", "b.wav,train,no", "c.wav,dev,no", "d.wav,test,maybe"],
            r"word: 'maybe' is in test but not in train \(1 such labels\)",
        ),
        ("path,word", ["a.wav,yes", "https://x.org/b.wav,no"], r"line 3, column path: https://x.org/b.wav is a https:"),
        ("path,word", ["s3://bucket/b.wav,no"], r"line 2, column path: s3://bucket/b.wav is a s3:// address"),
        ("path,word", [r"C:\data\b.wav,no"], r"line 2, column path: .* is a Windows path"),
        ("path,word", ["gs:/b.wav,no"], r"line 2, column path: gs:/b.wav is not a path in a bucket"),
        ("path,start,word", ["a.wav,soon,yes"], r"line 2, column start: 'soon' is not a time in seconds"),
        ("path,start,word", ["a.wav,1_0,yes"], r"line 2, column start: '1_0' is not a time in seconds"),
        ("path,duration,word", ["a.wav,0,yes"], r"line 2, column duration: '0' is not a time"),
        (
            "path,speaker,word",
            ["a.wav,x,a", "b.wav,x,a", "c.wav,x,a", "d.wav,x,b", "e.wav,x,b", "f.wav,x,b"],
            "1 group",
        ),
    ],
)
def test_faults_are_named_by_row_and_column(tmp_path: Path, header: str, rows: list[str], fault: str):
    with pytest.raises(BuildError, match=fault):
        read_manifest(plant(tmp_path, header, rows), crops="start" in header or "duration" in header)


@pytest.mark.parametrize("speaker", [False, True])
def test_crops_of_a_recording_stay_together(tmp_path: Path, speaker: bool):
    names = [f"{number}.wav" for number in range(20)]
    distinct(tmp_path, names)
    path = tmp_path / "crops.csv"
    rows = [
        f"{name},{start},{f's{(number + start) // 2}' if speaker else ''},{'yes' if start % 2 else 'no'}"
        for number, name in enumerate(names)
        for start in range((1 if number % 6 == 5 else 2) if speaker else 5)
    ]  # each speaker is in two recordings and so links them, six in a row
    path.write_text("\n".join(["path,start,speaker,word", *rows]))
    splits = read_manifest(path, crops=True)[1]
    assert not shared(splits, "path")
    assert not (speaker and shared(splits, "speaker"))
    crops = Counter(clip.path for clip in everything(splits))
    assert all(clip.source == (clip.path if crops[clip.path] > 1 else "") for clip in everything(splits))


def test_sources_of_crops(tmp_path: Path):
    """A given source also holds for the file's other crops; given splits are unchanged, with a note."""
    distinct(tmp_path, ["a.wav", "b.wav", "c.wav"])
    path = tmp_path / "crops.csv"
    rows = ["a.wav,0,film,x,train", "a.wav,1,,y,valid", "b.wav,0,,x,train", "b.wav,1,,y,train", "c.wav,0,,x,test"]
    path.write_text("\n".join(["path,start,source,word,split", *rows]))
    splits = read_manifest(path, crops=True, source="source")[1]
    assert counts(splits) == (3, 1, 1)
    sources = {clip.id: clip.source for clip in everything(splits)}
    assert sources == {"a.wav": "film", "a.wav@1": "film", "b.wav": "b.wav", "b.wav@1": "b.wav", "c.wav": ""}
    path.write_text("path,start,word\n" + "\n".join(f"a.wav,{start},{'xy'[start % 2]}" for start in range(8)))
    with pytest.raises(BuildError, match=r"crops.csv: 1 groups .*; give the splits in a column split"):
        read_manifest(path, crops=True)


@pytest.mark.parametrize("column", ["speaker", "source"])
def test_names_are_compared_composed(tmp_path: Path, column: str):
    rows = [
        f"{number}{take}.wav,{unicodedata.normalize(form, f'č{number}')},{word}"
        for number in range(10)
        for take, (form, word) in enumerate([("NFC", "yes"), ("NFD", "no"), ("NFD", "yes"), ("NFC", "no")])
    ]
    splits = read_manifest(
        plant(tmp_path, f"path,{column},word", rows), source="source" if column == "source" else None
    )[1]
    assert {getattr(clip, column) for clip in everything(splits)} == {f"č{number}" for number in range(10)}
    assert not shared(splits, column)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e6, allow_nan=False),
            st.none() | st.floats(0, 1e6, exclude_min=True, allow_nan=False),
        ),
        min_size=2,
        max_size=6,
        unique=True,
    )
)
@example([(1234.561, None), (1234.564, None)])
@example([(1.0, 1234.561), (1.0, 1234.564)])
def test_crops_that_differ_have_ids_that_differ(crops: list[tuple[float, float | None]]):
    with tempfile.TemporaryDirectory() as folder:
        distinct(Path(folder), ["a.wav", "b.wav", "c.wav"])
        path = Path(folder, "crops.csv")
        rows = [f"a.wav,{start!r},{duration or ''},{word},train" for (start, duration), word in zip(crops, cycle("xy"))]
        path.write_text("\n".join(["path,start,duration,word,split", *rows, "b.wav,,,x,valid", "c.wav,,,x,test"]))
        train = read_manifest(path, crops=True)[1]["train"]
    assert len({clip.id for clip in train}) == len(crops)
    assert {(clip.start, clip.duration) for clip in train} == set(crops)


def test_known_columns_in_any_case(tmp_path: Path):
    rows = [f"{row},0,0.001" for row in speaker_rows()]
    lower = read_manifest(plant(tmp_path, "path,speaker,word,start,duration", rows), crops=True)
    assert read_manifest(plant(tmp_path, "Path,SPEAKER,word,Start,Duration", rows), crops=True) == lower
    rows = ["a.wav,train,,x", "b.wav,train,,y", "c.wav,dev,,x", "d.wav,test,,y"]
    task, splits, *_ = read_manifest(plant(tmp_path, "PATH,Split,Source,Word", rows), source="Source")
    assert counts(splits) == (2, 1, 1)
    assert [slot.name for slot in task.slots] == ["Word"]


def test_columns_that_are_not_labels(tmp_path: Path):
    """If the user did not choose the slots, errors about them say how to choose."""
    rows = [f"{number}.wav,{'ny'[number % 2]},sentence {number}" for number in range(20)]
    advice = r"; if not all of word, text are labels, select the labels \(--labels\)$"
    path = plant(tmp_path, "path,word,text", rows)
    with pytest.raises(BuildError, match=r"text: 'sentence 0' has fewer than 3 clips.*" + advice):
        read_manifest(path)
    assert counts(read_manifest(path, labels=["word"])[1]) == (16, 2, 2)
    with pytest.raises(BuildError, match=r"has fewer than 3 clips.*in a column split$"):
        read_manifest(path, labels=["text"])
    with pytest.raises(BuildError, match=r"text: every label is 'same'.*" + advice):
        read_manifest(plant(tmp_path, "path,word,text", ["a.wav,x,same", "b.wav,y,same"]))
    split = [
        f"{name}{number}.wav,{name},{'ny'[number]},{name}" for name in ("train", "valid", "test") for number in range(2)
    ] + ["more.wav,train,n,more"]
    with pytest.raises(BuildError, match=r"is in valid but not in train.*" + advice):
        read_manifest(plant(tmp_path, "path,split,word,text", split))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            'path,text,label\na.wav,"he said,x\nb.wav,stop",y\n',
            r"line 2, column text: a quoted field continues",
        ),
        ('path,label,text\na.wav,"x\nb.wav,y",t\nc.wav,x,t\n', r"line 2, column label: a quoted field continues"),
        ('path,"la\nbel"\na.wav,x\n', r"line 1, column la\nbel: a quoted field continues"),
        ('path,label\n\na.wav,x\nb.wav,"y\nc.wav,x\n', r"line 4: a quote that opens in this line is not closed"),
        ('path,label\na.wav,"x" y\n', r"line 2: a quote that opens in this line is not closed correctly"),
        ('path,label\na.wav,x"\n', r"line 2, column label: the field 'x\"' contains a quote but is not quoted"),
        ('path,label\na.wav,5" pipe\n', r"line 2, column label: the field .* contains a quote"),
        ("path,label\na.wav,x,y\n", r"line 2 has 3 fields where the header has 2"),
        ("path,label\na.wav,x\nb.wav\n", r"line 3 has 1 fields where the header has 2"),
        ("path,label\ra.wav,x\rb.wav\r", r"line 3 has 1 fields where the header has 2"),
        ("path,label\na.wav,x\0\n", r"line 2 holds a NUL byte"),
        ("path,label,label\na.wav,x,y\n", r"has two columns 'label'"),
        ("sep=;\npath;label\na.wav;x\n", r"line 1: 'sep=;' is separated by semicolons: save it with commas"),
        ("# my data, of May\npath,label\na.wav,x\n", r"has the columns \['# my data', 'of May'\] but no path"),
        ("path,label\n#a.wav,x\n", r"line 2, column path: .*#a.wav is missing"),
        ("path,label\nA.wav,x\n", r"line 2, column path: .*A.wav is missing"),
        ("path,label\na" + "b" * 5000 + ".wav,x\n", r"line 2, column path: .*bbb.wav is missing"),
        ("path,label\na.wav,x\n./a.wav,y\n", r"line 3 repeats .*line 2, column path: 'a.wav'; remove one of them$"),
        ("path,label\nfolder.wav,x\n", r"folder.wav is a folder, pipe or device; give a recording"),
        ("path,label\npipe.wav,x\n", r"pipe.wav is a folder, pipe or device; give a recording"),
        ("path,label\ngone.wav,x\n", r"gone.wav is a dangling link; restore the file"),
        ("path,label,start\na.wav,x,1\n", r"the column start may be crops .*give --crops; .*such as --labels=label$"),
        ("path,label,Duration\na.wav,x,1\n", r"the column Duration may be crops"),
        ("path,label,source\na.wav,x,1\n", r"the column source may be the source of .*give --source=source; if not"),
    ],
)
def test_misleading_csvs_are_refused(tmp_path: Path, content: str, fault: str):
    distinct(tmp_path, ["a.wav", "b.wav", "c.wav"])
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "gone.wav").symlink_to("nowhere")
    path = tmp_path / "my.csv"
    path.write_text(content, newline="")
    with pytest.raises(BuildError, match=fault):
        read_manifest(path)
    if "column text" in fault:  # a text column must not swallow rows either
        with pytest.raises(BuildError, match=fault):
            read_manifest(path, labels=["label"])
        with pytest.raises(BuildError, match=r"line 2, column text: the quote .* closes in a later row, after b.wav"):
            read_manifest(path, text=["text"])


@pytest.mark.parametrize(
    ("encoding", "fault"),
    [
        ("utf-16", "is text in UTF-16: save it as text in UTF-8"),
        ("utf-16-le", "NUL byte"),
        ("utf-32", "UTF-32"),
        ("cp1257", "line 2 is not UTF-8 text"),
    ],
)
def test_texts_in_other_encodings_are_named(tmp_path: Path, encoding: str, fault: str):
    path = tmp_path / "my.csv"
    path.write_bytes("path,label\na.wav,ačiū\n".encode(encoding))
    with pytest.raises(BuildError, match=fault):
        read_manifest(path)


def test_workbooks_and_archives_are_named(tmp_path: Path):
    path = tmp_path / "my.csv"
    for content, fault in [
        (b"PK\3\4\0\0", "is a zip archive, such as a workbook of Excel: save"),
        (b"\x1f\x8b\0", "gzip"),
        (b"BZh91AY&SY", "bzip2"),
    ]:
        path.write_bytes(content)
        with pytest.raises(BuildError, match=fault):
            read_manifest(path)


def test_csvs_of_common_programs(tmp_path: Path):
    """Byte order marks, line ends, quotes, blanks and absolute paths of all kinds give equal data."""
    names = [f"a/{number}.wav" for number in range(20)]
    distinct(tmp_path, names)
    labels = ["yes" if number % 2 else "no, sir" for number in range(20)]
    rows = [f'{name},"{label}"' for name, label in zip(names, labels, strict=True)]
    path = tmp_path / "my.csv"

    def read(text: str) -> Splits:
        path.write_text(text, newline="")
        data = read_manifest(path)
        assert (data.notes, data.raw) == ((), str(tmp_path))
        return data.splits

    expected = read("\n".join(["path,label", *rows]))
    assert sum(counts(expected)) == 20
    for text in (
        "\ufeff" + "\r\n".join(["path,label", *rows, "", ",", ""]),
        "\r".join(["sep=,", "path,label", *rows]),
        "\n\n" + "\n".join([" path , label ", *(row.replace(",", " , ", 1) for row in rows)]) + "\n\n",
        "\n".join(['"path","label"', *(f'"{tmp_path}/./' + row.replace(",", '",', 1) for row in rows)]),
    ):
        assert read(text) == expected


def test_free_text_may_have_line_breaks_and_quotes(tmp_path: Path):
    rows = [f'{number}.wav,"so, he\nsaid ""{number}""",5" of it,{"ny"[number % 2]}' for number in range(20)]
    distinct(tmp_path, [f"{number}.wav" for number in range(20)])
    path = tmp_path / "my.csv"
    path.write_text("\n".join(["path,text,more,label", *rows]))
    task, splits, _, notes = read_manifest(path, text=["text", "more"])
    assert ([slot.name for slot in task.slots], counts(splits), notes) == (["label"], (16, 2, 2), ())


def test_text_before_the_path_may_not_swallow_its_row(tmp_path: Path):
    rows = [f"said {number},{number}.wav,{'ny'[number % 2]}" for number in range(20)]
    distinct(tmp_path, [f"{number}.wav" for number in range(20)])
    path = tmp_path / "my.csv"
    for where in (tmp_path, Path()):  # absolute and relative
        lines = [row.replace(",", f",{where}/", 1) if where.is_absolute() else row for row in rows]
        lines[3], lines[4] = f'"{lines[3]}', lines[4].replace("said 4", 'said 4"')
        path.write_text("\n".join(["text,path,label", *lines]))
        with pytest.raises(BuildError, match=r"line 5, column text: the quote .* closes in a later row, after .*3.wav"):
            read_manifest(path, text=["text"])


@pytest.mark.parametrize("names", ["train valid test", "Train Dev", "trn tst", "train_set test-set", "dev2 test2"])
def test_splits_under_another_name_are_not_labels(tmp_path: Path, names: str):
    called = names.split()
    rows = [f"{number}.wav,{'ny'[number % 2]},{called[number % len(called)]}" for number in range(30)]
    path = plant(tmp_path / "csv", "path,label,subset", rows)
    with pytest.raises(BuildError, match=r"the column subset looks like splits .*name it split"):
        read_manifest(path)
    assert len(read_manifest(path, labels=["label", "subset"]).task.slots) == 2
    known = names in ("train valid test", "Train Dev")
    distinct(tmp_path / "dirs", [f"{label}/{split}/{n}.wav" for label in "ny" for split in called for n in range(3)])
    if known:
        with pytest.raises(BuildError, match=r"has the splits .* inside the classes: move them up"):
            read_folders(tmp_path / "dirs")
        return
    distinct(tmp_path / "up", [f"{split}/{label}/{n}.wav" for label in "ny" for split in called for n in range(3)])
    with pytest.raises(
        BuildError, match="look like splits, but would be read as labels: name splits train, valid, test"
    ):
        read_folders(tmp_path / "up")


def test_default_label_columns_are_noted(tmp_path: Path):
    rows = [f"{number}.wav,{'ny'[number % 2]},s{number % 5}" for number in range(30)]
    path = plant(tmp_path, "path,label,speaker_id", rows)
    assert "label columns: label, speaker_id; if not all of these" in read_manifest(path).notes[0]
    assert not read_manifest(path, labels=["label", "speaker_id"]).notes
    unseen = [f"{number}.wav,{'ny'[number % 2]}{chr(0x200B) * (number > 20)}" for number in range(30)]
    path = plant(tmp_path, "path,label", unseen)
    with pytest.raises(BuildError, match=r"my data.csv: slot 'label': labels .* look alike"):
        read_manifest(path)


def test_times_and_sources_are_used_only_on_request(tmp_path: Path):
    rows = [f"{number}.wav,{'ny'[number % 2]},{350 + number},{number // 2},s{number // 4}" for number in range(20)]
    path = plant(tmp_path, "path,label,duration,START,film", rows)
    plain = read_manifest(path, labels=["label"])
    assert plain.notes == ("unused columns: duration, START, film",)
    assert all((clip.start, clip.duration, clip.source) == (0, None, "") for clip in everything(plain.splits))
    crops = read_manifest(path, labels=["label"], crops=True, source="film")
    assert {(clip.start, clip.duration) for clip in everything(crops.splits)} == {(n // 2, 350 + n) for n in range(20)}
    assert {clip.source for clip in everything(crops.splits)} == {f"s{n}" for n in range(5)}
    assert crops.notes == ()
    path = plant(tmp_path, "path,START", [f"{number}.wav,{'ny'[number % 2]}" for number in range(20)])
    assert read_manifest(path, labels=["START"]).task.slots[0].name == "START"
    path = plant(tmp_path, "path,label,start", ["0.wav,y,0", "0.wav,n,1"])
    with pytest.raises(
        BuildError, match=r"repeats .*; remove one of them, or, if they are crops in seconds, give --crops"
    ):
        read_manifest(path, labels=["label"])
    for wrong, fault in [
        ({"source": "tape"}, "has no column 'tape' to use as source: choose from path, label, start"),
        ({"source": "path"}, "but no path"),
        ({"text": ["words"]}, "has no column 'words' to use as text"),
        ({"labels": ["label", "label"]}, "label, label cannot be the labels: choose from"),
    ]:
        with pytest.raises(BuildError, match=fault):
            read_manifest(path, **wrong)
    with pytest.raises(BuildError, match="line 1: both source and film are the column source: rename one"):
        read_manifest(plant(tmp_path, "path,label,source,film", ["0.wav,y,a,b"]), source="film")
    with pytest.raises(BuildError, match=r"has the ends of crops \(End\): give their length in a column duration"):
        read_manifest(plant(tmp_path, "path,label,start,End", ["0.wav,y,0,1"]), crops=True)
    with pytest.raises(BuildError, match="but no start or duration: leave --crops out, or add one"):
        read_manifest(plant(tmp_path, "path,label", ["0.wav,y"]), crops=True)


def test_paths_of_several_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A CSV with a relative path; absolute paths inside its folder, outside, and mixed with relative ones."""
    for folder in ("lists", "disk1", "disk2/deep"):
        distinct(tmp_path / folder, [f"{number}.wav" for number in range(10)])
        for file in (tmp_path / folder).iterdir():
            file.write_bytes(file.read_bytes() + folder.encode())
    monkeypatch.chdir(tmp_path / "lists")

    def root(*paths: str) -> str:
        rows = [f"{path}/{number}.wav,{'ny'[number % 2]}" for path in paths for number in range(10)]
        Path("my.csv").write_text("\n".join(["path,label", *rows]))
        data = read_manifest("my.csv")
        assert len(everything(data.splits)) == len(rows)
        assert all(Path(data.raw, clip.path).is_file() for clip in everything(data.splits))
        return data.raw

    assert root(f"{tmp_path}/lists") == root(".") == str(tmp_path / "lists")
    assert root(f"{tmp_path}/lists/../disk1") == root(f"{tmp_path}/disk1") == str(tmp_path / "disk1")
    assert root(f"{tmp_path}/disk1", f"{tmp_path}/disk2/deep") == str(tmp_path)
    assert root(".", f"{tmp_path}/disk2/deep") == str(tmp_path)
    assert root("../disk1", f"{tmp_path}/disk2/deep") == str(tmp_path)
    with pytest.raises(BuildError, match=r"lists/0.wav is not under .*disk1"):
        read_manifest(plant(tmp_path, "path,label", [f"{tmp_path}/lists/0.wav,y"]), "../disk1")


def test_clips_without_a_speaker_are_noted(tmp_path: Path):
    rows = [
        f"{number}.wav,{['anna', 'Anna ', 'ben', 'eve', ''][number % 5]},{'ny'[number % 2]}" for number in range(20)
    ]
    assert read_manifest(plant(tmp_path, "path,speaker,label", rows)).notes == (
        "speakers: 'Anna' and 'anna' look almost alike and are treated as different",
        "4 of 20 clips have no speaker: their speakers may be in several splits",
    )


def test_flags_of_user_data_are_refused_elsewhere(tmp_path: Path):
    parser = argparse.ArgumentParser()
    data_flags.add_data_flags(parser)
    for flags, fault in [
        (["--folders=x", "--labels=a"], "--labels is valid only with --manifest: leave it out"),
        (["--folders=x", "--crops"], "--crops is valid only with --manifest"),
        (["--task=fsc", "--raw=x", "--source=a"], "--source is valid only with --manifest"),
        (["--task=fsc", "--raw=x", "--name=a"], "--name is valid only with --manifest or --folders"),
        (["--task=fsc", "--raw=x", "--split-seed=0"], "--split-seed is valid only with --manifest or --folders"),
        (["--splits=x", "--raw=x", "--protocol=honest"], "--protocol is valid only with --task"),
        (["--folders=x", "--protocol=honest"], "--protocol is valid only with --task"),
    ]:
        with pytest.raises(BuildError, match=fault):
            data_flags.chosen(parser.parse_args(flags))


def test_a_missing_csv(tmp_path: Path):
    with pytest.raises(BuildError, match=r"nothere.csv is missing: correct the path of your CSV"):
        read_user_data(tmp_path / "nothere.csv")


def test_missing_paths(tmp_path: Path):
    path = plant(tmp_path, "path,word", ["a.wav,yes"])
    for row, fault in [
        ("none.wav,no", r"line 3, column path: .*none.wav is missing"),
        ("x\\a.wav,no", r"is missing; correct the path with forward slashes"),
        ("/elsewhere/a.wav,no", r"line 3, column path: /elsewhere/a.wav is missing"),
        (",no", r"line 3, column path is empty"),
    ]:
        path.write_text(f"path,word\na.wav,yes\n{row}\n")
        with pytest.raises(BuildError, match=fault):
            read_manifest(path)
    path.write_bytes("path,word\na.wav,ačiū\n".encode("cp1257"))
    with pytest.raises(BuildError, match="is not UTF-8 text"):
        read_manifest(path)
    with pytest.raises(BuildError, match="wrod cannot be the labels: choose from"):
        read_manifest(plant(tmp_path, "path,word", ["a.wav,yes"]), labels=["wrod"])


def test_folders_of_classes(tmp_path: Path):
    distinct(tmp_path, [f"{label}/sub/{number}.wav" for label in ("dog", "big cat") for number in range(10)])
    (tmp_path / "notes.txt").write_text("x")
    task, splits, *_ = read_folders(tmp_path, name="pets")
    assert (task.name, task.slots[0].name, task.slots[0].labels) == ("pets", "label", ("big cat", "dog"))
    assert counts(splits) == (16, 2, 2)
    assert all(clip.path.startswith(clip.labels[0]) for clip in everything(splits))
    record(tmp_path, ["loose.wav"])
    with pytest.raises(BuildError, match=r"loose.wav is not in the folder of a class"):
        read_folders(tmp_path)


def test_folders_that_differ_only_in_spaces_are_refused(tmp_path: Path):
    distinct(tmp_path, [f"{label}/{number}.wav" for label in ("no", "yes ") for number in range(10)])
    assert read_folders(tmp_path).task.slots[0].labels == ("no", "yes")
    distinct(tmp_path, ["yes/new.wav"])
    with pytest.raises(BuildError, match="the folders 'yes ' and 'yes' differ only in spaces: merge them"):
        read_folders(tmp_path)


def test_a_note_where_the_labels_may_be_a_level_below(tmp_path: Path):
    distinct(tmp_path, [f"{top}/{word}/{n}.wav" for top in "ab" for word in ("no", "yes") for n in range(8)])
    data = read_folders(tmp_path)
    assert data.task.slots[0].labels == ("a", "b")
    assert data.notes == (
        "every class has the same subfolders (no, yes): if those are the labels, list the files in a CSV instead",
    )
    distinct(tmp_path, ["a/maybe/0.wav"])
    assert not read_folders(tmp_path).notes


def test_folders_of_splits(tmp_path: Path):
    distinct(tmp_path, [f"{split}/{label}/0.wav" for split in ("train", "dev", "test") for label in ("dog", "cat")])
    task, splits, root, _ = read_user_data(tmp_path)
    assert (counts(splits), root) == ((2, 2, 2), str(tmp_path))
    assert task.slots[0].labels == ("cat", "dog")
    with pytest.raises(BuildError, match="leave the root and columns out"):
        read_user_data(tmp_path, labels=["label"])


def test_folders_of_splits_and_others(tmp_path: Path):
    record(tmp_path, [f"{top}/{label}/0.wav" for top in ("train", "Test", "holdout", "extra") for label in "ab"])
    with pytest.raises(BuildError, match=r"Test, train are names of splits, extra, holdout are not: .*move .*CSV"):
        read_folders(tmp_path)


def test_leaks_of_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [f"{row},{split}" for row, split in zip(speaker_rows(), cycle(["train", "test", "train", "valid"]))]
    path = plant(tmp_path, "path,speaker,word,split", rows)
    (tmp_path / "a/yes0.wav").write_bytes((tmp_path / "j/no1.wav").read_bytes())
    leaks.main([f"--manifest={path}", f"--out={tmp_path / 'splits'}"])
    assert "as copies: 1, the first a/yes0.wav" in " ".join(read_splits(tmp_path / "splits").notes)
    printed, notes = capsys.readouterr()
    assert "# Leaks of my_data, protocol as given by my data.csv, seed 0" in printed
    assert "**content**, train and test: 1 " in printed
    assert "in two splits, as copies: 1, the first a/yes0.wav in train and j/no1.wav in test" in notes
