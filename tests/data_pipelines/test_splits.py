"""Properties of file lookup, tables and splitting for any data set."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import splits, tables
from data_pipelines.clips import Clip
from data_pipelines.splits import BuildError
from spjax.tasks import Slot, Task

THIRDS = {"train": 0.8, "valid": 0.1, "test": 0.1}
LONERS = [Clip(f"x{number}", "x.wav", ("a",)) for number in range(3)]  # guarantee at least three groups
TASK = Task("toy", (Slot("word", ("a", "b")),))


@st.composite
def clip_lists(draw):
    rows = draw(
        st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=120)
    )
    return [
        Clip(f"{number:03d}", f"{number}.wav", (label,), speaker=f"s{speaker}", source=f"r{source}")
        for number, (label, speaker, source) in enumerate(rows)
    ]


def everything(made):
    return sorted(clip for part in made.values() for clip in part)


def test_orders_never_change():
    assert splits.shuffled(range(10), 0) == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert splits.shuffled("abc", 5) != splits.shuffled("abc", 6)
    np.testing.assert_allclose(splits.uniform(3, 7), [0.77014095, 0.11192724, 0.18909773], atol=1e-8)


@given(clip_lists(), st.integers(0, 3))
def test_stratified_splits_are_balanced(clips, seed):
    made = splits.stratified(clips, THIRDS, seed)
    assert everything(made) == sorted(clips)
    number = Counter(clip.labels for clip in clips)
    for split, share in THIRDS.items():
        its = Counter(clip.labels for clip in made[split])
        for label, count in number.items():
            assert abs(its[label] - share * count) < 3
            assert count < 3 or its[label] >= 1
    shuffled = random.Random(seed).sample(clips, len(clips))
    assert splits.stratified(shuffled, THIRDS, seed) == made


def test_stratified_sizes_are_exact_where_they_can_be():
    clips = [Clip(f"{number:04d}", "a.wav", (str(number % 7),)) for number in range(1000)]
    assert [len(part) for part in splits.stratified(clips, THIRDS, 0).values()] == [800, 100, 100]
    assert splits.stratified(clips, THIRDS, 0) != splits.stratified(clips, THIRDS, 1)
    fifths = splits.folds(clips, 5, 0)
    assert [len(fold) for fold in fifths] == [200] * 5


@given(clip_lists(), st.integers(0, 3))
def test_by_speaker_keeps_speakers_and_sources_together(clips, seed):
    made = splits.by_speaker(clips + LONERS, THIRDS, seed)
    clips = clips + LONERS
    assert everything(made) == sorted(clips)
    assert all(made.values())
    for what in ("speaker", "source"):
        names = [{getattr(clip, what) for clip in part} - {""} for part in made.values()]
        assert sum(map(len, names)) == len(set().union(*names))
    assert splits.by_speaker(reversed(clips), THIRDS, seed) == made


def test_by_speaker_gives_every_split_every_label_where_speakers_suffice():
    # label "rare" has three speakers among 30, so each split must have one of them
    clips = [
        Clip(f"{speaker:02d}-{take}", "a.wav", ("rare" if speaker % 10 == 3 and take > 7 else "often",), f"s{speaker}")
        for speaker in range(30)
        for take in range(10)
    ]
    made = splits.by_speaker(clips, THIRDS, 0)
    assert all({clip.labels for clip in part} == {("rare",), ("often",)} for part in made.values())
    assert [len(part) for part in made.values()] == [240, 30, 30]


def test_clips_without_speaker_are_single_groups():
    clips = [Clip(f"{number:02d}", "a.wav", ("a",)) for number in range(20)]
    assert [len(part) for part in splits.by_speaker(clips, THIRDS, 0).values()] == [16, 2, 2]
    with pytest.raises(BuildError, match=r"1 groups of clips that must stay together .* are too few for 3 splits"):
        splits.by_speaker([clip._replace(source="one") for clip in clips], THIRDS, 0)
    assert len(splits.by_source([clip._replace(speaker="one") for clip in clips], THIRDS, 0)["test"]) == 2


@pytest.mark.parametrize("fractions", [{}, {"train": 0.5}, {"train": 1.2, "test": -0.2}])
def test_invalid_fractions_are_refused(fractions):
    with pytest.raises(BuildError, match="above 0 and sum to 1"):
        splits.stratified([], fractions, 0)


def test_read_table(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_bytes('\ufeffpath,label\r\n"a,b.wav",x\r\n\r\n"two\nlines",y\r\n'.encode())
    assert [tuple(row.values.values()) for row in tables.read_table(path, ("path",))] == [
        ("a,b.wav", "x"),
        ("two\nlines", "y"),
    ]
    assert [row.where[-6:] for row in tables.read_table(path, ("path",))] == ["line 2", "line 4"]
    for content, fault in [
        ("path,path\n1,2\n", "has two columns 'path'"),
        ("path\n", "has no rows"),
        ("", "lacks path"),
        ("path,b\n1\n", r"line 2 has 1 fields where the header has 2"),
        ('path\n"' + "x" * 200_000, r"t.csv, line 2: a quote that opens in this line is not closed"),
        ("path,b,,\n1,2,,\n3,4,,5\n", r"line 1, column 4 has no name, and .*t.csv, line 3 a value in it"),
        (",path,,\n0,1,,\n0,1,2,3\n", r"line 1, column 4 has no name"),
        ("path,b,,\n1,2\n", r"line 2 has 2 fields where the header has 4"),
    ]:
        path.write_text(content)
        with pytest.raises(BuildError, match=fault):
            tables.read_table(path, ("path",))
    with pytest.raises(BuildError, match=r"none.csv is missing"):
        tables.read_table(tmp_path / "none.csv", ())


def test_tables_of_common_programs(tmp_path: Path):
    """Columns without name or value, byte order marks of concatenated tables, long fields."""
    path = tmp_path / "t.csv"
    long = "x" * 200_000
    path.write_text(f'\ufeff\ufeffpath,b,, \na.wav,"{long}",, \n,,,\n', encoding="utf-8")
    assert [row.values for row in tables.read_table(path, ("path",))] == [{"path": "a.wav", "b": long}]


def test_checked_sorts_and_refuses():
    good = {"train": [Clip("2", "2", ("b",)), Clip("1", "1", ("a",))]}
    assert [clip.id for clip in splits.checked(good, TASK)["train"]] == ["1", "2"]
    for bad, fault in [
        ([], "split 'train' has no clips"),
        ([Clip("1", "1", ("a",)), Clip("1", "2", ("a",))], "split 'train' has '1' twice"),
        ([Clip("1", "1.wav", ("c",))], "1.wav has the label 'c', which is not in the task: word: a, b"),
        ([Clip("1", "1.wav", ("a", "b"))], r"1.wav has the label 'a \| b'"),
    ]:
        with pytest.raises(BuildError, match=fault):
            splits.checked({"train": bad}, TASK)
