"""A Whisper encoder in place of a HuBERT: k-means, unit records, and prediction from recordings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import pytest
import soundfile

import spjax
from data_pipelines import extract as extraction
from spjax.data.records import load_card, read_unit_records
from spjax.encoders.encoder import load_encoder
from spjax.io import StorageError, load_kmeans, save_encoder, save_pack, save_unit_lm
from spjax.predict import main as predict
from tests.data_pipelines.corpus import tone
from tests.encoders.whisper_models import TINY, weights
from tests.serving import world

pytestmark = pytest.mark.usefixtures("quick_compile")

SIZES = dataclasses.replace(TINY, layers=2, positions=64)  # 1.28 s: one recording is longer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper, a folder of classes, and the records and k-means that one command makes of them."""
    folder = tmp_path_factory.mktemp("whisper")
    save_encoder(folder / "encoder", SIZES, weights(SIZES), "tiny_whisper")
    for number in range(20):
        one = folder / "words" / ("high" if number % 2 else "low")
        one.mkdir(parents=True, exist_ok=True)
        soundfile.write(one / f"{number}.wav", tone(number, 2.0 if number == 3 else 0.3, 16_000), 16_000)
    flags = [f"--folders={folder / 'words'}", f"--encoder={folder / 'encoder'}", "--layer=2", "--clusters=20", "--f0"]
    extraction.main([*flags, f"--out={folder / 'units'}", "--workers=0"])
    return folder


def test_records_have_its_units(place: Path):
    card, kmeans = load_card(place / "units"), load_kmeans(place / "units-kmeans")
    assert (card.encoder, card.layer, card.kmeans, card.vocabulary) == ("tiny_whisper", 2, kmeans.id, 20)
    assert (kmeans.card["encoder"], kmeans.card["layer"]) == ("tiny_whisper", 2)
    encoder = load_encoder(place / "encoder", place / "units-kmeans", layer=2)
    seen = 0
    for split in card.counts:
        records, _ = read_unit_records(place / "units", split)
        for row, name in enumerate(records.ids):
            found = spjax.encode(place / "words" / name, encoder, f0=True)
            assert records.units_of(row).tolist() == found.units.tolist()
            assert found.durations.sum() == SIZES.frames(32_000 if name == "high/3.wav" else 4800)
            seen += 1
    assert seen == 20


def test_recordings_to_labels(place: Path, capsys: pytest.CaptureFixture[str]):
    model, kmeans = world.lm(world.SPOKEN), load_kmeans(place / "units-kmeans")
    save_unit_lm(place / "lm", model.config, jax.device_get(model.params))
    made = {"encoder": "tiny_whisper", "layer": 2, "kmeans": kmeans.id, "merged": True}
    pack = world.pack(world.TASKS["mood"], model, **made)
    save_pack(place / "pack", pack.params, pack.card)
    wav = place / "words" / "low" / "0.wav"
    flags = [f"--lm={place / 'lm'}", f"--packs={place / 'pack'}", "--compilation-cache=", "--json", str(wav)]
    flags += [f"--encoder={place / 'encoder'}", f"--kmeans={place / 'units-kmeans'}"]
    with pytest.raises(SystemExit) as left:
        predict([*flags, "--layer=2"])
    assert not left.value.code
    predicted = json.loads(capsys.readouterr().out)
    loaded = spjax.SpeechPrompt.load(
        place / "lm", place / "encoder", place / "pack", kmeans=place / "units-kmeans", layer=2
    )
    (expected,) = loaded.predict([wav])
    assert predicted["answers"]["mood"]["labels"] == expected["mood"]["labels"]
    for layer in (1, 6):
        with pytest.raises(SystemExit, match=r"was fitted on tiny_whisper layer 2|has layers 1 to 2"):
            predict([*flags, f"--layer={layer}"])
    other = world.pack(world.TASKS["mood"], model, **{**made, "encoder": "hubert_base_ls960"})
    with pytest.raises((StorageError, ValueError), match="hubert_base_ls960"):
        spjax.SpeechPrompt.load(place / "lm", load_encoder(place / "encoder", place / "units-kmeans", layer=2), other)


def test_a_hugging_face_model_must_be_imported_first(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(StorageError, match=r"is a Hugging Face model \(whisper\).*spjax\.convert whisper"):
        load_encoder(tmp_path)
