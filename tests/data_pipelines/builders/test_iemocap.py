"""IEMOCAP: label lines, speakers, and splits by session."""

from __future__ import annotations

from pathlib import Path

import pytest
from etils import epath

from data_pipelines.builders import iemocap
from data_pipelines.splits import BuildError
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, record, shared, write

EMOTIONS = ("neu", "hap", "exc", "ang", "sad", "fru", "xxx", "sur")
KEPT = 5  # of EMOTIONS


def plant(root: Path, order: int) -> None:
    for session in range(1, 6):
        for dialog in (f"Ses0{session}F_impro01", f"Ses0{session}M_script01_1b"):
            lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
            names = []
            for number, emotion in enumerate(EMOTIONS):
                name = f"{dialog}_{'FM'[number % 2]}{number:03}"
                names.append(f"Session{session}/sentences/wav/{dialog}/{name}.wav")
                lines += [f"[6.2901 - {number + 8}.2357]\t{name}\t{emotion}\t[2.5000, 2.5000, 2.5000]"]
                lines += ["C-E2:\tNeutral;\t()", ""]
            record(root, names, order)
            write(root, f"Session{session}/dialog/EmoEvaluation/{dialog}.txt", "\n".join(lines))
            write(root, f"Session{session}/dialog/EmoEvaluation/._{dialog}.txt", "\0\0")
            write(root, f"Session{session}/dialog/EmoEvaluation/Categorical/{dialog}_e1_cat.txt", "Ses :Anger; ()")


def test_paper_tests_the_first_session(tmp_path: Path):
    splits = listed(iemocap.clips, plant, tmp_path, ["paper"])["paper"]
    assert counts(splits) == (32, 8, 10)
    assert {clip.speaker for clip in splits["test"]} == {"Ses01F", "Ses01M"}
    assert shared(splits, "speaker") == {("train", "valid")}  # the leak that the module documents


def test_exc_is_hap_and_others_are_left_out(tmp_path: Path):
    plant(tmp_path, 0)
    splits = iemocap.clips(epath.Path(tmp_path))
    clips = {clip.id.rsplit("/", 1)[1]: clip for clip in everything(splits)}
    assert len(clips) == 5 * 2 * KEPT
    assert clips["Ses01F_impro01_F002.wav"].labels == ("hap",)
    assert clips["Ses01F_impro01_M001.wav"].speaker == "Ses01M"
    assert clips["Ses03M_script01_1b_F000.wav"].source == "Ses03M_script01_1b"
    assert labels(clips.values()) == {"neu", "hap", "ang", "sad"}


def test_honest_folds_share_no_speaker(tmp_path: Path):
    found = listed(iemocap.clips, plant, tmp_path, iemocap.PROTOCOLS[1:])
    assert found["honest"] == found["honest-0"]
    tested = set()
    for fold in range(5):
        splits = found[f"honest-{fold}"]
        assert counts(splits) == (30, 10, 10)
        assert shared(splits, "speaker") == shared(splits, "source") == set()
        assert all(clip.path.startswith(f"Session{fold + 1}/") for clip in splits["test"])
        tested |= {clip.id for clip in splits["test"]}
    assert tested == {clip.id for clip in everything(found["honest"])}


def test_invalid_data_are_refused(tmp_path: Path):
    plant(tmp_path, 0)
    table = tmp_path / "Session2/dialog/EmoEvaluation/Ses02F_impro01.txt"
    good = table.read_text()
    table.write_text(good.replace("\tang\t", "\tjoy\t"))
    with pytest.raises(BuildError, match=r"Ses02F_impro01\.txt, line 12 has the emotion 'joy', known are neu"):
        iemocap.clips(epath.Path(tmp_path))
    table.write_text(good.replace("impro01_F002", "impro01_F099"))
    with pytest.raises(BuildError, match=r"F099\.wav, which is missing"):
        iemocap.clips(epath.Path(tmp_path))
    with pytest.raises(BuildError, match="protocol 'honest-5' is unknown"):
        iemocap.clips(epath.Path(tmp_path), "honest-5")
