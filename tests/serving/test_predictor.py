"""The predictor: mixed batches equal single tasks, speech is encoded once, mismatched packs are refused."""

from __future__ import annotations

import dataclasses
import functools
import threading
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import spjax
from spjax import SpeechPrompt
from spjax.encoders.audio import Audio
from spjax.encoders.encoder import Encoder, encode, load_encoder
from spjax.io import KMeans, save_kmeans, save_pack, save_unit_lm
from spjax.io.banks import save_bank
from spjax.io.packs import PromptPack, StorageError
from spjax.models.prompts import PromptConfig
from spjax.serving import comparing, frozen, scoring
from tests.encoders.hubert_models import speechlike
from tests.serving import world

pytestmark = pytest.mark.usefixtures("quick_compile")

LENGTHS = (1, 4, 9, 31, 32, 40, 2, 17)


@pytest.fixture(scope="module", params=["plain", "spoken"])
def model(request: pytest.FixtureRequest) -> spjax.UnitLM:
    return world.lm(world.PLAIN if request.param == "plain" else world.SPOKEN)


@pytest.fixture(scope="module")
def plain() -> spjax.UnitLM:
    return world.lm()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """MFCC with 50 units, loaded from its directory."""
    features = np.concatenate(load_encoder("mfcc").features([speechlike(16_000, seed) for seed in range(3)]))
    chosen = np.random.default_rng(0).choice(len(features), 50, replace=False)
    place = tmp_path_factory.mktemp("kmeans") / "km"
    save_kmeans(place, KMeans(features[chosen], {"encoder": "mfcc", "layer": None}))
    return load_encoder("mfcc", place)


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equality to 1e-5."""
    np.testing.assert_allclose(world.shares(found), world.shares(expected), rtol=0, atol=1e-5)
    assert [list(one) for one in found.values()] == [list(one) for one in expected.values()]


# ---- answers


def test_mixed_tasks_equal_single_ones(model: spjax.UnitLM):
    packs = world.packs(model)
    units = world.utterances(model, [n for n in LENGTHS if n <= 32 or model.config.prosody is None])
    predictor = SpeechPrompt.load(model, None, packs)
    answers = predictor.predict_units(units)
    assert [list(answer) for answer in answers] == [list(packs)] * len(units)
    for name, pack in packs.items():
        for mixed, alone in zip(answers, spjax.classify_units(model, pack, units), strict=True):
            close(mixed[name], alone)
        assert np.ptp([world.shares(answer[name]) for answer in answers], axis=0).max() > 1e-2, "utterances must differ"


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@hypothesis.given(st.data())
def test_any_composition_gives_the_same_answers(plain: spjax.UnitLM, data: st.DataObject):
    predictor, units, expected = whole(plain)
    chosen = data.draw(st.lists(st.integers(0, len(units) - 1), min_size=1, max_size=20))
    asked = [data.draw(st.lists(st.sampled_from(sorted(predictor.tasks)), max_size=4)) for _ in chosen]
    answers = predictor.predict_units([units[i] for i in chosen], asked)
    for i, names, answer in zip(chosen, asked, answers, strict=True):
        assert list(answer) == list(dict.fromkeys(names))
        for name in names:
            close(answer[name], expected[i][name])


@functools.cache
def whole(model: spjax.UnitLM) -> tuple[SpeechPrompt, list[Any], list[dict[str, Any]]]:
    """A predictor of two banks, utterances of one bucket, and its answers to all of them together."""
    packs = world.packs(model)
    predictor = SpeechPrompt.load(model, None, {name: packs[name] for name in ("word", "mood", "order")})
    units = world.utterances(model, [n for n in LENGTHS if n <= 32])
    return predictor, units, predictor.predict_units(units)


def test_programs_are_known_before_the_first_utterance(plain: spjax.UnitLM, monkeypatch: pytest.MonkeyPatch):
    own = {"mood": world.pack(world.TASKS["mood"], plain, PromptConfig(length=7))}  # a shape that no other test has
    predictor = SpeechPrompt.load(plain, None, own, max_units=32)
    assert predictor.shapes == [(1, 32), (4, 32), (16, 32)]
    assert predictor.compile_ahead() == 3
    monkeypatch.setattr("jax._src.compiler.compile_or_get_cached", lambda *_, **__: pytest.fail("compiled again"))
    for count in (1, 3, 7, 20, 40):
        assert len(predictor.predict_units(world.utterances(plain, range(1, count + 1), count)[:32])) == min(count, 32)
    assert set(predictor.banks[0].programs._compiled) == set(predictor.shapes)


def test_only_needed_programs_are_compiled(plain: spjax.UnitLM):
    predictor = SpeechPrompt.load(plain, None, {"word": world.pack(world.TASKS["word"], plain, seed=9)})
    units = world.utterances(plain, (3, 3, 3, 3, 60))
    assert predictor.compile_ahead(units) == 2
    compiled = predictor.banks[0].programs._compiled
    assert {(4, 32), (1, 64)} <= set(compiled)
    before = len(compiled)
    predictor.predict_units(units)
    assert len(compiled) == before


def test_calls_from_several_threads(plain: spjax.UnitLM):
    predictor, units, expected = whole(plain)
    found: dict[int, Any] = {}
    work = lambda n: found.__setitem__(n, predictor.predict_units([units[n]]))  # noqa: E731
    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(units))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, (answer,) in found.items():
        for name, own in answer.items():
            close(own, expected[n][name])
    assert len(found) == len(units)


def test_long_utterances_are_refused_or_cut(plain: spjax.UnitLM):
    own = {"mood": world.packs(plain)["mood"]}
    units = world.utterances(plain, (5, 20))
    with pytest.raises(
        ValueError, match=r"utterance 1 has 20 units, the limit is 8: give a shorter one, or load with max_units=20"
    ):
        SpeechPrompt.load(plain, None, own, max_units=8).predict_units(units)
    cut = SpeechPrompt.load(plain, None, own, max_units=8, overlength="cut").predict_units(units)
    expected = SpeechPrompt.load(plain, None, own).predict_units([units[0], units[1][:8]])
    for found, wanted in zip(cut, expected, strict=True):
        close(found["mood"], wanted["mood"])


@pytest.mark.parametrize("most", [None, 1024])
def test_learned_positions_limit_utterances(most: int | None):
    model = world.lm(world.LEARNED)
    own = {"mood": world.packs(model)["mood"]}
    units = world.utterances(model, (36, 40))
    predictor = SpeechPrompt.load(model, None, own, max_units=most)
    assert predictor.max_units == 36
    with pytest.raises(ValueError, match=r"1 has 40 units, the limit is 36 of the LM: .* load with overlength='cut'"):
        predictor.predict_units(units)
    cut = SpeechPrompt.load(model, None, own, max_units=most, overlength="cut").predict_units(units)
    for found, wanted in zip(cut, predictor.predict_units([units[0], units[1][:36]]), strict=True):
        close(found["mood"], wanted["mood"])


def test_unknown_tasks_and_lists_of_wrong_length_are_refused(plain: spjax.UnitLM):
    predictor = SpeechPrompt.load(plain, None, {"mood": world.packs(plain)["mood"]})
    with pytest.raises(ValueError, match="unknown task 'moood': there are mood"):
        predictor.predict_units([[1]], "moood")
    with pytest.raises(ValueError, match="1 lists of tasks for 2 utterances"):
        predictor.predict_units([[1], [2]], [["mood"]])
    with pytest.raises(ValueError, match="utterance 1 must be a list"):
        predictor.predict_units([[1], []])
    with pytest.raises(ValueError, match="the predictor has no encoder"):
        predictor.predict(["a.wav"])
    assert predictor.predict_units([]) == []
    assert predictor.predict_units([[1]], [[]]) == [{}]


# ---- matching packs and units


def test_packs_are_named_by_their_tasks_or_by_the_caller(plain: spjax.UnitLM, tmp_path: Path):
    drawn = [world.packs(plain)[name] for name in ("word", "order")]
    made = [save_pack(tmp_path / "packs" / pack.card["task"], pack.params, pack.card) for pack in drawn]
    save_unit_lm(tmp_path / "lm", plain.config, jax.device_get(plain.params))
    for some in (made, tmp_path / "packs", [tmp_path / "packs" / "word", made[1]]):
        assert set(SpeechPrompt.load(tmp_path / "lm", None, some).tasks) == {"word", "order"}
    assert list(SpeechPrompt.load(plain, None, tmp_path / "packs" / "word").tasks) == ["word"]
    assert list(SpeechPrompt.load(plain, None, {"mine": made[0]}).tasks) == ["mine"]
    with pytest.raises(ValueError, match="two packs are called 'word': leave one out, or give packs="):
        SpeechPrompt.load(plain, None, [tmp_path / "packs" / "word", made[0]])
    save_bank(tmp_path / "bank", {"one": made[0], "other": made[0]})
    assert list(SpeechPrompt.load(plain, None, [tmp_path / "bank", made[1]]).tasks) == ["one", "other", "order"]
    with pytest.raises(StorageError, match=r"lm is not a prompt pack, a bank or a directory of them"):
        SpeechPrompt.load(plain, None, tmp_path / "lm")
    with pytest.raises(ValueError, match="no packs: give at least one"):
        SpeechPrompt.load(plain, None, {})


def test_a_pack_of_another_lm_is_refused(plain: spjax.UnitLM):
    other = world.lm(seed=1)
    with pytest.raises(StorageError, match="mine: prompt pack 'mood' was trained with the unit LM of hash"):
        SpeechPrompt.load(plain, None, {"mine": world.packs(other)["mood"]})


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (
            {"encoder": "hubert_base", "layer": 6},
            "units of encoder hubert_base, layer 6, this encoder of encoder mfcc",
        ),
        ({"encoder": "mfcc", "layer": 0, "kmeans": "0123456789ab"}, "units of kmeans 0123456789ab, this encoder of"),
    ],
)
def test_packs_of_other_units_are_refused(plain: spjax.UnitLM, encoder: Encoder, card: dict[str, Any], message: str):
    pack = world.pack(world.TASKS["mood"], plain, **card)
    with pytest.raises(StorageError, match=f"{message}.*Give the encoder and k-means that it was trained with"):
        SpeechPrompt.load(plain, encoder, [pack])


def test_packs_whose_units_differ_are_refused(plain: spjax.UnitLM):
    packs = [
        world.pack(world.TASKS["mood"], plain, merged=True), world.pack(world.TASKS["word"], plain, merged=False),
    ]  # fmt: skip
    with pytest.raises(StorageError, match="'word' uses units of merged False, the packs before it of merged True"):
        SpeechPrompt.load(plain, None, packs)


def test_units_that_cannot_be_compared_are_accepted(plain: spjax.UnitLM, encoder: Encoder):
    """Imported unit text has only a k-means name, an imported prompt nothing about its units."""
    for card in ({}, {"encoder": "mfcc", "layer": 0, "kmeans": "km50", "merged": True}):
        SpeechPrompt.load(plain, encoder, [world.pack(world.TASKS["mood"], plain, **card)])


def test_encoders_with_other_units_than_the_lm_are_refused(plain: spjax.UnitLM, encoder: Encoder):
    packs = [world.packs(plain)["mood"]]
    with pytest.raises(ValueError, match="encoder mfcc has no k-means"):
        SpeechPrompt.load(plain, "mfcc", packs)
    assert encoder.kmeans is not None
    many = KMeans(np.repeat(encoder.kmeans.centroids, 3, axis=0), encoder.kmeans.card)
    with pytest.raises(ValueError, match="the k-means has 150 units, the LM 100"):
        SpeechPrompt.load(plain, dataclasses.replace(encoder, kmeans=many), packs)
    with pytest.raises(ValueError, match="kmeans goes with an encoder's name"):
        SpeechPrompt.load(plain, encoder, packs, kmeans="km")
    with pytest.raises(ValueError, match="max_units is 0"):
        SpeechPrompt.load(plain, None, packs, max_units=0)


# ---- speech


def test_speech_is_answered_like_its_units(model: spjax.UnitLM, encoder: Encoder, tmp_path: Path):
    predictor = SpeechPrompt.load(model, encoder, {name: world.packs(model)[name] for name in ("word", "mood")})
    waves = [speechlike(n, seed) for seed, n in enumerate((4000, 3000, 5500))]
    soundfile.write(tmp_path / "a.wav", waves[0], 16_000, subtype="FLOAT")
    given = [tmp_path / "a.wav", waves[1], Audio(waves[2], 16_000)]
    spoken = [encode(Audio(wave, 16_000), encoder, f0=model.config.prosody is not None) for wave in waves]
    for found, wanted in zip(predictor.encode(given, rate=16_000), spoken, strict=True):
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    answers = predictor.predict(given, rate=16_000)
    for found, wanted in zip(answers, predictor.predict_units(spoken), strict=True):
        assert list(found) == ["word", "mood"]
        for name in found:
            close(found[name], wanted[name])


def test_long_speech_is_encoded_in_groups(plain: spjax.UnitLM, encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    predictor = SpeechPrompt.load(plain, encoder, {"mood": world.packs(plain)["mood"]})
    waves = [Audio(speechlike(n, n), 16_000) for n in (8000, 9000, 4000, 20_000, 500)]
    expected = predictor.encode(waves)
    groups: list[int] = []
    units = Encoder.units
    monkeypatch.setattr("spjax.serving.predictor.GROUP_SECONDS", 1)
    monkeypatch.setattr(Encoder, "units", lambda self, some: groups.append(len(some)) or units(self, some))
    for found, wanted in zip(predictor.encode(waves), expected, strict=True):
        np.testing.assert_array_equal(found.units, wanted.units)
    assert groups == [2, 2, 1]


def test_one_bad_recording_does_not_affect_the_others(plain: spjax.UnitLM, encoder: Encoder, tmp_path: Path):
    predictor = SpeechPrompt.load(plain, encoder, {"mood": world.packs(plain)["mood"]}, max_units=40)
    (tmp_path / "bad.wav").write_bytes(b"RIFFnothing")
    long, good = speechlike(16_000, 1), Audio(speechlike(3000, 0), 16_000)
    bad, missing, whole, silent, over = predictor.encode(
        [tmp_path / "bad.wav", str(tmp_path / "none.wav"), good, np.zeros(800, np.float32), long], rate=16_000
    )
    np.testing.assert_array_equal(whole.units, encode(good, encoder).units)
    for error, message in (
        (bad, "bad.wav"),
        (missing, "none.wav does not exist"),
        (silent, "silent"),
        (over, "utterance 4 has"),
    ):
        assert isinstance(error, ValueError)
        assert message in str(error)
    with pytest.raises(ValueError, match=r"none\.wav does not exist"):
        predictor.predict([str(tmp_path / "none.wav")])
    with pytest.raises(ValueError, match="rate is missing"):
        predictor.predict([long])
    with pytest.raises(ValueError, match="str is one utterance: give a list"):
        predictor.predict("a.wav")


def test_units_are_not_merged_if_the_packs_were_trained_so(plain: spjax.UnitLM, encoder: Encoder):
    predictor = SpeechPrompt.load(plain, encoder, [world.pack(world.TASKS["mood"], plain, merged=False)])
    wave = Audio(speechlike(4000), 16_000)
    (found,) = predictor.encode([wave])
    np.testing.assert_array_equal(found.units, encode(wave, encoder, merge=False).units)


# ---- quantization


@pytest.mark.parametrize(("kind", "bytes_left", "near"), [("bfloat16", 0.5, 0.05), ("int8", 0.35, 0.1)])
def test_quantized_kernels_change_little(kind: str, bytes_left: float, near: float):
    model = world.lm(world.DEEPER)
    packs = {"order": world.packs(model)["order"]}
    units = world.utterances(model, (4, 9, 20, 30))
    predictor, reference = (SpeechPrompt.load(model, None, packs, compute=one) for one in (kind, "float32"))

    def kernels(tree: Any) -> int:
        return sum(frozen.size(part["kernel"]) for part in tree["layers"].values() if "kernel" in part)

    assert kernels(predictor.params) < bytes_left * 1.01 * kernels(reference.params)
    (narrow, exact) = (one.predict_units(units) for one in (predictor, reference))
    classes = np.asarray([(1, 4), (2, 4), (0, 3), (1, 3)])
    spelled = [
        [model_label for _, model_label in (predictor.tasks["order"].classes[c] for c in row)] for row in classes
    ]
    change = comparing.changes(predictor, reference, units, classes={"order": classes})["order"]
    assert 0 < change.largest < near
    assert change.largest == pytest.approx(
        max(
            np.abs(world.shares(a["order"]) - world.shares(b["order"])).max()
            for a, b in zip(narrow, exact, strict=True)
        )
    )
    assert (change.utterances, change.metric) == (4, "exact_match")
    labels = [[list(answer["order"]["labels"].values()) for answer in answers] for answers in (narrow, exact)]
    assert change.agreement == np.mean([a == b for a, b in zip(*labels, strict=True)])
    assert (change.value, change.reference) == tuple(
        np.mean([a == b for a, b in zip(own, spelled, strict=True)]) for own in labels
    )
    assert comparing.changes(predictor, reference, units)["order"].metric is None


def test_int8_kernels_are_within_half_a_step_of_the_float32_ones(plain: spjax.UnitLM):
    narrow = frozen.quantize(plain.params, "int8")
    for name in ("query", "ffn_out"):
        exact = np.asarray(plain.params["layers"][name]["kernel"])
        kept = np.asarray(narrow["layers"][name]["kernel"].astype(np.float32))
        step = np.abs(exact).max(axis=1, keepdims=True) / 127
        assert (np.abs(kept - exact) <= 0.51 * step).all()
        assert np.abs(kept - exact).max() > 0
    assert narrow["embed"] is plain.params["embed"]
    with pytest.raises(ValueError, match="compute is 'int4', must be one of float32, bfloat16, int8"):
        frozen.quantize(plain.params, "int4")


def test_too_many_combinations_name_the_pack(plain: spjax.UnitLM):
    many = world.Task("many", tuple(world.Slot(str(s), tuple(map(str, range(30)))) for s in range(3)))
    with pytest.raises(ValueError, match="prompt packs big: 27000 label combinations are too many"):
        SpeechPrompt.load(plain, None, {"big": world.pack(many, plain)})


def test_scores_have_utterance_indices(plain: spjax.UnitLM):
    predictor = SpeechPrompt.load(plain, None, world.packs(plain))
    scores = predictor.scores(world.utterances(plain, (3, 4)), [["word"], ["word", "order"]])
    assert sorted(scores["word"].utterances.tolist()) == [0, 1]
    assert scores["order"].utterances.tolist() == [1]
    assert scores["order"].log_probs.shape == (1, 4)
    pack: PromptPack = predictor.packs["order"]
    classes, by_slot = scoring.decode_scores(pack.task, scores["order"])
    assert tuple(classes[0]) in {(0, 3), (1, 3), (1, 4), (2, 4)}
    assert [part.shape for part in by_slot] == [(1, 3), (1, 2)]
