"""The README's first command, made small: from an empty directory to what is predicted for a few recordings."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from spjax import load_unit_lm
from spjax.io import load_kmeans
from tests.conftest import Place

pytest.importorskip("espeakng_loader", reason="the demo's voice is optional (the extra demo)")

SMALL = (
    "--workdir=demo", "--config.task=voice_activity,commands", "--config.synthesis.train=32",
    "--config.synthesis.valid=8", "--config.synthesis.test=12", "--config.train.epochs=2", "--config.train.buckets=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Place, str]:
    place = Place(tmp_path_factory.mktemp("demo"), cache)
    code, printed = place.run("demo", *SMALL)
    assert code == 0, printed[-3000:]
    return place, printed


def test_every_stage_leaves_its_work(done: tuple[Place, str]) -> None:
    demo = done[0].folder / "demo"
    for path in (
        "speech/commands/clips.jsonl", "units/voice_activity/unit_card.json", "commands/results.json",
        "commands/packs/seed_0/card.json", "summary.md", "overview.png", "examples.md",
    ):  # fmt: skip
        assert (demo / path).is_file(), path
    card = json.loads((demo / "units" / "commands" / "unit_card.json").read_text())
    assert card["encoder"] == "mfcc"
    assert any("espeak-ng" in note for note in card["notes"])
    assert card["kmeans"] == load_kmeans("tiny").id
    assert not {"kmeans", "ulm"} & {path.name for path in demo.iterdir()}  # nothing is fitted or pretrained
    pack = json.loads((demo / "commands/packs/seed_0/card.json").read_text())
    assert pack["lm"]["hash"] == load_unit_lm("tiny").hash
    assert pack["lora"]["rank"] == 4


def test_the_report_puts_the_baselines_beside_every_task(done: tuple[Place, str]) -> None:
    demo = done[0].folder / "demo"
    summary = (demo / "summary.md").read_text()
    for task in ("voice_activity", "commands"):
        results = json.loads((demo / task / "results.json").read_text())
        ours = results["headline"]["mean"]
        baselines = [results["baselines"][name]["test"] for name in ("ngram", "probe")]
        row = next(line for line in summary.splitlines() if line.startswith(f"| [{task}]"))
        assert f"{100 * ours:.2f}" in row
        for baseline in baselines:
            assert f"{100 * baseline:.2f}" in row
        assert f"{100 * (ours - max(baselines)):+.2f} (" in row


def test_recordings_are_classified_at_the_end(done: tuple[Place, str]) -> None:
    heard = re.findall(r"^\| demo/speech/(\w+)/test/\d+\.wav \| .* \| .*\((\d\.\d\d)\)", done[1], re.M)
    assert [task for task, _ in heard] == ["voice_activity"] * 2 + ["commands"] * 2
    assert all(0 < float(share) <= 1 for _, share in heard)
    assert heard[0][0] in (done[0].folder / "demo" / "examples.md").read_text()


@pytest.mark.slow
def test_a_stage_that_is_lost_is_made_again_and_nothing_else(done: tuple[Place, str]) -> None:
    place, _ = done
    demo = place.folder / "demo"
    before = (demo / "speech" / "commands" / "clips.jsonl").stat().st_mtime_ns
    score = json.loads((demo / "commands" / "results.json").read_text())["headline"]
    shutil.rmtree(demo / "units" / "commands")
    shutil.rmtree(demo / "commands")
    code, printed = place.run("demo", *SMALL)
    assert code == 0, printed[-3000:]
    assert "speaking" not in printed
    assert (demo / "speech" / "commands" / "clips.jsonl").stat().st_mtime_ns == before
    assert json.loads((demo / "commands" / "results.json").read_text())["headline"] == score


def test_speech_of_another_config_is_told(done: tuple[Place, str]) -> None:
    place, _ = done
    shutil.copytree(place.folder / "demo" / "speech", place.folder / "other" / "speech")
    code, printed = place.run("demo", *SMALL, "--workdir=other", "--config.synthesis.train=49")
    assert code == 1
    assert re.search(r"error: other/speech/\w+ was made with .*'train': 32", printed)


def test_speech_of_another_config_is_told_even_where_units_are_there(done: tuple[Place, str]) -> None:
    code, printed = done[0].run("demo", *SMALL, "--config.synthesis.train=999")
    assert code == 1
    assert "was made with" in printed.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("gender,gender", "must be one or more different names"),
        ("gender, accent", "must be one or more different names"),
        ("gender,", "must be one or more different names"),
        ("gender,singing", "task 'singing' is not synthesised: choose commands"),
    ],
)
def test_wrong_tasks_are_told_before_anything_is_made(done: tuple[Place, str], task: str, told: str) -> None:
    place, _ = done
    code, printed = place.run("demo", "--workdir=wrong", f"--config.task={task}")
    assert code == 1
    assert told in printed.strip().splitlines()[-1]
    assert not (place.folder / "wrong").exists()


@pytest.mark.slow
def test_a_single_task(done: tuple[Place, str]) -> None:
    place, _ = done
    for stage in ("speech", "units"):
        shutil.copytree(place.folder / "demo" / stage, place.folder / "single" / stage)
    code, printed = place.run("demo", *SMALL, "--workdir=single", "--config.task=voice_activity")
    assert code == 0, printed[-3000:]
    assert (place.folder / "single" / "results.json").is_file()
    assert "| single/speech/voice_activity/test/00000.wav |" in printed
