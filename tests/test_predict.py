"""`python -m spjax.predict`: a table, JSON lines, bad files among good ones, scores and comparisons on records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from spjax import SpeechPrompt
from spjax.data.write_records import Utterance, write_unit_records
from spjax.encoders.encoder import load_encoder
from spjax.io import KMeans, save_kmeans, save_pack, save_unit_lm
from spjax.predict import main
from tests.encoders.hubert_models import speechlike
from tests.serving import world

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multi-stream LM, an encoder's k-means, packs of two tasks, two recordings and unit records."""
    folder = tmp_path_factory.mktemp("predict")
    model = world.lm(world.SPOKEN)
    save_unit_lm(folder / "lm", model.config, jax.device_get(model.params))
    features = np.concatenate(load_encoder("mfcc").features([speechlike(16_000, seed) for seed in range(3)]))
    kmeans = KMeans(features[:: len(features) // 50][:50], {"encoder": "mfcc", "layer": None})
    save_kmeans(folder / "km", kmeans)
    made = {"encoder": "mfcc", "layer": 0, "kmeans": kmeans.id, "merged": True}
    for seed, name in enumerate(("word", "mood")):
        pack = world.pack(world.TASKS[name], model, seed=seed, **made)
        save_pack(folder / "packs" / name, pack.params, pack.card)
    for seed, name in enumerate(("a", "b")):
        soundfile.write(folder / f"{name}.wav", speechlike(4000, seed), 16_000, subtype="FLOAT")
    spoken = world.utterances(model, (3, 9, 20, 12))
    said = [
        Utterance(str(i), one.units, (i % 2,), one.durations, one.f0)
        for i, one in enumerate(spoken)
    ]  # fmt: skip
    write_unit_records(
        folder / "records", world.TASKS["mood"], {"test": said}, vocabulary=100, **{**made, "encoder": "mfcc"}
    )
    return folder


def run(place: Path, *arguments: str) -> int:
    common = [f"--lm={place / 'lm'}", f"--packs={place / 'packs'}", "--compilation-cache="]
    with pytest.raises(SystemExit) as left:
        main([*common, *arguments])
    assert not isinstance(left.value.code, str), left.value.code
    return int(left.value.code or 0)


def speech(place: Path) -> list[str]:
    return ["--encoder=mfcc", f"--kmeans={place / 'km'}", str(place / "a.wav"), str(place / "b.wav")]


def test_a_table(place: Path, capsys: pytest.CaptureFixture[str]):
    assert run(place, *speech(place), "--tasks=mood") == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["file", "task", "labels", "(probability)"]
    (expected, _) = SpeechPrompt.load(place / "lm", "mfcc", place / "packs", kmeans=place / "km").predict(
        [place / "a.wav", place / "b.wav"]
    )
    label = expected["mood"]["labels"]["mood"]
    assert first.endswith(f"mood: {label} ({expected['mood']['probabilities']['mood'][label]:.2f})")
    assert first.startswith(str(place / "a.wav"))
    assert second.startswith(str(place / "b.wav"))


def test_json_lines_and_a_bad_file_among_good_ones(place: Path, capsys: pytest.CaptureFixture[str]):
    (place / "bad.wav").write_text("no audio")
    assert run(place, *speech(place), str(place / "bad.wav"), "--json") == 1
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["a.wav", "b.wav", "bad.wav"]
    assert list(lines[0]["answers"]) == ["mood", "word"]
    assert sum(lines[0]["answers"]["word"]["probabilities"]["word"].values()) == pytest.approx(1, abs=1e-5)
    assert "bad.wav" in lines[2]["error"]
    assert f"error: {lines[2]['error']}" in printed.err


def test_repairs_of_a_file_are_noted(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = bytearray((place / "a.wav").read_bytes())
    field = data.index(b"data") + 4
    data[field : field + 4] = bytes(4)
    (tmp_path / "a.wav").write_bytes(data)
    arguments = [one for one in speech(place) if not one.endswith(".wav")]
    assert run(place, *arguments, str(tmp_path / "a.wav"), "--tasks=mood", "--json") == 0
    printed = capsys.readouterr()
    (line,) = [json.loads(line) for line in printed.out.splitlines()]
    assert line["notes"][0].startswith("its length field says 0 bytes")
    assert f"a.wav: {line['notes'][0]}" in printed.err


def test_compare_reports_what_quantization_changes(place: Path, capsys: pytest.CaptureFixture[str]):
    records = f"--data={place / 'records'}"
    assert run(place, records, "--json") == 0
    (plain,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert plain | {"value": 0} == {
        "data": str(place / "records"), "split": "test", "task": "mood", "utterances": 4, "metric": "accuracy",
        "value": 0,
    }  # fmt: skip
    assert run(place, records, "--compute=int8", "--compare", "--json") == 0
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    change = line["tasks"]["mood"]
    assert (line["compare"], change["reference"]) == ("int8", plain["value"])
    assert 0 < change["largest"] < 0.2
    assert run(place, *speech(place), "--tasks=mood", "--compute=int8", "--compare") == 0
    assert "int8 against float32 on 2 recordings:" in capsys.readouterr().out


def test_an_artefact_is_written(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Tracing the default shapes takes a while: one is enough here.
    monkeypatch.setattr(SpeechPrompt.export, "__kwdefaults__", {"columns": (16,), "rows": (1,), "progress": False})
    assert run(place, f"--export={tmp_path / 'served'}") == 0
    assert {"README.md", "card.json", "lm.npz"} <= {file.name for file in (tmp_path / "served").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to classify: give recordings, or unit records with --data=RECORDS"),
        (["a.wav"], "recordings need an encoder and its k-means: give --encoder"),
        (["--data=none"], "none is not a complete directory of unit records"),
        (["a.wav", "--encoder=mfcc"], "encoder mfcc has no k-means"),
        (
            ["a.wav", "--encoder=mfc"],
            "encoder 'mfc' is neither mfcc nor log_mel nor tiny nor the directory of a HuBERT",
        ),
    ],
)
def test_errors_are_one_line(place: Path, arguments: list[str], message: str):
    with pytest.raises(SystemExit) as left:
        main([f"--lm={place / 'lm'}", f"--packs={place / 'packs'}", "--compilation-cache=", *arguments])
    assert str(left.value.code).startswith("error: ")
    assert message in str(left.value.code)


def test_records_of_other_units_are_refused(place: Path, tmp_path: Path):
    said = {"test": [Utterance("0", (1, 2), (0,), (1, 1), (0.0, 0.1))]}
    write_unit_records(tmp_path / "other", world.TASKS["mood"], said, encoder="log_mel", layer=0)
    with pytest.raises(SystemExit) as left:
        main([f"--lm={place / 'lm'}", f"--packs={place / 'packs'}", f"--data={tmp_path / 'other'}"])
    assert "'mood' uses units of encoder mfcc" in str(left.value.code)
    assert "Give records of the units that the pack was trained on." in str(left.value.code)


def test_advice_for_a_long_recording_works(place: Path, capsys: pytest.CaptureFixture[str]):
    """Each of the flags in the message, alone."""
    assert run(place, *speech(place), "--max-units=1", "--json") == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line in lines:
        flags = re.findall(r"--[\w-]+(?:=\d+)?", line["error"])
        assert [flag.split("=")[0] for flag in flags] == ["--max-units", "--cut"]
        for flag in flags:
            given = [flag] if "=" in flag else ["--max-units=1", flag]
            assert run(place, *speech(place)[:2], line["file"], *given, "--json") == 0


@pytest.mark.parametrize("flags", [["--encoder=mfcc"], ["--kmeans=km"], []])
def test_recordings_without_encoder_or_kmeans(place: Path, flags: list[str]):
    with pytest.raises(SystemExit, match=r"^error: .*give .*--kmeans=DIR"):
        main([f"--lm={place / 'lm'}", f"--packs={place / 'packs'}", "a.wav", *flags])
