"""ASVspoof: the official protocols."""

from __future__ import annotations

from pathlib import Path

import pytest
from etils import epath

from data_pipelines.builders import asvspoof
from data_pipelines.splits import BuildError
from tests.data_pipelines.builders.raw_trees import counts, labels, listed, record, shared, write

PARTS = {
    "train": ("T", "train.trn", "LA_0079"),
    "dev": ("D", "dev.trl", "LA_0069"),
    "eval": ("E", "eval.trl", "LA_0039"),
}
PROTOCOLS = "LA/ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm."


def plant(root: Path, order: int) -> None:
    for part, (letter, table, speaker) in PARTS.items():
        names = [f"LA_{letter}_{1000 + number}" for number in range(10)]
        record(root, [f"LA/ASVspoof2019_LA_{part}/flac/{name}.flac" for name in names], order)
        lines = [
            f"{speaker} {name} - {'-' if i == 0 else 'A07'} {'spoof' if i else 'bonafide'}"
            for i, name in enumerate(names)
        ]
        write(root, f"{PROTOCOLS}{table}.txt", "\n".join(lines) + "\n")


def test_official_splits(tmp_path: Path):
    found = listed(asvspoof.clips, plant, tmp_path, ("paper", "honest"))
    assert found["paper"] == found["honest"]
    splits = found["paper"]
    assert counts(splits) == (10, 10, 10)
    assert all(labels(part) == {"bonafide", "spoof"} for part in splits.values())
    assert shared(splits, "speaker") == set()
    first = splits["test"][0]
    assert (first.path, first.labels, first.speaker) == (
        "LA/ASVspoof2019_LA_eval/flac/LA_E_1000.flac",
        ("bonafide",),
        "LA_0039",
    )


def test_the_folder_la_may_be_the_root(tmp_path: Path):
    plant(tmp_path, 0)
    splits = asvspoof.clips(epath.Path(tmp_path / "LA"))
    assert splits["train"][0].path == "ASVspoof2019_LA_train/flac/LA_T_1000.flac"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("LA_0079 LA_T_9999 - A07 spoof", r"train\.trn\.txt, line 11 names .*LA_T_9999\.flac, which is missing"),
        ("LA_0079 LA_T_1003 A07 spoof", r"line 11 .* not SPEAKER FILE - SYSTEM LABEL"),
    ],
)
def test_an_invalid_line_is_refused(tmp_path: Path, line: str, message: str):
    plant(tmp_path, 0)
    table = tmp_path / f"{PROTOCOLS}train.trn.txt"
    table.write_text(table.read_text() + line + "\n")
    with pytest.raises(BuildError, match=message):
        asvspoof.clips(epath.Path(tmp_path))


def test_unknown_label_and_missing_table(tmp_path: Path):
    plant(tmp_path, 0)
    table = tmp_path / f"{PROTOCOLS}train.trn.txt"
    table.write_text(table.read_text().replace("bonafide", "genuine"))
    with pytest.raises(BuildError, match="'genuine', which is not in the task"):
        asvspoof.clips(epath.Path(tmp_path))
    table.unlink()
    with pytest.raises(BuildError, match=r"train\.trn\.txt is missing"):
        asvspoof.clips(epath.Path(tmp_path))
