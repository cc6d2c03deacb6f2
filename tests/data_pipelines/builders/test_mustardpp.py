"""MUStARD++: labelled rows only, recordings by key, ten folds."""

from __future__ import annotations

from pathlib import Path

import pytest
from etils import epath

from data_pipelines.builders import mustardpp
from data_pipelines.splits import BuildError
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, record, shared, write

HEADER = (
    "SCENE,KEY,SENTENCE,END_TIME,SPEAKER,SHOW,Sarcasm,Sarcasm_Type,Implicit_Emotion,Explicit_Emotion,Valence,Arousal\n"
)
SPEAKERS = [("BBT", name) for name in ("SHELDON", "LEONARD", "PENNY", "HOWARD", "RAJ", "AMY", "PERSON")]
SPEAKERS += [("SV", name) for name in ("GILFOYLE", "DINESH", "RICHARD", "OTHER", "PERSON")]
SIZE = 120


def plant(root: Path, order: int) -> None:
    rows = []
    for k in range(SIZE):
        show, speaker = SPEAKERS[k % len(SPEAKERS)]
        rows.append(
            f'1_{k},1_{k}_c_00,"Well, I\'m sure that, uh, you...\nhave a lot of questions.",0:06,PERSON,{show},,,,,,'
        )
        rows.append(f"1_{k},1_{k}_u,Outstanding.,0:07,{speaker},{show},{k // 12 % 2},NONE,Anger,Anger,2,7")
    write(root, "mustard++_text.csv", HEADER + "\n".join(rows) + "\n")
    record(root, [f"final_utterance_videos/part{k % 3}_wav/1_{k}_u.wav" for k in range(SIZE)], order)


def test_folds(tmp_path: Path):
    protocols = ("paper", *(f"fold-{fold}" for fold in range(10)))
    found = listed(mustardpp.clips, plant, tmp_path, protocols)
    assert found["paper"] == found["fold-0"]
    assert all(counts(splits) == (96, 12, 12) for splits in found.values())
    assert all(labels(part) == {"0", "1"} for splits in found.values() for part in splits.values())
    tests = [{clip.id for clip in found[f"fold-{fold}"]["test"]} for fold in range(10)]
    assert len(set.union(*tests)) == sum(map(len, tests)) == SIZE
    clip = next(clip for clip in everything(found["paper"]) if clip.id.endswith("/1_19_u.wav"))
    assert clip == ("final_utterance_videos/part1_wav/1_19_u.wav",) * 2 + (("1",), "SV/GILFOYLE", "", 0.0, None)


def test_honest_shares_no_speaker(tmp_path: Path):
    splits = listed(mustardpp.clips, plant, tmp_path, ["honest"])["honest"]
    assert sum(counts(splits)) == SIZE
    assert shared(splits, "speaker") == set()
    assert {"BBT/PERSON", "SV/PERSON"} <= {clip.speaker for clip in everything(splits)}


def test_invalid_data_are_refused(tmp_path: Path):
    plant(tmp_path, 0)
    table = tmp_path / "mustard++_text.csv"
    good = table.read_text()
    table.write_text(good + "2_1,2_1_u,Yes.,0:07,RAJ,BBT,maybe,NONE,Anger,Anger,2,7\n")
    with pytest.raises(BuildError, match=r"line 362: the Sarcasm of 2_1_u is 'maybe', not 0 or 1"):
        mustardpp.clips(epath.Path(tmp_path))
    table.write_text(good + "2_1,2_1_u,Yes.,0:07,RAJ,BBT,1.0,NONE,Anger,Anger,2,7\n")
    with pytest.raises(BuildError, match=r"names 2_1_u, but no 2_1_u\.wav is under .*extract the audio"):
        mustardpp.clips(epath.Path(tmp_path))
    record(tmp_path, ["final_utterance_videos/part1_wav/2_1_u.wav"])
    assert sum(counts(mustardpp.clips(epath.Path(tmp_path)))) == SIZE + 1
    record(tmp_path, ["final_utterance_videos/part2_wav/2_1_u.wav"])
    with pytest.raises(BuildError, match="are recordings of the same key: remove one"):
        mustardpp.clips(epath.Path(tmp_path))
