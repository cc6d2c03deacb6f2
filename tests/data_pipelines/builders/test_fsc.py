"""Fluent Speech Commands: three slots from the published tables."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from etils import epath

from data_pipelines.builders import fsc
from data_pipelines.splits import BuildError
from spjax.tasks import TASKS
from tests.data_pipelines.builders.raw_trees import counts, everything, listed, record, shared, write

HEADER = ",path,speakerId,transcription,action,object,location\n"


def plant(root: Path, order: int) -> None:
    actions, objects, places = (slot.labels for slot in TASKS["fsc"].slots)
    intents = [
        (a, o, p) for (a, o), p in zip(itertools.product(actions, objects), itertools.cycle(places), strict=False)
    ]
    for split, speakers in (("train", "abc"), ("valid", "d"), ("test", "ef")):
        rows = []
        for number, (speaker, intent) in enumerate(itertools.product(speakers, intents)):
            path = f"wavs/speakers/{speaker}/{split}-{number}.wav"
            rows.append(f'{number},{path},{speaker},"Well, do it",{",".join(intent)}\n')
        write(root, f"data/{split}_data.csv", HEADER + "".join(rows))
        record(root, [row.split(",")[1] for row in rows], order)


def test_splits(tmp_path: Path):
    found = listed(fsc.clips, plant, tmp_path, ["paper", "honest"])
    splits = found["paper"]
    assert found["honest"] == splits
    assert counts(splits) == (3 * 84, 84, 2 * 84)
    assert not shared(splits, "speaker")
    first = next(clip for clip in everything(splits) if clip.id == "wavs/speakers/a/train-0.wav")
    assert first.labels == ("change language", "none", "none")
    assert first.speaker == "a"


def test_faults_are_named(tmp_path: Path):
    plant(tmp_path, 0)
    table = tmp_path / "data" / "valid_data.csv"
    whole = table.read_text()
    table.write_text(whole + "9,wavs/speakers/d/none.wav,d,x,bring,none,none\n")
    with pytest.raises(BuildError, match=r"valid_data.csv, line 86 names wavs/speakers/d/none.wav, which is missing"):
        fsc.clips(epath.Path(tmp_path))
    table.write_text(whole + "9,short\n")
    with pytest.raises(BuildError, match=r"valid_data.csv, line 86 has 2 fields where the header has 7"):
        fsc.clips(epath.Path(tmp_path))
    table.write_text(whole.replace("change language", "languages"))
    with pytest.raises(BuildError, match=r"label 'languages \| none \| none', which is not in the task"):
        fsc.clips(epath.Path(tmp_path))
    table.write_bytes(whole.encode("utf-16"))
    with pytest.raises(BuildError, match=r"valid_data.csv is text in UTF-16"):
        fsc.clips(epath.Path(tmp_path))
