"""Dysarthric Mandarin: 13 and 19 classes, a fifth of train for valid, one test speaker."""

from __future__ import annotations

from pathlib import Path

import pytest
from etils import epath

from data_pipelines.builders import dm_sc
from data_pipelines.splits import BuildError
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, record, shared, write


def plant(root: Path, order: int) -> None:
    names, tables = [], {"train_full": [], "test_full": []}
    for speaker in (1, 2, 3):
        for word in range(1, 20):
            for take in range(1, 11):
                name = f"D_SPK{speaker}/{word:02d}/D_SPK{speaker}_c{word} ({take}).wav"
                names.append(name)
                row = f"/elsewhere/dysarthria_zh_command/{name}\t{word:02d}\n"
                tables["test_full" if (take + word) % 10 < 3 else "train_full"].append(row)
    record(root, names, order)
    for table, rows in tables.items():
        write(root, f"{table}.csv", "filename\tlabel\n" + "".join(rows))


def test_splits(tmp_path: Path):
    found = listed(dm_sc.clips, plant, tmp_path / "13", ["paper", "honest"])
    assert counts(found["paper"]) == (224, 49, 117)
    assert counts(found["honest"]) == (208, 52, 130)
    whole = listed(dm_sc.clips19, plant, tmp_path / "19", ["paper", "honest"])
    assert counts(whole["paper"]) == (319, 80, 171)
    assert counts(whole["honest"]) == (304, 76, 190)
    for splits, classes in ((found, 13), (whole, 19)):
        assert all(len(labels(part)) == classes for of in splits.values() for part in of.values())
        assert len(shared(splits["paper"], "speaker")) == 3
        assert shared(splits["honest"], "speaker") == {("train", "valid")}
        assert {clip.speaker for clip in splits["honest"]["test"]} == {"D_SPK3"}
    words = {clip.id.split("/")[1]: clip.labels[0] for clip in everything(whole["paper"])}
    assert [words[number] for number in ("01", "10", "13", "18", "19")] == ["one", "close", "previous", "right", "home"]
    assert {clip.id.split("/")[1] for clip in everything(found["paper"])} == (
        {f"{number:02d}" for number in range(1, 20)} - {"10", "13", "14", "15", "16", "19"}
    )


def test_an_unknown_label_is_named(tmp_path: Path):
    plant(tmp_path, 0)
    table = tmp_path / "test_full.csv"
    table.write_text(table.read_text() + "D_SPK1/20/a.wav\t20\n")
    with pytest.raises(BuildError, match=r"test_full.csv, line 173 has the label '20', must be 01 to 19"):
        dm_sc.clips(epath.Path(tmp_path))
