"""VoxCeleb1 identification: the published list over two folders, and videos kept together."""

from __future__ import annotations

from pathlib import Path

import pytest
from etils import epath

from data_pipelines.builders import vox1_speaker
from data_pipelines.splits import BuildError
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, record, shared, write

SPEAKERS = ("id10001", "id10002", "id10270", "id11251")


def plant(root: Path, order: int) -> None:
    lines, names = [], []
    for speaker in SPEAKERS:
        part = "test" if speaker == "id10270" else "dev"
        for video in range(4):
            for utterance in range(1, 6):
                short = f"{speaker}/{speaker[-3:]}v{video}/{utterance:05}.wav"
                lines.append(f"{3 if video == 3 else 2 if utterance == 5 else 1} {short}")
                names.append(f"{part}/wav/{short}")
    record(root, names, order)
    write(root, "iden_split.txt", "\n".join(lines) + "\n")


def test_published_split(tmp_path: Path):
    splits = listed(vox1_speaker.clips, plant, tmp_path, ["paper"])["paper"]
    assert counts(splits) == (48, 12, 20)
    assert all(labels(part) == set(SPEAKERS) for part in splits.values())
    assert shared(splits, "source") == {("train", "valid")}
    clip = next(clip for clip in everything(splits) if clip.path == "test/wav/id10270/270v0/00005.wav")
    assert clip in splits["valid"]
    assert (clip.labels, clip.speaker, clip.source) == (("id10270",), "id10270", "270v0")


def test_honest_keeps_videos_together(tmp_path: Path):
    found = listed(vox1_speaker.clips, plant, tmp_path, ("paper", "honest"))
    splits = found["honest"]
    assert counts(splits) == (40, 20, 20)
    assert splits["test"] == found["paper"]["test"]
    assert shared(splits, "source") == set()
    assert all(labels(part) == set(SPEAKERS) for part in splits.values())


def test_a_video_of_two_speakers_stays_in_train(tmp_path: Path):
    names = [
        f"wav/{s}/{v}/0000{k}.wav"
        for s, v in (("id10001", "both"), ("id10002", "both"), ("id10002", "own"))
        for k in (1, 2)
    ]
    names += ["wav/id10001/last/00001.wav"]
    record(tmp_path, names)
    lines = [f"{k} {name.removeprefix('wav/')}" for name, k in zip(names, (1, 2, 1, 1, 1, 2, 3), strict=True)]
    write(tmp_path, "iden_split.txt", "\n".join(lines))
    splits = vox1_speaker.clips(epath.Path(tmp_path), "honest")
    assert {clip.source for clip in splits["valid"]} == {"own"}
    assert {clip.source for clip in splits["train"]} == {"both"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "1 id10001/nowhere/00001.wav",
            r"line 81 names id10001/nowhere/00001\.wav, which is in none of .*unpack dev and test",
        ),
        ("4 id10001/001v0/00001.wav", "line 81 is .* not like '1 id10001"),
        ("1 00001.wav", "not like '1 id10001"),
        ("1 id20001/v/00001.wav", "'id20001', which is not in the task"),
    ],
)
def test_an_invalid_line_is_refused(tmp_path: Path, line: str, message: str):
    plant(tmp_path, 0)
    record(tmp_path, ["dev/wav/id20001/v/00001.wav"])
    table = tmp_path / "iden_split.txt"
    table.write_text(table.read_text() + line + "\n")
    with pytest.raises(BuildError, match=message):
        vox1_speaker.clips(epath.Path(tmp_path))


def test_a_duplicate_utterance_is_refused(tmp_path: Path):
    plant(tmp_path, 0)
    record(tmp_path, ["wav/id10001/001v0/00001.wav"])
    with pytest.raises(BuildError, match="are the same utterance: remove one"):
        vox1_speaker.recordings(epath.Path(tmp_path))
