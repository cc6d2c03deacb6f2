"""MUStARD: published folds from their pickle, drawn ones without it, and the speaker-independent setting."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from data_pipelines.builders import mustard
from data_pipelines.splits import BuildError, shuffled
from tests.data_pipelines.builders.raw_trees import counts, everything, labels, listed, record, shared, write

SHOWS = {
    "BBT": "SHELDON LEONARD PENNY HOWARD RAJ PERSON",
    "FRIENDS": "CHANDLER MONICA PERSON",
    "GOLDENGIRLS": "DOROTHY ROSE",
}
SIZE = 110


def entries() -> dict[str, dict[str, object]]:
    speakers = [(show, speaker) for show, names in SHOWS.items() for speaker in names.split()]
    numbers = shuffled(range(SIZE), 5)  # the published file is in no order either
    return {
        f"1_{number}": {
            "utterance": "Obviously.",
            "speaker": speakers[k % len(speakers)][1],
            "show": speakers[k % len(speakers)][0],
            "sarcasm": k % 2 == 0,
        }
        for k, number in enumerate(numbers)
    }


def published() -> list[tuple[np.ndarray, np.ndarray]]:
    tests = np.arange(SIZE).reshape(5, -1)
    return [(np.setdiff1d(np.arange(SIZE), test), test) for test in tests]


def plant(root: Path, order: int) -> None:
    table = entries()
    record(root, [f"utterances_final_wav/{name}.wav" for name in table], order)
    write(root, "sarcasm_data.json", json.dumps(table, indent=4))
    (root / "split_indices.p").write_bytes(pickle.dumps(published(), protocol=2))


def test_published_folds(tmp_path: Path):
    protocols = ("paper", *(f"fold-{fold}" for fold in range(5)))
    found = listed(mustard.clips, plant, tmp_path, protocols)
    assert found["paper"] == found["fold-0"]
    ids = list(entries())
    for fold in range(5):
        splits = found[f"fold-{fold}"]
        assert counts(splits) == (79, 9, 22)
        positions = published()[fold][1]
        assert {clip.id for clip in splits["test"]} == {f"utterances_final_wav/{ids[k]}.wav" for k in positions}
        assert all(labels(part) == {"true", "false"} for part in splits.values())
    clip = next(clip for clip in everything(found["paper"]) if clip.id == f"utterances_final_wav/{ids[6]}.wav")
    assert (clip.labels, clip.speaker) == (("true",), "FRIENDS/CHANDLER")


def test_honest_tests_friends(tmp_path: Path):
    splits = listed(mustard.clips, plant, tmp_path, ["honest"])["honest"]
    assert {clip.speaker.split("/")[0] for clip in splits["test"]} == {"FRIENDS"}
    assert len(splits["test"]) == 30
    assert shared(splits, "speaker") == set()
    assert sum(counts(splits)) == SIZE


def test_folds_are_drawn_where_the_published_are_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    plant(tmp_path, 0)
    (tmp_path / "split_indices.p").unlink()
    tests = [{clip.id for clip in mustard.clips(epath.Path(tmp_path), f"fold-{fold}")["test"]} for fold in range(5)]
    assert len(set.union(*tests)) == sum(map(len, tests)) == SIZE
    assert "split_indices.p is missing: five folds are drawn" in caplog.text


class Hostile:
    """An object that calls a function when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_the_pickle_is_never_executed(tmp_path: Path):
    plant(tmp_path, 0)
    (tmp_path / "split_indices.p").write_bytes(pickle.dumps([Hostile(tmp_path / "ran")] * 5))
    with pytest.raises(BuildError, match=r"split_indices\.p does not hold five folds of 110"):
        mustard.clips(epath.Path(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "folds", [published()[:4], [published()[0]] * 5, [(a[1:], b) for a, b in published()], 5, b"no"]
)
def test_folds_that_are_not_a_partition_are_refused(tmp_path: Path, folds: object):
    plant(tmp_path, 0)
    (tmp_path / "split_indices.p").write_bytes(folds if isinstance(folds, bytes) else pickle.dumps(folds))
    with pytest.raises(BuildError, match=r"does not hold five folds of 110 utterances: take it"):
        mustard.clips(epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"show": None}, "lacks show: take the current file"),
        ({"sarcasm": 1}, "sarcasm is 1, not true or false"),
        ({}, r"names utterances_final_wav/2_1\.wav, which is missing"),
    ],
)
def test_an_invalid_entry_is_refused(tmp_path: Path, change: dict[str, object], message: str):
    plant(tmp_path, 0)
    entry = {"speaker": "RAJ", "show": "BBT", "sarcasm": True} | change
    table = {**entries(), "2_1": {key: value for key, value in entry.items() if value is not None}}
    write(tmp_path, "sarcasm_data.json", json.dumps(table))
    with pytest.raises(BuildError, match=message):
        mustard.clips(epath.Path(tmp_path))
