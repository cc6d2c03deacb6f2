"""The exported artefact: the loader of its README answers like the predictor, without spjax being importable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spjax import SpeechPrompt
from spjax.data import loader
from spjax.data.unit_set import UnitSet
from spjax.io import StorageError
from spjax.serving import artefact, scoring
from spjax.types import Encoded
from tests.models.tiny import QUICK
from tests.serving import world

pytestmark = pytest.mark.usefixtures("quick_compile")

LENGTHS = (1, 9, 16)

# Only jax and numpy can be imported; the loader runs as it is in the README.
PRELUDE = """
import json, os, sys
for name in ("spjax", "flax", "qwix", "optax", "tensorflow", "torch", "safetensors"):
    sys.modules[name] = None
for place, utterances in json.loads(sys.stdin.read()):
    os.chdir(place)
    shown = []
    names = {"print": shown.append}
    exec(open("README.md").read().split("```python")[1].split("```")[0], names)
    assert len(shown[0]) == 1, "the example is answered"
    print(json.dumps({task: names["answer"](task, utterances) for task in names["CARD"]["tasks"]}))
"""


def as_input(utterance: Any) -> list[list[float]]:
    """An utterance in the artefact's form."""
    return [np.asarray(one).tolist() for one in utterance[:3]] if isinstance(utterance, Encoded) else [list(utterance)]


@pytest.mark.slow
def test_the_artefact_answers_without_this_code(tmp_path: Path):
    """Float32, multi-stream with interpolated f0, and int8 kernels, each with banks of several tasks."""
    cases: list[tuple[SpeechPrompt, list[Any]]] = []
    for config, kind, names in (
        (world.PLAIN, "float32", ("word", "low", "both", "order")),
        (world.SPOKEN, "float32", ("order",)),
        (world.DEEPER, "int8", ("mood", "low")),
    ):
        model = world.lm(config)
        own = {name: world.packs(model)[name] for name in names}
        predictor = SpeechPrompt.load(model, None, own, compute=kind)
        place = predictor.export(tmp_path / str(len(cases)), columns=(16,), rows=(4,))
        assert place == (tmp_path / str(len(cases))).resolve()
        cases.append((predictor, world.utterances(model, LENGTHS)))
    sent = [[str(tmp_path / str(n)), [as_input(one) for one in units]] for n, (_, units) in enumerate(cases)]
    quick = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", PRELUDE], input=json.dumps(sent), cwd=tmp_path, env=quick, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for (predictor, units), line in zip(cases, done.stdout.splitlines(), strict=True):
        served = json.loads(line)
        assert list(served) == list(predictor.tasks)
        for i, answers in enumerate(predictor.predict_units(units)):
            for task, answer in answers.items():
                found = served[task][i]
                assert {slot: label for slot, (label, _) in found.items()} == answer["labels"]
                for slot, (_, shares) in found.items():
                    assert list(shares) == list(answer["probabilities"][slot])
                    np.testing.assert_allclose(
                        list(shares.values()), list(answer["probabilities"][slot].values()), rtol=0, atol=1e-5
                    )


def test_the_card_and_readme_of_an_artefact(tmp_path: Path):
    model = world.lm()
    pack = world.pack(world.TASKS["mood"], model, encoder="hubert_base", layer=6, kmeans="km100", merged=True)
    place = SpeechPrompt.load(model, None, [pack]).export(tmp_path / "served", columns=(16,), rows=(2,))
    card = json.loads((place / "card.json").read_text())
    assert card["platforms"] == ["cpu", "cuda", "tpu"]
    assert card["tasks"]["mood"]["slots"] == [{"name": "mood", "labels": ["glad", "sad"]}]
    exported = jax.export.deserialize(bytearray((place / card["banks"][0]["programs"][0][2]).read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    text = (place / "README.md").read_text()
    for part in (
        "hubert_base, layer 6, k-means km100",
        "runs of equal units",
        model.hash,
        "2 × 16",
        "| mood | mood | 2 | 0 |",
    ):
        assert part in text
    loader_code = artefact.LOADER.replace("DIRECTORY", repr(str(place)))
    names: dict[str, Any] = {}
    exec(loader_code, names)
    names["weights"]("lm.npz")
    for utterances, message in (
        ([[[3, 100]]], "from 0 to 99"),
        ([[[-1]]], "from 0 to 99"),
        ([[[3.5]]], "must be integers"),
        ([[[]]], "an utterance is units, at least one"),
        ([[[3, 4], [1, 1]]], "an utterance is units, at least"),
        ([[[3] * 17]], "no program takes 1 utterances of up to 17 units"),
        ([[[3]]] * 3, "no program takes 3 utterances"),
    ):
        with pytest.raises(ValueError, match=message):
            names["answer"]("mood", utterances)
    assert names["answer"]("mood", []) == []
    for file in ("lm.npz", "bank_0.npz", card["banks"][0]["programs"][0][2]):  # every file that predictions depend on
        content = (place / file).read_bytes()
        (place / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match="was altered"):
            names["read"](file)
        (place / file).write_bytes(content)
    card["tasks"]["mood"]["slots"][0]["labels"].reverse()
    (place / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"card\.json was altered"):
        exec(loader_code, {})
    (place / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"holds notes\.txt, which saving there would delete"):
        SpeechPrompt.load(model, None, [pack]).export(place, columns=(16,), rows=(2,))
    with pytest.raises(ValueError, match="must each hold numbers of 1 or more"):
        SpeechPrompt.load(model, None, [pack]).export(place, columns=())


def test_the_card_of_an_artefact_marks_it_as_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    markers: list[str] = []
    monkeypatch.setattr("spjax.io.files.write_directory", lambda place, writers, marker: markers.append(marker))
    model = world.lm()
    SpeechPrompt.load(model, None, [world.pack(world.TASKS["mood"], model)]).export(tmp_path, columns=(16,), rows=(1,))
    assert markers == ["card.json"]


def test_an_artefact_takes_no_more_units_than_learned_positions(tmp_path: Path):
    model = world.lm(world.LEARNED)
    predictor = SpeechPrompt.load(model, None, [world.pack(world.TASKS["mood"], model)])
    place = predictor.export(tmp_path / "served", columns=(64, 128), rows=(1,))
    card = json.loads((place / "card.json").read_text())
    assert [program[:2] for program in card["banks"][0]["programs"]] == [[1, 36]]
    names: dict[str, Any] = {}
    exec(artefact.LOADER.replace("DIRECTORY", repr(str(place))), names)
    with pytest.raises(ValueError, match="no program takes 1 utterances of up to 37 units"):
        names["answer"]("mood", [[[3] * 37]])


@pytest.mark.parametrize("config", [world.PLAIN, world.SPOKEN], ids=["plain", "spoken"])
def test_lay_out_equals_make_batch(config: Any):
    model = world.lm(config)
    units = world.utterances(model, (1, 2, 5, 8), seed=3)
    split = scoring.unit_set(units, config)
    lengths = split.lengths.astype(np.int32)
    expected = loader.make_batch(split, np.arange(4), 8, np.zeros(4, np.int32))
    padded = []
    for streams in zip(*(one[:3] if isinstance(one, Encoded) else [one] for one in units), strict=True):
        padded.append(np.stack([np.pad(np.asarray(one), (0, 8 - len(one))) for one in streams]))
    found = artefact.lay_out(config, *padded, lengths=lengths)
    for name, ours, theirs in zip(found._fields, found, expected, strict=True):
        if name == "streams" and ours is not None:
            real = np.concatenate([np.arange(8) < lengths[:, None], np.ones((4, 2), bool)], axis=1)
            np.testing.assert_array_equal(np.where(real, ours.duration, 0), np.where(real, theirs.duration, 0))
            np.testing.assert_allclose(np.where(real, ours.f0, 0), np.where(real, theirs.f0, 0), atol=1e-6)
        elif name == "streams":
            assert theirs is None
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


interpolated = jax.jit(artefact.interpolated, compiler_options=QUICK)


@given(
    st.lists(
        st.lists(st.one_of(st.just(0.0), st.floats(-2, 2, width=32, allow_subnormal=False)), min_size=1, max_size=12),
        min_size=3,
        max_size=3,
    )
)
def test_f0_is_interpolated_as_in_records(f0: list[list[float]]):
    split = UnitSet.of(f0, np.zeros((3, 1)), f0=f0, durations=f0).with_interpolated_f0()
    padded = np.stack([np.pad(np.asarray(one, np.float32), (0, 12 - len(one)), constant_values=0.7) for one in f0])
    found = np.asarray(interpolated(padded, np.asarray([len(one) for one in f0])))
    for row, own in enumerate(f0):
        np.testing.assert_allclose(
            found[row, : len(own)], split.f0[split.offsets[row] : split.offsets[row + 1]], rtol=1e-5, atol=1e-5
        )
