"""ESC-50: the csv and its folds, which keep takes together."""

from __future__ import annotations

from pathlib import Path

import pytest
from etils import epath

from data_pipelines.builders import esc50
from data_pipelines.splits import BuildError
from spjax.tasks import TASKS
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, record, shared, write

HEADER = "filename,fold,target,category,esc10,src_file,take\n"


def plant(root: Path, order: int) -> None:
    rows, names = [], []
    for target, category in enumerate(TASKS["esc50"].slots[0].labels):
        for fold in range(1, 6):
            source = 100_000 + target * 10 + fold
            for take in "AB":
                names.append(f"{fold}-{source}-{take}-{target}.wav")
                rows.append(f"{names[-1]},{fold},{target},{category},False,{source},{take}")
    record(root, [f"audio/{name}" for name in names], order)
    write(root, "meta/esc50.csv", HEADER + "\n".join(rows) + "\n")


def test_paper_tests_fold_1(tmp_path: Path):
    splits = listed(esc50.clips, plant, tmp_path, ["paper"])["paper"]
    assert counts(splits) == (320, 80, 100)
    assert all(clip.path.startswith("audio/1-") for clip in splits["test"])
    assert all(len(labels(part)) == 50 for part in splits.values())
    assert shared(splits, "source") == {("train", "valid")}
    engine = next(clip for clip in everything(splits) if clip.path == "audio/3-100443-B-44.wav")
    assert (engine.labels, engine.source) == (("engine",), "100443")


def test_honest_folds_keep_takes_together(tmp_path: Path):
    found = listed(esc50.clips, plant, tmp_path, esc50.PROTOCOLS[1:])
    assert found["honest"] == found["honest-0"]
    assert all(counts(splits) == (300, 100, 100) and not shared(splits, "source") for splits in found.values())
    tests = [{clip.id for clip in found[f"honest-{fold}"]["test"]} for fold in range(5)]
    assert len(set.union(*tests)) == sum(map(len, tests)) == 500


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1-7-A-0.wav,1,0,cat,False,7,A", r"line 502: target 0 is not 'cat'"),
        ("1-7-A-50.wav,1,50,dog,False,7,A", r"target 50 is not 'dog'"),
        ("6-7-A-0.wav,6,0,dog,False,7,A", r"fold '6' is not 1 to 5"),
        ("1-7-A-0.wav,1,0,dog,False,7,A", r"names audio/1-7-A-0\.wav, which is missing"),
    ],
)
def test_an_invalid_row_is_refused(tmp_path: Path, row: str, message: str):
    plant(tmp_path, 0)
    table = tmp_path / "meta/esc50.csv"
    table.write_text(table.read_text() + row + "\n")
    with pytest.raises(BuildError, match=message):
        esc50.clips(epath.Path(tmp_path))
