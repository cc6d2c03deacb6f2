"""The scripts of examples/, run on a few made recordings, with the LM in the package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipelines import recordings
from spjax.io import load_pack, save_pack

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))
pytestmark = pytest.mark.usefixtures("quick_compile")


def example(name: str) -> Callable[[list[str]], None]:
    path = next(path for path in EXAMPLES if path.stem == name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda arguments: module.main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six low and six high tones, a folder each."""
    root, draw = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    for label, pitch in (("low", 150), ("high", 1200)):
        (root / label).mkdir()
        for number in range(6):
            wave = np.sin(2 * np.pi * pitch * np.arange(4000) / 16_000) / 4 + draw.standard_normal(4000) / 50
            soundfile.write(root / label / f"{number}.wav", wave, 16_000)
    return root


@pytest.fixture(scope="module")
def trained(folder: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory, quick_compile: None) -> Path:
    """Work directory of train_on_folder.py."""
    workdir = tmp_path_factory.mktemp("runs") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recordings, "LEAST_UPDATES", 4)
        example("train_on_folder")([folder, workdir, "--epochs=1", f"--cache={cache}"])
    return workdir


def test_examples_are_short():
    assert len(EXAMPLES) == 4
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 60 for path in EXAMPLES)


def test_train_on_folder(trained: Path):
    assert load_pack(trained / "packs" / "seed_0").card["lora"]["rank"] == 4
    assert "n-gram" in (trained / "summary.md").read_text(encoding="utf-8")


def test_wave_to_label(trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    example("wave_to_label")([trained / "packs" / "seed_0", folder / "low" / "0.wav", folder / "high" / "0.wav"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5  # a line for each recording, the units, and a line for each recording
    assert all("label" in line for line in (printed[:2] + printed[3:]))


def test_many_packs(trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pack = load_pack(trained / "packs" / "seed_0")
    for task in ("pitch", "pitch_again"):
        save_pack(tmp_path / "packs" / task, pack.params, {**pack.card, "task": task})
    example("many_packs")([tmp_path / "packs", tmp_path / "bank", folder / "low" / "0.wav", folder / "high" / "0.wav"])
    printed = capsys.readouterr().out.splitlines()
    assert all("pitch_again" in line for line in printed[:3])
    assert printed[3].endswith("['pitch']")
    assert (tmp_path / "bank" / "bank.json").is_file()


def test_inspect_and_share(trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pack = trained / "packs" / "seed_0"
    example("inspect_and_share")([pack, tmp_path / "shared", folder / "low" / "0.wav"])
    assert "hash unchanged: True" in capsys.readouterr().out
    assert load_pack(tmp_path / "shared").card["description"] == "Trained on my recordings."
    assert "description" not in load_pack(pack).card
