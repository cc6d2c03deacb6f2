"""VoxForge: sizes of a language, speakers, anonymous speakers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from etils import epath

from data_pipelines.builders import voxforge
from data_pipelines.splits import BuildError
from spjax.tasks import TASKS
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, record, shared

LANGUAGES = TASKS["voxforge"].slots[0].labels


def names(language: str, folders: int = 12, each: int = 5) -> list[str]:
    speakers = [
        f"anonymous-2008{n:04}-{language}{n}" if n % 4 == 0 else f"u{n % 7}{language}-2009-{n}" for n in range(folders)
    ]
    speakers[1] = "polyglot-2010-" + language
    top = f"{language}/Trunk/Audio/Main/16kHz_16bit"
    return [f"{top}/{folder}/wav/{language}5-{k:03}.wav" for folder in speakers for k in range(each)]


def plant(root: Path, order: int) -> None:
    for language in LANGUAGES:
        record(root, names(language), order)


def test_paper_and_honest(tmp_path: Path):
    found = listed(voxforge.clips, plant, tmp_path, ("paper", "honest"))
    assert counts(found["paper"]) == (240, 60, 60)
    assert Counter(clip.labels[0] for clip in found["paper"]["valid"]) == dict.fromkeys(LANGUAGES, 10)
    assert shared(found["paper"], "speaker")
    honest = found["honest"]
    assert shared(honest, "speaker") == set()
    assert all(labels(part) == set(LANGUAGES) for part in honest.values())
    assert sum(counts(honest)) == 360
    # A user of two languages is one speaker; each anonymous folder is one speaker
    where = {split: {clip.speaker for clip in part} for split, part in honest.items()}
    assert sum("polyglot" in speakers for speakers in where.values()) == 1
    assert "anonymous" not in set.union(*where.values())
    assert {f"anonymous-2008000{n}-de{n}" for n in (0, 4, 8)} <= set.union(*where.values())


def test_sizes_are_the_papers_where_there_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(voxforge, "_SIZES", {"train": 12, "valid": 3, "test": 3})
    plant(tmp_path, 0)
    paper = voxforge.clips(epath.Path(tmp_path))
    assert counts(paper) == (72, 18, 18)
    german = sorted(clip.id for clip in everything(paper) if clip.labels == ("de",))
    assert german == sorted(names("de"))[:18]
    honest = voxforge.clips(epath.Path(tmp_path), "honest")
    assert all(number <= 12 for number in Counter(clip.labels[0] for clip in honest["train"]).values())
    assert counts(honest) == (72, 18, 18)
    assert shared(honest, "speaker") == set()


def test_the_folder_downloads_is_optional(tmp_path: Path):
    plant(tmp_path / "downloads", 0)
    splits = voxforge.clips(epath.Path(tmp_path))
    assert all(clip.path.startswith(f"downloads/{clip.labels[0]}/Trunk/") for clip in everything(splits))


def test_a_missing_language_is_named(tmp_path: Path):
    for language in LANGUAGES[:-1]:
        record(tmp_path, names(language))
    with pytest.raises(BuildError, match=r"ru/Trunk/Audio/Main/16kHz_16bit is not a folder: unpack"):
        voxforge.clips(epath.Path(tmp_path))
    record(tmp_path, names("ru", folders=2, each=2))
    with pytest.raises(BuildError, match=r"ru has 4 recordings"):
        voxforge.clips(epath.Path(tmp_path))
