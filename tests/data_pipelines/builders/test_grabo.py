"""Grabo: two train, four valid, other test files of each speaker's command; split by speaker."""

from __future__ import annotations

from pathlib import Path

import pytest
from etils import epath

from data_pipelines.builders import grabo
from data_pipelines.splits import BuildError
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, record, shared

SPEAKERS = [f"pp{number}" for number in range(2, 13)]


def plant(root: Path, order: int) -> None:
    record(
        root,
        [
            f"speakers/{speaker}/spchdatadir/recording{command}/Voice_{take}.wav"
            for speaker in SPEAKERS
            for command in range(1, 37)
            for take in range(1, 9)
        ],
        order,
    )
    (root / "speakers" / "pp2" / "spchdatadir" / "recording1" / "._Voice_1.wav").write_bytes(b"")
    (root / "speakers" / "pp2" / "info.txt").write_text("a man")


def test_splits(tmp_path: Path):
    found = listed(grabo.clips, plant, tmp_path, ["paper", "honest"])
    paper = found["paper"]
    assert counts(paper) == (792, 1584, 11 * 36 * 2)
    assert all(len(labels(part)) == 36 for part in paper.values())
    first = [clip for clip in everything(paper) if clip.id.startswith("speakers/pp2/spchdatadir/recording1/")]
    assert [int(clip.id[-5]) for clip in first] == list(range(1, 9))  # 1, 2 train; 3-6 valid; 7, 8 test
    honest = found["honest"]
    assert shared(paper, "speaker")
    assert not shared(honest, "speaker")
    assert [len({clip.speaker for clip in honest[split]}) for split in ("train", "valid", "test")] == [7, 2, 2]
    assert all(len(labels(part)) == 36 for part in honest.values())


def test_a_tree_of_another_layout_is_refused(tmp_path: Path):
    with pytest.raises(BuildError, match="speakers is not a folder"):
        grabo.clips(epath.Path(tmp_path))
    record(tmp_path, ["speakers/pp2/recording1/Voice_1.wav"])
    with pytest.raises(BuildError, match=r"pp2/recording1/Voice_1.wav is not at speakers"):
        grabo.clips(epath.Path(tmp_path))
    with pytest.raises(BuildError, match="'fair' is unknown: choose paper or honest"):
        grabo.clips(epath.Path(tmp_path), "fair")
