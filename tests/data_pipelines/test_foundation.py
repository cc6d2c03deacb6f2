"""Speech for the bundled unit LM: utterances, voices, and continuation of an interrupted run."""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("espeakng_loader", reason="the voice is optional (the extra demo)")

from configs import pretrain_tiny
from data_pipelines import foundation, sentences, synthesize
from data_pipelines.foundation import SpeechConfig
from spjax.config import parse
from spjax.data.records import read_unit_records
from spjax.io import load_kmeans, read_unit_lm, save_unit_lm
from tests import toy
from tests.conftest import Place

SMALL = (
    "--workdir=tiny", "--config.speech.train=60", "--config.speech.valid=80", "--config.pretrain.epochs=1",
    "--config.pretrain.rows=8", "--config.lm.dim=16", "--config.lm.layers=1", "--config.lm.ffn_dim=16",
)  # fmt: skip


def test_sentences_are_many_and_complete():
    rng = np.random.default_rng(0)
    drawn_texts = {
        language: {sentences.sentence(language, rng) for _ in range(600)} for language in sentences.LANGUAGES
    }
    assert len(drawn_texts) >= 16
    assert sum(len(texts) for texts in drawn_texts.values()) > 5000
    for language, texts in drawn_texts.items():
        assert len(texts) > 300, language
        assert not any(set("{}") & set(text) or text != text.strip() or not text for text in texts), language
    lengths = [len(text.split()) for texts in drawn_texts.values() for text in texts]
    assert min(lengths) == 1
    assert max(lengths) > 12


def test_every_language_is_synthesised():
    rng = np.random.default_rng(0)
    voices = [voice for some in synthesize.split_voices("train", 0).values() for voice in some]
    for number, language in enumerate(sentences.LANGUAGES):
        wave = synthesize.utterance(sentences.line(language, rng), voices[number % len(voices)], rng)
        assert 0.1 < len(wave) / 16_000 < 10, language


@pytest.mark.parametrize("split", ["train", "valid"])
def test_utterances_depend_on_seed_split_and_number_without_test_voices(split: str):
    config = SpeechConfig()
    drawn_texts = [foundation.utterance(config, split, number) for number in range(120)]
    others = {
        voice
        for of in ("train", "valid", "test")
        if of != split
        for some in synthesize.split_voices(of, 0).values()
        for voice in some
    }
    assert not {one.voice for one in drawn_texts} & others
    kinds = collections.Counter(one.kind for one in drawn_texts)
    assert set(kinds) == set(foundation.KINDS) == set(pretrain_tiny.KINDS)
    assert {one.voice == "" for one in drawn_texts if one.kind == "voice_activity"} == {True, False}
    drawn = foundation.utterance(config, split, 7)
    assert (drawn.kind, drawn.voice, drawn.text) == (drawn_texts[7].kind, drawn_texts[7].voice, drawn_texts[7].text)
    again = foundation.utterance(dataclasses.replace(config, seed=1), split, 7)
    assert (again.kind, again.text, len(again.wave)) != (drawn.kind, drawn.text, len(drawn.wave))
    for one in drawn_texts:
        assert one.wave.dtype == np.float32
        assert 0 < np.abs(one.wave).max() <= 1.05
        assert 0.1 < len(one.wave) / 16_000 < 8


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes parts in this process, where the engine's state is the same too."""

    def make(folder: str, config: SpeechConfig, wanted: list[tuple[str, int]], kmeans: str | None) -> None:
        for split, part in wanted:
            if not Path(foundation._path(folder, split, part, kmeans is None)).exists():
                foundation._part(folder, config, split, part, kmeans)

    monkeypatch.setattr(foundation, "_make_parts", make)


@pytest.mark.usefixtures("here")
def test_records_of_some_kinds_and_the_bundled_assets(tmp_path: Path):
    speech = SpeechConfig(60, 80)
    kinds = ("voice_activity", "others")
    for kind in kinds:
        foundation.records(str(tmp_path), kind, str(tmp_path / "units" / kind), speech)
    kmeans = load_kmeans(tmp_path / "kmeans")
    assert kmeans.card["fitted_on"]["utterances"] == 60
    counts, languages = collections.Counter(), []
    for kind in kinds:
        for split in ("train", "valid"):
            units, card = read_unit_records(tmp_path / "units" / kind, split)
            assert (card.task.name, card.kmeans, card.encoder, card.vocabulary) == (kind, kmeans.id, "mfcc", 100)
            counts[split] += len(units)
            languages += [card.task.slots[0].labels[i] for i in units.classes[:, 0]]
    assert counts == {"train": 24, "valid": 20}
    assert {"none", "fi"} < set(languages) <= {"none", *sentences.LANGUAGES}
    with pytest.raises(ValueError, match=r"parts was made with .*'seed': 0.*, not .*'seed': 1"):
        foundation.records(str(tmp_path), "english", str(tmp_path / "other"), SpeechConfig(60, 80, seed=1))

    config = pretrain_tiny.get_config()
    config.speech.update({"train": 60, "valid": 80})
    provenance = {"config": {**config.to_dict(), "data": str(tmp_path / "units")}}
    save_unit_lm(tmp_path / "lm", toy.LM, toy.tiny_lm(seed=7), provenance)
    epoch = {f"valid/{kind}/perplexity": 9.5 for kind in foundation.KINDS} | {"valid/nll": 2.25, "time": 7200.0}
    (tmp_path / "log.jsonl").write_text(json.dumps({"time": 0.0}) + "\n" + json.dumps(epoch) + "\n")
    foundation.write_assets(parse(config), SpeechConfig(60, 80), str(tmp_path))
    _, _, info = read_unit_lm(tmp_path / "assets" / "lm")
    readme = (tmp_path / "assets" / "README.md").read_text(encoding="utf-8")
    assert load_kmeans(tmp_path / "assets" / "kmeans").id == kmeans.id
    assert info["provenance"]["config"]["data"] == "units"
    for drawn_texts in (info["hash"], kmeans.hash, "train: 60 utterances", "seed 0, 2.0 h", "| 1 | 9.50 |"):
        assert drawn_texts in readme


@pytest.mark.usefixtures("here")
def test_a_kind_without_utterances_and_a_damaged_part_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"none of the 40 utterances of valid is of kind language: .*speech\.valid"):
        foundation.records(str(tmp_path), "language", str(tmp_path / "units"), SpeechConfig(60, 40))
    part = tmp_path / "parts" / "valid-0000.npz"
    whole = part.read_bytes()
    for content in (b"", b"x", whole[: len(whole) // 2], whole[:200] + bytes(200) + whole[400:]):
        part.write_bytes(content)
        with pytest.raises(ValueError, match=r"valid-0000.npz is damaged .*: remove it and run the same command"):
            foundation.records(str(tmp_path), "language", str(tmp_path / "units"), SpeechConfig(60, 40))
    part.write_bytes(whole)
    (tmp_path / "parts" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        foundation.records(str(tmp_path), "language", str(tmp_path / "units"), SpeechConfig(60, 40))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("commands", "melody")}, "config.tasks has melody: choose among commands"),
        ({"speech": {"train": 0}}, "speech: train is 0"),
    ],
)
def test_an_invalid_config_is_refused(tmp_path: Path, change, message: str):
    config = pretrain_tiny.get_config()
    config.update(change)
    with pytest.raises(ValueError, match=message):
        foundation.source(parse(config), str(tmp_path))
    with pytest.raises(ValueError, match="is in a bucket"):
        foundation.source(parse(pretrain_tiny.get_config()), "gs://bucket/run")
    with pytest.raises(ValueError, match="pretrain a unit LM"):
        foundation.source(parse(pretrain_tiny.get_config("backbone=pgslm")), str(tmp_path))


@pytest.mark.slow
def test_one_command_makes_everything_and_continues(place: Place):
    status, output = place.run("pretrain_tiny", *SMALL)
    assert status == 0, output
    tiny = place.folder / "tiny"
    made = tiny / "assets"
    _, _, info = read_unit_lm(made / "lm")
    kmeans = load_kmeans(made / "kmeans")
    readme = (made / "README.md").read_text(encoding="utf-8")
    assert info["hash"] in readme
    assert kmeans.hash in readme
    assert "train: 60 utterances" in readme
    assert info["provenance"]["units"]["kmeans"] == kmeans.id
    assert str(place.folder) not in (made / "lm" / "config.json").read_text()
    # Files that a killed run may lack are made again, with equal content.
    (tiny / "parts" / "valid-0000.npz").unlink()
    for gone in ("units/english", "units/others", "lm", "checkpoints", "assets"):
        shutil.rmtree(tiny / gone)
    status, output = place.run("pretrain_tiny", *SMALL)
    assert status == 0, output
    assert read_unit_lm(made / "lm")[2]["hash"] == info["hash"]
