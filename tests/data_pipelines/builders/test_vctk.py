"""VCTK as unit text: two releases combined, common sentences, accents with enough speakers, published units."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.builders import vctk
from data_pipelines.frames import UnitSplits
from data_pipelines.leaks import leak_report
from data_pipelines.split_manifests import inspect_files
from data_pipelines.splits import BuildError
from spjax.tasks import TASKS
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, shared, write

ACCENTS = TASKS["vctk_accent"].slots[0].labels
SPEAKERS = (*TASKS["vctk_speaker"].slots[0].labels[:31], "p315")  # five of each accent, and two of other accents
NUMBERS = (*range(1, 6), *range(100, 105))


def plant(root: Path) -> None:
    """Writes sentence 2 of every speaker to both releases, and the others to one of them."""
    lines: dict[str, list[str]] = {"vctk.val": [], "vctk.test": [], "vctk_v1.val": []}
    rows = "Id,Age,Sex,Accent,Region Comment\n"
    for index, who in enumerate(SPEAKERS):
        accent = ACCENTS[index // 5] if index < 30 else "Welsh"
        rows += f"{who},23,{('Female', 'Male')[index % 2]},{accent},\n"
        for number in NUMBERS:
            frames = f"{index} {index} {number % 100} {number // 100}"
            if number % 2:
                lines["vctk_v1.val"].append(f"{who}_{number:03d}|{who}|{frames}\n")
            else:
                lines["vctk.val" if number % 4 else "vctk.test"].append(f"{who}_{number:03d}_mic2|{who}|{frames} 98\n")
        lines["vctk_v1.val"].append(f"{who}_002|{who}|{index} 99\n")
    write(root, "vctk_speakers.csv", rows)
    for name, its in lines.items():
        write(root, f"{name}.frames.txt", "".join(its))


def recordings(found: UnitSplits) -> dict[str, set[str]]:
    return {split: {clip.id.removesuffix("_mic2") for clip in part} for split, part in found.splits.items()}


def check(found: UnitSplits, root: Path) -> None:
    """Checks what holds for each of the tasks."""
    parts = recordings(found)
    assert not parts["train"] & parts["valid"] | parts["train"] & parts["test"] | parts["valid"] & parts["test"]
    assert not shared(found.splits, "source")
    present = {clip.labels[0] for clip in everything(found.splits)}
    assert all(labels(part) == present for part in found.splits.values())
    report = leak_report(
        found.task, found.splits, "paper", inspect_files(root, [c.path for c in everything(found.splits)])
    )
    assert not report.shared + report.told
    assert {label for _, label, _ in report.missing} == set(found.task.slots[0].labels) - present


def test_gender_and_accent_are_of_new_speakers(tmp_path: Path) -> None:
    plant(tmp_path)
    for one, speakers, twice, welsh in (
        (vctk.gender(tmp_path), 32, "32 of 320", ()),
        (vctk.accent(tmp_path), 30, "30 of 300", ("22 utterances of Welsh are left out, too few to be a class",)),
    ):
        check(one, tmp_path)
        assert not shared(one.splits, "speaker")
        assert len({clip.speaker for clip in everything(one.splits)}) == speakers
        *first, double, common = one.notes
        assert tuple(first) == welsh
        assert double == f"{twice} recordings have two cuts, which are in the same split"
        left = 11 * speakers - len(everything(one.splits))
        assert common.startswith(f"{left} of {11 * speakers} utterances of the sentences 1 to 24")
        # common sentences are in one split only; all other sentences are kept
        numbers = {split: {name.split("_")[1] for name in part} for split, part in recordings(one).items()}
        assert not {n for n in numbers["train"] & numbers["test"] | numbers["valid"] & numbers["test"] if int(n) <= 24}
        assert sum(int(clip.id[5:8]) > 24 for clip in everything(one.splits)) == 5 * speakers
        assert left > 0


def test_speakers_read_new_sentences(tmp_path: Path) -> None:
    plant(tmp_path)
    found = vctk.speaker(tmp_path)
    check(found, tmp_path)
    assert sum(counts(found.splits)) == 31 * 11
    assert found.notes[0] == "11 utterances of p315 are left out, too few to be a class"


def test_both_releases_may_use_the_same_id(tmp_path: Path) -> None:
    plant(tmp_path)
    before = vctk.speaker(tmp_path)
    path = tmp_path / "vctk.val.frames.txt"
    path.write_text(path.read_text().replace("_mic2", ""))
    found = vctk.speaker(tmp_path)
    assert counts(found.splits) == counts(before.splits)
    assert sum(clip.id.endswith("#2") for clip in everything(found.splits)) == 31


def test_one_release_is_enough(tmp_path: Path) -> None:
    plant(tmp_path)
    for name in ("vctk.val", "vctk.test"):
        (tmp_path / f"{name}.frames.txt").unlink()
    found = vctk.gender(tmp_path)
    assert found.notes[0].startswith("0 of 192 recordings have two cuts")
    check(found, tmp_path)
    (tmp_path / "vctk_v1.val.frames.txt").unlink()
    with pytest.raises(BuildError, match=r"has no vctk\.frames\.txt and no vctk\.PART\.frames\.txt"):
        vctk.gender(tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("vctk.val.frames.txt", "p225_002_mic2|p225", "p225_002_mic2|p226", "is not of speaker 'p226'"),
        ("vctk.val.frames.txt", "p225_002_mic2", "p225-002", r"frames\.txt:1 \(p225-002\) is not of speaker 'p225'"),
        ("vctk_speakers.csv", "p225,", "p999,", r"speaker 'p225' is not in .*vctk_speakers\.csv: add a row"),
        ("vctk_speakers.csv", "Sex", "Gender", "lacks Sex"),
    ],
)
def test_faults_are_named(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    plant(tmp_path)
    text = (tmp_path / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new))
    with pytest.raises(BuildError, match=message):
        vctk.speaker(tmp_path)


@pytest.mark.parametrize(
    ("task", "sizes", "speakers", "twice"),
    [
        (vctk.gender, (5139, 1690, 1661), (65, 22, 22), "410 of 8,361"),
        (vctk.accent, (4599, 1481, 1471), (58, 20, 19), "368 of 7,430"),
        (vctk.speaker, (5246, 1752, 1759), (108, 108, 108), "410 of 8,347"),
    ],
)
def test_real_units(more_units: Path, task: object, sizes: object, speakers: object, twice: str) -> None:
    found = task(more_units)
    assert counts(found.splits) == sizes
    assert tuple(len({clip.speaker for clip in part}) for part in found.splits.values()) == speakers
    assert any(note.startswith(f"{twice} recordings have two cuts") for note in found.notes)
    check(found, more_units)
