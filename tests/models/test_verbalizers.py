"""Verbalizers: labels of a slot have distinct codes; fixed verbalizers equal the published code's."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spjax import vocab
from spjax.convert.speechprompt import read_verbalizer
from spjax.models import verbalizers
from spjax.models.verbalizers import KINDS, Verbalizer
from spjax.tasks import TASKS, Slot, Task

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=4)


def task_of(counts: list[int]) -> Task:
    """Slots with the same labels, which contain spaces."""
    return Task("any", tuple(Slot(f"slot {s}", tuple(f"label {i}" for i in range(n))) for s, n in enumerate(counts)))


def make(kind: str, task: Task, vocab_size: int, seed: int = 0) -> Verbalizer:
    rng = np.random.default_rng(seed)
    units = rng.zipf(1.5, 500) % (vocab_size - vocab.UNIT_OFFSET)
    classes = np.stack([rng.integers(a, b, 50) for a, b in itertools.pairwise(task.slot_offsets)], axis=1)
    return verbalizers.make(kind, task, vocab_size, units=units, classes=classes, seed=seed)


def check(verbalizer: Verbalizer, task: Task, vocab_size: int) -> None:
    count, units = task.num_classes, vocab_size - vocab.UNIT_OFFSET
    assert len({tuple(code) for code in verbalizer.codes.tolist()}) == count, "no two classes are spelled alike"
    assert verbalizer.codes.min() >= vocab.UNIT_OFFSET
    assert verbalizer.codes.max() < verbalizer.outputs
    assert verbalizer.fed_back.min() >= vocab.UNIT_OFFSET
    assert verbalizer.fed_back.max() < vocab_size
    assert verbalizer.slot_offsets == task.slot_offsets
    assert verbalizer.steps == len(task.slots) * verbalizer.steps_per_slot
    if verbalizer.learnable:
        assert verbalizer.outputs == count + 4
        assert verbalizer.codes[:, 0].tolist() == list(range(4, count + 4))
    else:
        assert verbalizer.outputs == vocab_size
        np.testing.assert_array_equal(verbalizer.codes, verbalizer.fed_back)
        shortest = next(m for m in itertools.count(1) if units**m >= count)
        assert verbalizer.steps_per_slot == shortest
    for slot, (start, stop) in enumerate(itertools.pairwise(task.slot_offsets)):
        for m in range(verbalizer.steps_per_slot):
            allowed = np.flatnonzero(verbalizer.allowed[slot * verbalizer.steps_per_slot + m])
            assert allowed.tolist() == sorted(set(verbalizer.codes[start:stop, m].tolist()))


@pytest.mark.parametrize("kind", KINDS)
@given(sizes, st.integers(6, 110), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_labels_never_collide(kind: str, counts: list[int], vocab_size: int, seed: int):
    task = task_of(counts)
    verbalizer = make(kind, task, vocab_size, seed)
    check(verbalizer, task, vocab_size)
    again = make(kind, task, vocab_size, seed)
    np.testing.assert_array_equal(verbalizer.codes, again.codes)
    np.testing.assert_array_equal(verbalizer.fed_back, again.fed_back)
    card = {"codes": verbalizer.codes.tolist(), "feeds": verbalizer.fed_back.tolist(), "outputs": verbalizer.outputs}
    read = verbalizers.from_card({"kind": kind, **card}, task)
    np.testing.assert_array_equal(read.codes, verbalizer.codes)
    np.testing.assert_array_equal(read.fed_back, verbalizer.fed_back)


@pytest.mark.parametrize("kind", KINDS)
def test_1251_classes(kind: str):
    """The number of speakers of VoxCeleb1, with 100 units."""
    task = task_of([1251])
    verbalizer = make(kind, task, 104)
    check(verbalizer, task, 104)
    assert verbalizer.steps_per_slot == (1 if kind == "learnable" else 2)


def test_learnable_feeds_back_the_token_of_the_class_id():
    verbalizer = verbalizers.learnable(TASKS["fsc"], 104)
    assert verbalizer.fed_back[:, 0].tolist() == list(range(4, 28))
    # With more classes than units: the index in the slot, so that labels of a slot are distinct if possible.
    crowded = verbalizers.learnable(task_of([60, 80]), 104)
    assert crowded.fed_back[:, 0].tolist() == [*range(4, 64), *range(4, 84)]
    assert verbalizers.learnable(task_of([101]), 104).fed_back[[0, 99, 100], 0].tolist() == [4, 103, 4]


def test_identity_maps_class_c_to_unit_c():
    assert verbalizers.identity(TASKS["gsc"], 104).codes[:, 0].tolist() == list(range(4, 16))


def test_another_seed_gives_another_draw():
    draws = {tuple(verbalizers.random(TASKS["gsc"], 104, seed).codes[:, 0].tolist()) for seed in range(5)}
    assert len(draws) == 5


def test_the_most_frequent_label_takes_the_most_frequent_unit():
    task = task_of([3])
    units = np.asarray([7, 7, 7, 2, 2, 9, 5])
    verbalizer = verbalizers.frequency(task, 14, units, np.asarray([[2], [2], [0]]))
    # Labels 2, 0, then 1, which does not occur. Units 7, 2, then 9 before 5, as it occurs first.
    assert verbalizer.codes[:, 0].tolist() == [4 + 2, 4 + 9, 4 + 7]


@pytest.mark.parametrize("data", ["SCR_google_speech_commands", "IC_fluent_commands"])
def test_frequency_follows_the_original(golden: Path, data: str):
    """Labels by frequency take units by frequency, on the data of the published code and with its result.

    For intents the original counts "none" of two slots as one label; that slots stay apart is ours.
    """
    folder = golden / "e2e" / data
    expected = read_verbalizer(folder / "verbalized_freq_data" / "verbalizer.json")
    lines = (folder / "lm_dataset" / "train.txt").read_text().splitlines()
    sources, labels = zip(*(line.split(" <s> ") for line in lines), strict=True)
    names = sorted(set(" ".join(labels).split()))
    task = Task("one", (Slot("label", tuple(names)),))
    classes = np.asarray([[names.index(label) for label in row.split()] for row in labels])
    units = np.asarray([int(unit) for source in sources for unit in source.split()])
    found = verbalizers.frequency(task, 104, units, classes.reshape(-1, 1)).codes[:, 0] - vocab.UNIT_OFFSET
    assert dict(zip(names, found.tolist(), strict=True)) == expected


def test_labels_with_equal_codes_are_refused():
    codes = np.asarray([[4], [4]], np.int32)
    with pytest.raises(ValueError, match="2 labels of a slot share 1 codes"):
        Verbalizer("random", codes, codes, 104, (0, 2))
    Verbalizer("random", codes, codes, 104, (0, 1, 2))  # allowed in two slots
    with pytest.raises(ValueError, match="do not match"):
        Verbalizer("random", codes, codes, 104, (0, 3))
    with pytest.raises(ValueError, match="must be one of learnable, frequency"):
        make("colour", task_of([2]), 104)
    with pytest.raises(ValueError, match="cannot be encoded with 1 unit"):
        verbalizers.identity(task_of([2]), 5)
