"""The Python API: load, logits, classify."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spjax
from spjax.convert.fairseq import import_unit_lm
from spjax.convert.speechprompt import import_prompt
from spjax.io.packs import PromptPack, StorageError, save_pack
from spjax.io.unit_lms import save_unit_lm
from spjax.models.config import UnitLMConfig
from tests import toy
from tests.conftest import Place

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def golden_lm(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> spjax.UnitLM:
    folder = tmp_path_factory.mktemp("golden") / "lm"
    save_unit_lm(folder, *import_unit_lm(golden / "lm" / "checkpoint_best.pt"))
    return spjax.load_unit_lm(folder)


def _imported(golden: Path, folder: Path, lm: spjax.UnitLM, case: str, **settings: Any) -> PromptPack:
    params, card, _ = import_prompt(golden / "prompt" / f"{case}_prompt_ckpt.pt", lm.config, lm.hash, **settings)
    save_pack(folder / case, params, card)
    return spjax.load_prompt(folder / case)


def _samples(golden: Path, case: str) -> list[dict[str, str]]:
    return list(json.loads((golden / "prompt" / f"{case}_samples.json").read_text()).values())


def _units(sample: dict[str, str]) -> list[int]:
    return [int(word) for word in sample["src"].split()[:-1]]


def _check_probabilities(answers: list[dict[str, Any]], pack: PromptPack) -> None:
    for answer in answers:
        assert list(answer["labels"]) == list(answer["probabilities"]) == [slot["name"] for slot in pack.card["slots"]]
        for slot in pack.card["slots"]:
            probabilities = answer["probabilities"][slot["name"]]
            assert list(probabilities) == slot["labels"]
            assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
            assert min(probabilities.values()) >= 0
            assert answer["labels"][slot["name"]] in slot["labels"]


def test_logits_are_the_originals(golden: Path, golden_lm: spjax.UnitLM) -> None:
    arrays = np.load(golden / "lm" / "lm_logits.npz")
    logits = golden_lm.logits(arrays["tokens"])
    assert logits.dtype == np.float32
    assert logits.shape == arrays["logits"].shape == (5, 41, 104)
    real = np.arange(41) < arrays["lengths"][:, None]
    expected = arrays["logits"]
    assert np.abs(logits - expected)[real].max() < 1e-5 * np.abs(expected[real]).max()


def test_logits_of_a_long_sequence(golden: Path, golden_lm: spjax.UnitLM) -> None:
    arrays = np.load(golden / "lm" / "lm_logits_long.npz")
    expected = arrays["logits_last16"]
    assert np.abs(golden_lm.logits(arrays["tokens"])[:, -16:] - expected).max() < 1e-5 * np.abs(expected).max()


def test_logits_refuse_bad_tokens(place: Place) -> None:
    lm = spjax.load_unit_lm(place.folder / "lm")
    for tokens, message in (
        ([1, 2, 3], r"int \[B, T\], not int64 \[3\]"),
        ([[0.5]], r"int \[B, T\], not float64 \[1, 1\]"),
        ([[2, 104]], r"tokens are in 2\.\.104, must be in 0\.\.103"),
        ([[-1, 4]], r"tokens are in -1\.\.4"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.logits(tokens)
    assert lm.logits(np.zeros((0, 3), int)).shape == (0, 3, 104)


@pytest.mark.parametrize(
    "case",
    [
        "b1_linear12_single",
        pytest.param("c1_inputprompt_linear12", marks=pytest.mark.slow),
        pytest.param("a_freq_single", marks=pytest.mark.slow),
        "c_inputprompt_freq",
    ],
)
def test_imported_packs_answer_as_the_original_did(
    golden: Path, golden_lm: spjax.UnitLM, tmp_path: Path, case: str
) -> None:
    """Labels that the original, which decodes without constraints, predicts. It fails if a rule has over 150 units."""
    pack = _imported(golden, tmp_path, golden_lm, case)
    samples = [s for s in _samples(golden, case) if "linear" in case or len(_units(s)) <= 150]
    answers = spjax.classify_units(golden_lm, pack, [_units(sample) for sample in samples])
    words = [sample["predict"].split()[0] for sample in samples]
    assert len(words) >= 39
    kept = [(answer["labels"]["label"], word) for answer, word in zip(answers, words, strict=True) if int(word) >= 0]
    assert len(kept) >= 20
    assert [ours for ours, _ in kept] == [theirs for _, theirs in kept]
    _check_probabilities(answers, pack)


def test_an_imported_pack_of_three_slots(golden: Path, golden_lm: spjax.UnitLM, tmp_path: Path) -> None:
    pack = _imported(golden, tmp_path, golden_lm, "b_linear24_multi", task="fsc")
    answers = spjax.classify_units(
        golden_lm, pack, [_units(sample) for sample in _samples(golden, "b_linear24_multi")[:9]]
    )
    _check_probabilities(answers, pack)
    assert list(answers[0]["labels"]) == ["action", "object", "location"]


# ---- a trained toy pack


@pytest.fixture(scope="module")
def trained(place: Place, finished_run: Path) -> tuple[spjax.UnitLM, PromptPack]:
    return spjax.load_unit_lm(place.folder / "lm"), spjax.load_prompt(finished_run / "packs" / "seed_0")


def test_a_list_of_one_and_of_a_hundred_agree(trained: tuple[spjax.UnitLM, PromptPack]) -> None:
    lm, pack = trained
    units, _ = toy.utterances("fsc", 100, 7, longest=30)
    together = spjax.classify_units(lm, pack, units)
    assert len(together) == 100
    _check_probabilities(together, pack)
    for i in (0, 1, 50, 99):
        (alone,) = spjax.classify_units(lm, pack, [units[i]])
        assert alone["labels"] == together[i]["labels"]
        for slot, probabilities in alone["probabilities"].items():
            for label, probability in probabilities.items():
                assert probability == pytest.approx(together[i]["probabilities"][slot][label], abs=1e-5)


def test_labels_are_a_combination_of_the_training_set(trained: tuple[spjax.UnitLM, PromptPack]) -> None:
    lm, pack = trained
    names = pack.task.classes
    seen = {tuple(names[c][1] for c in row) for row in pack.card["combinations"]}
    units, _ = toy.utterances("fsc", 40, 8)
    assert {tuple(answer["labels"].values()) for answer in spjax.classify_units(lm, pack, units)} <= seen
    assert any("change language" in row for row in seen)  # a label with a space is one label


def test_arrays_and_tuples_are_units_too(trained: tuple[spjax.UnitLM, PromptPack]) -> None:
    lm, pack = trained
    expected = spjax.classify_units(lm, pack, [[1, 2, 3, 4]])
    assert spjax.classify_units(lm, pack, ((1, 2, 3, 4),)) == expected
    assert spjax.classify_units(lm, pack, np.array([[1, 2, 3, 4]], np.int16)) == expected


def test_repeated_calls_compile_nothing(trained: tuple[spjax.UnitLM, PromptPack]) -> None:
    import jax

    lm, pack = trained
    spjax.classify_units(lm, pack, [[1, 2, 3]])
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax._src.compiler.compile_or_get_cached", lambda *_, **__: pytest.fail("compiled again"))
        spjax.classify_units(lm, pack, [[4, 5, 6, 7]])


def test_no_utterances_no_answers(trained: tuple[spjax.UnitLM, PromptPack]) -> None:
    assert spjax.classify_units(*trained, []) == []


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([[1], []], r"utterance 1 must be a list of at least one unit, not \[\]"),
        ([[1, 100]], r"utterance 0 has units 1\.\.100, the LM has 0\.\.99"),
        ([[-1]], r"utterance 0 has units -1\.\.-1"),
        ([[1.0, 2.0]], r"utterance 0 must be a list of at least one unit, not \[1.0, 2.0\]"),
        (["71 12"], r"utterance 0 must be a list"),
        ([1, 2, 3], r"utterance 0 must be a list of at least one unit, not 1"),
        ([[[1], [2]]], r"utterance 0 must be a list"),
        ([[[1], [2, 3]]], r"utterance 0 must be a list"),
        ([None], r"utterance 0 must be a list"),
    ],
)
def test_bad_units_are_refused(trained: tuple[spjax.UnitLM, PromptPack], units: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spjax.classify_units(*trained, units)


def test_the_pack_of_another_lm_is_refused(trained: tuple[spjax.UnitLM, PromptPack], tmp_path: Path) -> None:
    _, pack = trained
    save_unit_lm(tmp_path / "same_sizes", toy.LM, toy.tiny_lm(seed=1))
    with pytest.raises(StorageError, match=r"was trained with the unit LM of hash [0-9a-f]{64}, this one's is"):
        spjax.classify_units(spjax.load_unit_lm(tmp_path / "same_sizes"), pack, [[1]])
    wider: UnitLMConfig = dataclasses.replace(toy.LM, ffn_dim=128)
    save_unit_lm(tmp_path / "wider", wider, toy.tiny_lm(config=wider))
    with pytest.raises(StorageError, match="unit LM of ffn_dim 64, this one has ffn_dim 128"):
        spjax.classify_units(spjax.load_unit_lm(tmp_path / "wider"), pack, [[1]])


def test_missing_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"config\.json does not exist"):
        spjax.load_unit_lm(tmp_path / "none")
    with pytest.raises(StorageError, match=r"card\.json does not exist"):
        spjax.load_prompt(tmp_path / "none")


def test_what_is_loaded(place: Place, trained: tuple[spjax.UnitLM, PromptPack]) -> None:
    lm, pack = trained
    assert lm.config == toy.LM
    assert np.asarray(lm.params["embed"]).shape == (104, 32)
    assert pack.params["key"].shape == (2, 4, 32)
    assert pack.card["task"] == "fsc"
