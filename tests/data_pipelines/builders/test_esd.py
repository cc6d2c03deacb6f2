"""ESD as unit text: emotions of new speakers and sentences, speakers in new sentences, and the published units."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.builders import esd
from data_pipelines.leaks import leak_report
from data_pipelines.split_manifests import inspect_files
from data_pipelines.splits import BuildError, shuffled
from spjax.tasks import TASKS
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, shared, write

SPEAKERS = TASKS["esd_speaker"].slots[0].labels
EMOTIONS = TASKS["esd_emotion"].slots[0].labels


def plant(root: Path, order: int, sentences: int = 10) -> None:
    """Writes every sentence by every speaker in every emotion, in random order; all frames differ."""
    rows = [
        (f"{who}_{350 * mood + number:06d}", who, mood, number)
        for who in SPEAKERS
        for mood in range(5)
        for number in range(1, sentences + 1)
    ]
    for part, its in (("val", rows[::3]), ("test", [row for i, row in enumerate(rows) if i % 3])):
        lines = [f"{name}|{who}|{who[2:]} {mood} {mood} {number} {number}\n" for name, who, mood, number in its]
        table = [f"{name}\t{who}\t{EMOTIONS[mood]}\t{number}\n" for name, who, mood, number in its]
        write(root, f"esd.{part}.frames.txt", "".join(shuffled(lines, order)))
        write(root, f"esd.{part}.labels.tsv", "id\tspeaker\temotion\tsentence\n" + "".join(shuffled(table, order + 1)))


def test_emotions_are_of_new_speakers_and_sentences(tmp_path: Path) -> None:
    plant(tmp_path, 0)
    found = esd.emotion(tmp_path)
    assert counts(found.splits) == (5 * 5 * 5, 2 * 2 * 5, 3 * 3 * 5)
    assert not shared(found.splits, "speaker") | shared(found.splits, "source")
    assert all(labels(part) == set(EMOTIONS) for part in found.splits.values())
    assert found.notes == (
        "310 of 500 utterances are left out: their speaker and their sentence are in different splits",
    )
    assert leak_report(found.task, found.splits, "paper", inspect_files(tmp_path, _paths(found))).clean
    every = esd.emotion(tmp_path, "speakers")
    assert counts(every.splits) == (250, 100, 150)
    assert not shared(every.splits, "speaker")
    assert not every.notes
    plant(tmp_path / "again", 1)
    assert _ids(esd.emotion(tmp_path / "again")) == _ids(found)


def test_speakers_read_new_sentences(tmp_path: Path) -> None:
    plant(tmp_path, 0)
    found = esd.speaker(tmp_path)
    assert counts(found.splits) == (300, 100, 100)
    assert not shared(found.splits, "source")
    assert all(labels(part) == set(SPEAKERS) for part in found.splits.values())
    assert leak_report(found.task, found.splits, "paper", inspect_files(tmp_path, _paths(found))).clean


def test_faults_are_named(tmp_path: Path) -> None:
    plant(tmp_path, 0, sentences=2)
    with pytest.raises(BuildError, match="esd has 2 sentences, too few for 3 splits"):
        esd.speaker(tmp_path)
    plant(tmp_path, 0)
    table = tmp_path / "esd.val.labels.tsv"
    table.write_text(table.read_text().replace("angry", "cross"))
    with pytest.raises(BuildError, match=r"esd\.val\.frames\.txt:\d+ has the label 'cross', which is not in the task"):
        esd.emotion(tmp_path)
    table.unlink()
    with pytest.raises(BuildError, match=r"esd\.val\.frames\.txt:\d+ \(.*\) is in none of esd\.test\.labels\.tsv"):
        esd.emotion(tmp_path)


def test_real_units(more_units: Path) -> None:
    found, speakers = esd.emotion(more_units), esd.speaker(more_units)
    assert counts(found.splits) == (600, 120, 210)
    assert counts(esd.emotion(more_units, "speakers").splits) == (1250, 500, 750)
    assert counts(speakers.splits) == (1500, 500, 500)
    for one in (found, speakers):
        assert leak_report(one.task, one.splits, "paper", inspect_files(more_units, _paths(one))).clean


def _paths(found: esd.UnitSplits) -> list[str]:
    return [clip.path for clip in everything(found.splits)]


def _ids(found: esd.UnitSplits) -> dict[str, list[str]]:
    return {split: [clip.id for clip in part] for split, part in found.splits.items()}
