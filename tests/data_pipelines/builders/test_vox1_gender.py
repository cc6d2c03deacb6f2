"""VoxCeleb1 gender: labels from the list, no speaker in two splits."""

from __future__ import annotations

from pathlib import Path

import pytest
from etils import epath

from data_pipelines.builders import vox1_gender
from data_pipelines.splits import BuildError
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, record, shared, write

HEADER = "VoxCeleb1 ID\tVGGFace1 ID\tGender\tNationality\tSet\n"
SPEAKERS = [f"id{number}" for number in range(10_001, 10_031)]


def plant(root: Path, order: int) -> None:
    rows = [
        f"{s}\tA.J._Buckley\t{'mf'[k % 3 == 0]}\tIreland\t{'dev' if k % 5 else 'test'}" for k, s in enumerate(SPEAKERS)
    ]
    write(root, "vox1_meta.csv", HEADER + "\n".join(rows) + "\n")
    names = [
        f"{'dev' if k % 5 else 'test'}/wav/{speaker}/v{k}-{video}/{utterance:05}.wav"
        for k, speaker in enumerate(SPEAKERS)
        for video in range(2)
        for utterance in range(1, 3)
    ]
    record(root, names, order)


def test_no_speaker_in_two_splits(tmp_path: Path):
    found = listed(vox1_gender.clips, plant, tmp_path, ("paper", "honest"))
    assert found["paper"] == found["honest"]
    splits = found["paper"]
    assert counts(splits) == (96, 12, 12)
    assert shared(splits, "speaker") == shared(splits, "source") == set()
    assert all(labels(part) == {"m", "f"} for part in splits.values())
    clip = next(clip for clip in everything(splits) if clip.path == "dev/wav/id10004/v3-1/00002.wav")
    assert clip[2:5] == (("f",), "id10004", "v3-1")


def test_invalid_data_are_refused(tmp_path: Path):
    plant(tmp_path, 0)
    record(tmp_path, ["dev/wav/id10999/v/00001.wav"])
    with pytest.raises(BuildError, match=r"speaker 'id10999' is not in .*vox1_meta\.csv: add a row"):
        vox1_gender.clips(epath.Path(tmp_path))
    table = tmp_path / "vox1_meta.csv"
    table.write_text(table.read_text() + "id10999\tNobody\tx\tNowhere\tdev\n")
    with pytest.raises(BuildError, match=r"line 32: the gender of id10999 is 'x', not m or f"):
        vox1_gender.clips(epath.Path(tmp_path))
    table.unlink()
    with pytest.raises(BuildError, match=r"vox1_meta\.csv is missing"):
        vox1_gender.clips(epath.Path(tmp_path))
