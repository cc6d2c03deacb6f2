"""Leak reports: planted leaks are found, and clean splits have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipelines import leaks
from data_pipelines.clips import Clip
from data_pipelines.leaks import leak_report
from data_pipelines.split_manifests import FileFacts, read_splits
from spjax.tasks import Slot, Task
from tests.data_pipelines.builders import test_ar_sc, test_lt_sc

TASK = Task("toy", (Slot("word", ("a", "b")),))


def clip(name: str, label: str, speaker: str = "", source: str = "") -> Clip:
    return Clip(name, f"{name}.wav", (label,), speaker, source)


def clean() -> dict[str, list[Clip]]:
    """Splits with two speakers each, who say both words twice."""
    return {
        split: [
            clip(f"{split}-{speaker}-{label}{take}", label, f"{split}-{speaker}")
            for speaker in range(2)
            for label in "ab"
            for take in range(2)
        ]
        for split in ("train", "valid", "test")
    }


def facts(splits: dict[str, list[Clip]]) -> dict[str, FileFacts]:
    return {one.path: FileFacts(one.path, 1, 16_000, 1.0) for part in splits.values() for one in part}


def test_clean_splits_have_no_leaks():
    report = leak_report(TASK, clean(), "honest", facts(clean()))
    assert report.clean
    assert report.counts == {"train": 8, "valid": 8, "test": 8}
    assert report.speakers == {"train": 2, "valid": 2, "test": 2}
    assert report.labels == {
        "word": {"a": dict(report.counts | {"train": 4, "valid": 4, "test": 4})}
        | {"b": {"train": 4, "valid": 4, "test": 4}}
    }
    assert "None found." in report.markdown()


def test_planted_leaks_are_found():
    splits = clean()
    files = facts(splits)
    splits["test"][0] = splits["test"][0]._replace(speaker="train-0")
    splits["test"][1] = splits["test"][1]._replace(source="tape")
    splits["valid"][1] = splits["valid"][1]._replace(source="tape")
    splits["valid"][2] = splits["train"][2]._replace(speaker="valid-0")
    files[splits["test"][3].path] = files[splits["train"][3].path]
    report = leak_report(TASK, splits, "paper", files)
    assert {(one.what, one.splits, one.count, one.clips) for one in report.shared} == {
        ("speaker", ("train", "test"), 1, (4, 1)),
        ("source", ("valid", "test"), 1, (1, 1)),
        ("id", ("train", "valid"), 1, (1, 1)),
        ("path", ("train", "valid"), 1, (1, 1)),
        ("content", ("train", "test"), 1, (1, 1)),
    }
    content = next(one for one in report.shared if one.what == "content")
    assert content.examples == ("train-0-b1.wav = test-0-b1.wav",)
    assert not report.clean
    assert "- **speaker**, train and test: 1 (4 clips of train, 1 of test): `train-0`" in report.markdown()
    assert json.loads(report.json())["shared"][0]["what"] == "speaker"


def test_missing_and_predictable_labels_are_reported():
    splits = clean()
    splits["valid"] = [one for one in splits["valid"] if one.labels == ("a",)]
    report = leak_report(TASK, splits, "paper")
    assert report.missing == (("word", "b", "valid"),)
    assert "- valid lacks **b** (word)" in report.markdown()
    assert not report.told
    assert "Contents of files were not compared." in report.markdown()
    by_split = {
        split: [one._replace(labels=("a" if one.speaker.endswith("0") else "b",)) for one in part]
        for split, part in clean().items()
    }
    assert leak_report(TASK, by_split, "honest").clean  # speakers of one split predict nothing about another
    apart = {
        split: [one._replace(speaker=one.speaker[-1] if split != "test" else one.speaker) for one in part]
        for split, part in by_split.items()
    }
    (one,) = leak_report(TASK, apart, "paper").told
    assert (one.slot, one.by, one.right, one.chance) == ("word", "speaker", 1.0, 0.5)
    rates = {
        one.path: FileFacts(one.path, 1, 8_000 if one.labels == ("a",) else 48_000, 1.0)
        for part in clean().values()
        for one in part
    }
    (one,) = leak_report(TASK, clean(), "paper", rates).told
    assert (one.by, one.right, one.parts) == ("sampling rate", 1.0, True)


def test_a_speaker_label_is_not_a_leak():
    splits = {
        split: [one._replace(speaker=one.labels[0], source=f"{split} tape") for one in part]
        for split, part in clean().items()
    }
    assert leak_report(TASK, splits, "honest").clean
    splits["test"][0] = splits["test"][0]._replace(speaker="c")  # the label differs, so speakers count again
    report = leak_report(TASK, splits, "honest")
    assert {one.what for one in report.shared} == {"speaker"}
    assert [one.by for one in report.told] == ["speaker"]


def test_command_writes_report_and_manifests(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    test_ar_sc.plant(tmp_path / "raw", 0)
    leaks.main(["--task=ar_sc", f"--raw={tmp_path / 'raw'}", f"--out={tmp_path / 'out'}"])
    printed = capsys.readouterr().out
    assert "# Leaks of ar_sc, protocol paper" in printed
    assert "**source**, train and test" in printed
    assert "**content**, train and test" in printed
    assert "**command** from the sampling rate" in printed
    assert "8,000 Hz 120, 48,000 Hz 72" in printed
    assert (tmp_path / "out" / "leaks.md").read_text() == printed.removesuffix("\n")
    assert json.loads((tmp_path / "out" / "leaks.json").read_text())["rates"] == {"8000": 120, "48000": 72}
    assert read_splits(tmp_path / "out").protocol == "paper"


def test_command_with_a_protocol_and_without_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    test_lt_sc.plant(tmp_path, 0)
    leaks.main(["--task=lt_sc", f"--raw={tmp_path}", "--no-files"])
    assert "- valid lacks **į_dešinę** (command)" in capsys.readouterr().out
    leaks.main(["--task=lt_sc", f"--raw={tmp_path}", "--no-files", "--protocol=honest"])
    assert "lacks" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--task=lt_sc"], "--task needs --raw"),
        (["--task=lt_sc", "--raw=nowhere"], "nowhere/dataset is not a folder"),
        (["--task=lt_sc", "--raw=x", "--out=y", "--no-files"], "--out writes the hashes of files too"),
        (["--manifest=none.csv"], "none.csv is missing"),
    ],
)
def test_command_errors(flags: list[str], fault: str):
    with pytest.raises(SystemExit, match=fault):
        leaks.main(flags)
