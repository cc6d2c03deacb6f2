"""`python -m spjax.main` with multi-stream LMs: from records with prosody to a score; comparisons that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import spjax
from tests import toy_prosody
from tests.conftest import ROOT, Place, finish

SIZES = [f"--config.pretraining.{name}={value}" for name, value in toy_prosody.SIZES.items()]
QUICK = [f"--config.{name}={value}" for name, value in toy_prosody.QUICK.items()]
COMPARE = ("--workdir=runs/compared", "--config.data=records", "--config.pretraining.data=records")


def _run_pgslm(place: Place, *flags: str, backbone: str = "pgslm") -> tuple[int, str]:
    """Exit code and output of fsc with that backbone."""
    config = f"--config={ROOT / 'configs' / 'fsc.py'}:backbone={backbone}"
    command = [sys.executable, "-m", "spjax.main", config, *flags, f"--compilation_cache={place.cache}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    done = subprocess.run(
        command, cwd=place.folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Place:
    """A directory with records that hold durations and f0."""
    folder = tmp_path_factory.mktemp("spoken")
    toy_prosody.write_records(folder / "records")
    return Place(folder, cache)


@pytest.mark.slow  # in one process tests/test_jobs_prosody.py has it
def test_a_backbone_is_pretrained_and_prompted_by_its_name(spoken: Place) -> None:
    flags = ("--config.task=tune", "--config.data=records/tune", "--config.pretraining.data=records")
    flags += ("--config.pretraining.tasks=('tune', 'pace')", "--config.pretraining.lm.prosody.duration_input=False")
    flags += ("--config.pretraining.pretrain.f0_bins=4",)
    code, printed = _run_pgslm(spoken, *flags, *SIZES, *QUICK)
    assert code == 0, printed[-3000:]
    assert "no unit LM at runs/pretrain_ulm_pgslm/lm: pretraining one first" in printed
    assert "multi-stream LM: runs/pretrain_ulm_pgslm/lm; valid perplexity tune " in printed
    lm = spjax.load_unit_lm(spoken.folder / "runs" / "pretrain_ulm_pgslm" / "lm")
    assert (lm.config.prosody.duration_input, lm.config.prosody.f0_input) == (False, True)
    assert len(lm.config.prosody.f0_edges) == 3
    results = json.loads((spoken.folder / "runs" / "fsc_pgslm" / "results.json").read_text())
    assert results["provenance"]["backbone"] == "pGSLM (multi-stream LM), discrete, input units and f0"


def test_units_without_prosody_are_told(place: Place) -> None:
    """Of text, before any training."""
    flags = ("--workdir=runs/pgslm", "--config.lm=runs/ulm_pgslm/lm")
    code, printed = _run_pgslm(place, *flags)
    assert code == 1
    line = printed.strip().splitlines()[-1]
    assert line.startswith("error: runs/units/fsc has no durations and no f0, which a multi-stream LM needs: extract")
    assert not (place.folder / "runs" / "ulm_pgslm" / "lm").exists()


def test_an_unknown_backbone_is_told(place: Place) -> None:
    code, printed = _run_pgslm(place, backbone="hubert")
    assert code == 2
    assert "Traceback" not in printed
    assert "say one of backbone=gslm, backbone=pgslm" in printed.strip().splitlines()[-1]


@pytest.mark.slow  # in one process tests/test_jobs_prosody.py has it
def test_a_comparison_that_is_killed_goes_on(spoken: Place) -> None:
    workdir = spoken.folder / "runs" / "compared"
    process = spoken.start("../tests/toy_prosody", *COMPARE)
    log = workdir / "told" / "log.jsonl"
    deadline = time.monotonic() + 200
    while not log.exists():  # the second variant trains
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert not (workdir / "comparison.json").exists()
    first = {path: path.stat().st_mtime_ns for path in (workdir / "plain").rglob("*") if path.is_file()}
    code, printed = spoken.run("../tests/toy_prosody", *COMPARE)
    assert code == 0, printed[-3000:]
    assert "variant 1 of 2, plain: GSLM (unit LM): finished" in printed
    assert "variant 2 of 2, told: pGSLM (multi-stream LM), discrete, input units and durations and f0" in printed
    assert "comparison: runs/compared/summary.md" in printed
    assert {path: path.stat().st_mtime_ns for path in first} == first
    found = json.loads((workdir / "comparison.json").read_text())
    assert found["tasks"]["tune"]["variants"]["told"]["gain"]["mean"] > 0.15
    code, printed = spoken.run("../tests/toy_prosody", *COMPARE, "--config.train.epochs=7")
    assert code == 1
    assert "holds a run with train.epochs=3 (now 7)" in printed.strip().splitlines()[-1]


@pytest.mark.slow
def test_the_prosody_demo(tmp_path: Path, cache: Path) -> None:
    """Made small: from nothing to the gain of every variant and what two of them say of recordings."""
    pytest.importorskip("espeakng_loader", reason="the demo's voice is optional (the extra demo)")
    code, printed = Place(tmp_path, cache).run(
        "demo_prosody", "--workdir=demo", "--config.task=melody,commands", "--config.train.seeds=(0, 1)",
        "--config.pretraining.tasks=('melody', 'commands')", "--config.synthesis.train=48",
        "--config.synthesis.valid=12", "--config.synthesis.test=16", "--config.train.epochs=1",
        "--config.train.buckets=1", "--config.pretraining.pretrain.epochs=1", "--config.pretraining.lm.dim=32",
        "--config.pretraining.lm.layers=2",
    )  # fmt: skip
    assert code == 0, printed[-3000:]
    found = json.loads((tmp_path / "demo" / "comparison.json").read_text())
    assert list(found["tasks"]["melody"]["variants"]) == ["units", "none", "duration", "f0", "both"]
    assert json.loads((tmp_path / "demo/records/melody/unit_card.json").read_text())["f0"] is True
    assert "| recording | is | units (probability) | both (probability) |" in printed
    assert printed.count("| demo/speech/melody/test/") == 2
