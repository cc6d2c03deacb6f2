"""`--folders` and `--raw` of `python -m spjax.main` as processes, with tiny and with models that are made up."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Place, finish
from tests.data_pipelines import corpus
from tests.data_pipelines.test_recordings import classes, publish

pytestmark = pytest.mark.slow


def run(place: Place, config: str, *flags: str) -> tuple[int, str]:
    """As `place.run`, which gives up sooner: tiny is compiled without optimisation, and is slow."""
    return finish(place.start(config, *flags), timeout=1200)


def follow(printed: str, place: Place) -> str:
    """What the command in the last line prints, typed into a shell as it is."""
    (line,) = re.findall(r"^to try it: python (.*)$", printed, re.MULTILINE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} {line}", shell=True, cwd=place.folder, env=environment, capture_output=True,
        text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_a_folder_of_recordings_to_an_answer(tmp_path: Path, cache: Path) -> None:
    place = Place(tmp_path, cache)
    classes(tmp_path / "my words", "low !", "höch", clips=10)
    flags = ("--folders=my words", "--workdir=runs/my words", "--config.train.epochs=4", "--config.train.passes=8")
    code, printed = run(place, "own", *flags)
    assert code == 0, printed[-3000:]
    results = json.loads((tmp_path / "runs/my words/results.json").read_text())
    assert results["parameters"]["trained"] < 150_000
    curve = [point["train_loss"] for point in results["members"][0]["curve"]]
    assert curve[-1] < 0.5 * curve[0]
    for name in ("n-gram", "linear probe"):
        assert name in (tmp_path / "runs/my words/summary.md").read_text()
    assert re.search(r"my words/.*wav +my_words +label: (low !|höch) \(\d", follow(printed, place))
    code, again = run(place, "own", *flags)
    assert code == 0, again[-3000:]
    assert "epoch 1/" not in again
    classes(tmp_path / "my words", "höch", clips=1, start=30)
    code, refused = run(place, "own", *flags)
    assert code == 1
    assert "split otherwise since: use another --workdir" in refused.splitlines()[-1]


def test_from_a_known_data_set_to_an_answer(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    place = Place(tmp_path, cache)
    corpus.fsc_tree(tmp_path / "raw")
    flags = ("--raw=raw", "--config.train.epochs=1", "--config.train.seeds=(0,)", "--config.train.buckets=1")
    code, printed = run(place, "fsc", *flags)
    assert code == 1
    assert "hubert_base_ls960.pt\n    to " in printed
    home = publish()
    code, printed = run(place, "fsc", *flags)
    assert code == 0, printed[-3000:]
    assert f"--lm={home / 'unit_lm'} --encoder={home / 'hubert'}" in printed
    assert re.search(r" fsc +action: ", follow(printed, place))
    shutil.rmtree(home / "hubert")  # records are kept
    code, printed = run(place, "fsc", *flags, "--workdir=runs/other")
    assert code == 0, printed[-3000:]
    code, printed = run(place, "lt_sc", "--raw=raw", "--encoder=tiny")
    assert "point to its root with --raw" in printed.splitlines()[-1]
