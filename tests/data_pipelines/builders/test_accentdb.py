"""AccentDB: accents with one, two and many speakers."""

from __future__ import annotations

import ast
import importlib.util
from collections import defaultdict
from pathlib import Path
from unittest import mock

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.builders import accentdb
from data_pipelines.splits import BuildError
from spjax.tasks import TASKS
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, record, shared

SPEAKERS = {
    "american": 8,
    "australian": 2,
    "bangla": 2,
    "british": 2,
    "indian": 2,
    "malayalam": 3,
    "odiya": 1,
    "telugu": 2,
    "welsh": 1,
}
EACH = 10


def plant(root: Path, order: int) -> None:
    names = [
        f"data/{accent}/speaker_{speaker:02}/{accent}_s{speaker:02}_{k:03}.wav"
        for accent, number in SPEAKERS.items()
        for speaker in range(1, number + 1)
        for k in range(EACH)
    ]
    record(root, names, order)


def test_paper_draws_utterances(tmp_path: Path):
    splits = listed(accentdb.clips, plant, tmp_path, ["paper"])["paper"]
    assert sum(counts(splits)) == 230
    assert counts(splits) == (147, 37, 46)
    assert all(labels(part) == set(SPEAKERS) for part in splits.values())
    assert ("train", "test") in shared(splits, "speaker")


def test_honest_test_speakers_are_in_no_other_split(tmp_path: Path):
    splits = listed(accentdb.clips, plant, tmp_path, ["honest"])["honest"]
    assert sum(counts(splits)) == 230
    assert shared(splits, "speaker") == {("train", "valid")}
    assert labels(splits["train"]) == labels(splits["valid"]) == set(SPEAKERS)
    assert labels(splits["test"]) == {accent for accent, number in SPEAKERS.items() if number > 1}
    where = defaultdict(set)
    for split, part in splits.items():
        for clip in part:
            where[clip.speaker].add(split)
    assert all(len(where[s]) == 1 for s in where if SPEAKERS[s.split("/")[0]] > 2)
    assert where["welsh/speaker_01"] == {"train", "valid"}


@given(st.lists(st.integers(1, 5), min_size=9, max_size=9).filter(lambda numbers: max(numbers) > 1), st.integers(3, 7))
@settings(max_examples=50)
def test_honest_whatever_the_number_of_speakers(numbers: list[int], each: int):
    names = [
        f"{accent}/s{speaker}/{k}.wav"
        for accent, number in zip(SPEAKERS, numbers, strict=True)
        for speaker in range(number)
        for k in range(each)
    ]
    with mock.patch.object(accentdb, "audio_files", return_value={name: name for name in sorted(names)}):
        splits = accentdb.clips(epath.Path("nowhere"), "honest")
    assert sorted(clip.id for clip in everything(splits)) == sorted(names)
    assert shared(splits, "speaker") <= {("train", "valid")}
    assert labels(splits["train"]) == set(SPEAKERS)
    assert labels(splits["test"]) == {accent for accent, number in zip(SPEAKERS, numbers, strict=True) if number > 1}


def test_the_folder_data_may_be_the_root(tmp_path: Path):
    plant(tmp_path, 0)
    clips = everything(accentdb.clips(epath.Path(tmp_path / "data")))
    assert {clip.path.split("/")[0] for clip in clips} == set(SPEAKERS)


def test_accents_are_those_of_tensorflow_datasets():
    spec = importlib.util.find_spec("tensorflow_datasets")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    builder = folder / "datasets" / "accentdb" / "accentdb_dataset_builder.py"
    if not builder.is_file():
        pytest.skip("this release of tensorflow_datasets has no accentdb")
    for node in ast.parse(builder.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LABELS":
            assert tuple(ast.literal_eval(node.value)) == TASKS["accentdb"].slots[0].labels
            return
    pytest.skip("tensorflow_datasets names the accents elsewhere now")


def test_invalid_layouts_are_refused(tmp_path: Path):
    plant(tmp_path, 0)
    record(tmp_path, ["data/scottish/speaker_01/a.wav"])
    with pytest.raises(BuildError, match="'scottish', which is not in the task"):
        accentdb.clips(epath.Path(tmp_path))
    record(tmp_path, ["data/welsh/a.wav"])
    with pytest.raises(BuildError, match=r"welsh/a\.wav is not in data/<accent>/<speaker>/"):
        accentdb.clips(epath.Path(tmp_path))


def test_missing_accents_are_named(tmp_path: Path):
    record(tmp_path, ["data/american/speaker_01/a.wav"])
    with pytest.raises(BuildError, match=r"lacks the accents australian, bangla, .*welsh"):
        accentdb.clips(epath.Path(tmp_path))
