"""Arabic commands: names that differ between tables and disk, copies of recordings, and the published recordings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from etils import epath

from data_pipelines.builders import ar_sc
from data_pipelines.split_manifests import inspect_files
from data_pipelines.splits import BuildError, shuffled
from spjax.tasks import TASKS
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, shared, write

SPELLED = {"A": "A_Add", "B": "B_Back", "C": "C_Cancel", "D": "D_Delete", "E": "E_Confirm", "F": "F_Continue"}
SPELLED |= {str(digit): f"{digit}_" for digit in range(10)}
TAKES = range(1, 13)  # three takes are the same recording: the original, a louder copy, an exact copy


def plant(root: Path, order: int) -> None:
    tables = {"train_full": [], "dev_full": [], "test_full": []}
    files = []
    for letter, spelled in SPELLED.items():
        for take in TAKES:
            name = f"{spelled}{take}.wav"
            split = "dev_full" if take % 4 == 1 else "test_full" if take % 4 == 2 else "train_full"
            old = "numbers" if letter.isdigit() else "commands"
            tables[split].append(f"/elsewhere/AR_SpeechCommands/{old}/{name}\t{letter}\n")
            files.append((letter, take, name))
    for table, rows in tables.items():
        write(root, f"csv/{table}.csv", "filename\tlabel\n" + "".join(rows))
    for letter, take, name in shuffled(files, order):
        folder = root / ar_sc.DATABASE / ("Numbers" if letter.isdigit() else "Words")
        folder.mkdir(parents=True, exist_ok=True)
        recording = (take - 1) // 3
        wave = np.random.default_rng([ord(letter), recording]).uniform(-0.4, 0.4, 400)
        loud = 2.0 if take % 3 == 2 else 1.0
        soundfile.write(folder / name, wave * loud, 8_000 if letter.isdigit() else 48_000, subtype="PCM_16")


def test_splits(tmp_path: Path):
    found = listed(ar_sc.clips, plant, tmp_path, ["paper", "honest"])
    paper, honest = found["paper"], found["honest"]
    assert counts(paper) == (96, 48, 48)
    assert len({clip.source for clip in everything(paper)}) == 16 * 4
    assert len(shared(paper, "source")) == 3
    assert not shared(honest, "source")
    assert len(everything(honest)) == 16 * 4
    assert all(labels(part) == set(TASKS["ar_sc"].slots[0].labels) for part in found["honest"].values())
    eighth = next(clip for clip in everything(paper) if clip.id.endswith("B_Back8.wav"))
    assert (eighth.labels, Path(eighth.source).name) == (("back",), "B_Back7.wav")


def test_an_unreadable_file_is_listed_without_copies(tmp_path: Path):
    plant(tmp_path, 0)
    (tmp_path / ar_sc.DATABASE / "Words" / "A_Add2.wav").write_bytes(b"RIFF")
    (tmp_path / ar_sc.DATABASE / "Words" / "A_Add1.wav").write_bytes(b"")
    splits = ar_sc.clips(epath.Path(tmp_path))
    of = {Path(clip.id).name: Path(clip.source).name for clip in everything(splits)}
    assert [of[f"A_Add{take}.wav"] for take in (1, 2, 3)] == ["A_Add1.wav", "A_Add2.wav", "A_Add3.wav"]


def test_faults_are_named(tmp_path: Path):
    plant(tmp_path, 0)
    table = tmp_path / "csv" / "dev_full.csv"
    table.write_text(table.read_text().replace("A_Add1.wav\tA", "A_Add1.wav\tB"))
    with pytest.raises(BuildError, match=r"dev_full.csv, line 2 has the label 'B', must be the first character"):
        ar_sc.clips(epath.Path(tmp_path))


@pytest.mark.parametrize("protocol", ["paper", "honest"])
def test_real_recordings(audio: Path, protocol: str):
    root = audio / "ar_sc"
    splits = ar_sc.clips(epath.Path(root), protocol)
    assert counts(splits) == {"paper": (1107, 123, 370), "honest": (323, 36, 108)}[protocol]
    assert all(len(labels(part)) == 16 for part in splits.values())
    assert len({clip.source for clip in everything(splits)}) == 467
    train = {clip.source for clip in splits["train"]}
    assert sum(clip.source in train for clip in splits["test"]) == {"paper": 337, "honest": 0}[protocol]
    files = inspect_files(root, [clip.path for clip in everything(splits)])
    rates = {clip.labels[0].isdigit(): files[clip.path].rate for clip in everything(splits)}
    assert rates == {True: 8_000, False: 48_000}
    if protocol == "paper":
        assert (len(files), len({facts.sha256 for facts in files.values()})) == (1600, 830)
