"""Fitting a k-means from the command line: the data it uses, its card, repeatability."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipelines import extract as extraction
from data_pipelines.clips import Clip, Splits
from data_pipelines.data_flags import DataSet
from data_pipelines.fit_kmeans import fit_kmeans, fit_to, main
from data_pipelines.splits import BuildError
from spjax.data.records import load_card
from spjax.encoders import kmeans as clustering
from spjax.encoders.audio import AudioError, read_audio
from spjax.encoders.encoder import Encoder, load_encoder
from spjax.io import load_kmeans
from tests.data_pipelines.corpus import TASK, make_corpus, tone


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("raw")


@pytest.fixture(scope="module")
def splits(raw) -> Splits:
    return make_corpus(raw, {"train": 40, "test": 5})


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("mfcc")


@pytest.fixture
def folders(tmp_path) -> Path:
    """A folder with one subfolder a class."""
    for number in range(40):
        folder = tmp_path / "words" / ("high" if number % 2 else "low")
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{number}.wav", tone(number, 0.3, 16000), 16000)
    return tmp_path / "words"


def test_fits_on_the_drawn_clips_in_order(raw, splits, encoder):
    found = fit_kmeans(splits["train"], raw, encoder, clusters=8, utterances=20, seed=3, described="toy")
    again = fit_kmeans(splits["train"][::-1], raw, encoder, clusters=8, utterances=20, seed=3)
    assert found.id == again.id
    assert found.id != fit_kmeans(splits["train"], raw, encoder, clusters=8, utterances=20, seed=4).id
    fitted_on = found.card["fitted_on"]
    assert (
        fitted_on["data"],
        fitted_on["split"],
        fitted_on["utterances"],
        fitted_on["seed"],
        fitted_on["refused"],
    ) == (
        "toy",
        "train",
        20,
        3,
        0,
    )
    assert (found.card["encoder"], found.card["layer"]) == ("mfcc", None)
    from data_pipelines.splits import shuffled

    drawn = shuffled(sorted(splits["train"], key=lambda clip: clip.id), 3)[:20]
    waves = [read_audio(raw / clip.path, clip.start, clip.duration).wave for clip in drawn]
    alone = clustering.fit([encoder.features([wave])[0] for wave in waves], 8, seed=3, card=found.card)
    np.testing.assert_allclose(alone.centroids, found.centroids, atol=1e-5)
    assert fitted_on["frames"] == alone.card["fitted_on"]["frames"]


def test_every_pass_reads_them_again(raw, splits, encoder):
    twice = fit_kmeans(splits["train"], raw, encoder, clusters=8, passes=2)
    once = fit_kmeans(splits["train"], raw, encoder, clusters=8)
    assert twice.card["fitted_on"]["frames"] == once.card["fitted_on"]["frames"]
    assert twice.id != once.id


def test_bad_files_stop_it_or_are_counted(raw, splits, encoder, capsys):
    clips = [*splits["train"], Clip("x", "nowhere.wav", ("low", "none"))]
    with pytest.raises(AudioError, match=r"nowhere\.wav does not exist"):
        fit_kmeans(clips, raw, encoder, clusters=8)
    found = fit_kmeans(clips, raw, encoder, clusters=8, on_error="skip")
    assert found.card["fitted_on"]["refused"] == 1
    assert "nowhere.wav" in capsys.readouterr().err


def test_command_line(tmp_path, folders, capsys):
    flags = [f"--folders={folders}", "--encoder=log_mel", "--clusters=6", "--utterances=12", f"--out={tmp_path / 'km'}"]
    main(flags)
    kmeans = load_kmeans(tmp_path / "km")
    assert kmeans.centroids.shape == (6, 80)
    assert kmeans.card["fitted_on"]["data"] == "words"
    assert kmeans.card["fitted_on"]["utterances"] == 12
    assert "6 centroids of" in capsys.readouterr().out
    main(flags)
    assert "is kept" in capsys.readouterr().out
    assert load_kmeans(tmp_path / "km").id == kmeans.id
    for other, message in (
        ("--seed=1", "seed: 0, now 1"),
        ("--clusters=7", "clusters: 6, now 7"),
        ("--encoder=mfcc", "encoder: log_mel, now mfcc"),
        ("--utterances=13", "utterances: 12, now 13"),
    ):
        with pytest.raises(SystemExit, match=rf"with other settings \({message}\): .*--overwrite"):
            main([*flags, other])
    assert load_kmeans(tmp_path / "km").id == kmeans.id
    main([*flags, "--seed=1", "--overwrite"])
    assert load_kmeans(tmp_path / "km").card["fitted_on"]["seed"] == 1
    with pytest.raises(SystemExit, match=r"error: .*nowhere does not exist"):
        main(["--folders=nowhere", "--encoder=mfcc", f"--out={tmp_path / 'no'}"])
    with pytest.raises(SystemExit, match="neither mfcc nor log_mel"):
        main([f"--folders={folders}", "--encoder=whisper", f"--out={tmp_path / 'no'}"])


def test_extraction_fits_one_first_and_keeps_it(tmp_path, folders, capsys):
    flags = [
        f"--folders={folders}",
        "--encoder=mfcc",
        "--clusters=9",
        f"--out={tmp_path / 'u'}",
        "--workers=0",
    ]
    extraction.main(flags)
    card = load_card(tmp_path / "u")
    kmeans = load_kmeans(tmp_path / "u-kmeans")
    assert (card.kmeans, card.vocabulary) == (kmeans.id, 9)
    assert kmeans.card["fitted_on"]["utterances"] == card.counts["train"] == 32
    assert card.task.slots[0].labels == ("high", "low")
    capsys.readouterr()
    extraction.main([*flags, "--overwrite"])
    assert "is kept" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is not empty"):  # before another is fitted
        extraction.main([*flags, "--clusters=7"])
    assert load_kmeans(tmp_path / "u-kmeans").id == kmeans.id
    extraction.main([*flags, "--clusters=7", "--overwrite"])
    assert load_card(tmp_path / "u").vocabulary == len(load_kmeans(tmp_path / "u-kmeans").centroids) == 7


def test_a_k_means_of_changed_audio_is_not_kept(tmp_path, folders):
    flags = [f"--folders={folders}", "--encoder=mfcc", "--clusters=6", f"--out={tmp_path / 'km'}"]
    main(flags)
    first = load_kmeans(tmp_path / "km")
    for path in folders.glob("*/*.wav"):
        soundfile.write(path, tone(int(path.stem) + 50, 0.3, 16000), 16000)
    with pytest.raises(SystemExit, match=r"\(audio files that changed since"):
        main(flags)
    main([*flags, "--overwrite"])
    assert load_kmeans(tmp_path / "km").id != first.id


def test_refusals_are_reported_once(tmp_path, folders, capfd):
    (folders / "low" / "0.wav").write_bytes(b"")
    flags = [f"--folders={folders}", "--encoder=mfcc", "--clusters=6", "--on-error=skip", "--workers=0"]
    extraction.main([*flags, f"--out={tmp_path / 'u'}"])
    assert capfd.readouterr().err.count("refused: ") == 1
    assert load_card(tmp_path / "u").vocabulary == 6


def test_no_train_split(tmp_path):
    data = DataSet(TASK, {"test": [Clip("a", "a.wav", ("low", "none"))]}, ".", {}, ())
    with pytest.raises(BuildError, match="toy has no train split to fit a k-means on"):
        fit_to(tmp_path / "km", data, argparse.Namespace())


def test_conflicting_flags_are_refused(tmp_path, folders):
    out = f"--out={tmp_path / 'u'}"
    for flags, message in (
        (["--task=lt_sc", "--encoder=mfcc", out], "--task needs --raw"),
        (["--task=nothing", "--raw=.", "--encoder=mfcc", out], "unknown task 'nothing'"),
        ([f"--manifest={folders}", "--encoder=mfcc", out], "--manifest takes a CSV"),
        ([f"--folders={folders}", "--encoder=mfcc", out, "--clusters=5000"], "fewer than"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(flags)


def test_split_manifests_are_used_unchanged(tmp_path, raw, splits):
    from data_pipelines.split_manifests import inspect_files, write_splits

    files = inspect_files(raw, [clip.path for clips in splits.values() for clip in clips])
    write_splits(tmp_path / "splits", TASK, splits, files, "honest")
    flags = [f"--splits={tmp_path / 'splits'}", f"--raw={raw}", "--encoder=mfcc", "--clusters=5"]
    extraction.main([*flags, f"--out={tmp_path / 'u'}", "--workers=0"])
    card = load_card(tmp_path / "u")
    assert card.task == TASK
    assert card.counts == {"train": 44, "test": 5}
    assert set(card.sources) == {"train.jsonl", "test.jsonl", "train clips", "test clips"}
    assert card.notes == ("protocol: honest",)


def test_a_directory_of_other_files_is_refused_before_work(tmp_path, folders, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    monkeypatch.setattr("data_pipelines.fit_kmeans.fit_kmeans", lambda *_, **__: pytest.fail("it is fitted"))
    with pytest.raises(SystemExit, match=r"holds mine\.txt, which saving there would delete"):
        main([f"--folders={folders}", "--encoder=log_mel", "--clusters=6", f"--out={tmp_path / 'full'}"])
