"""Utterances longer than a training batch: found in every split before training, with a suggested fix."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from spjax import jobs
from spjax.config import PromptJob, parse
from spjax.data.write_records import Utterance, write_unit_records
from spjax.jobs import task_data
from spjax.models.config import UnitLMConfig
from spjax.tasks import TASKS
from tests import toy
from tests.conftest import ROOT, Place

pytestmark = pytest.mark.usefixtures("quick_compile")

SMALL = (
    *(
        f"--config.{flag}"
        for flag in ("compute.dtype=float32", "train.seeds=(0,)", "train.epochs=1", "baselines=False")
    ),
    *(
        f"--config.{flag}"
        for flag in ("train.buckets=1", "train.max_rows=8", "prompt.length=2", "prompt.rank=0", "prompt.separators=2")
    ),
)


def records(folder: Path, longest: dict[str, int], every: int = 18) -> Path:
    """Unit records of fsc; in the given splits the fourth utterance has the given number of units."""
    splits = {}
    for seed, split in enumerate(("train", "valid", "test")):
        units, classes = toy.utterances("fsc", 18, seed)
        if split in longest:
            for number in range(3, 18, every):
                units[number] = np.tile([51, 52, 53], longest[split])[: longest[split]].tolist()
        splits[split] = [Utterance(f"{n}", *one) for n, one in enumerate(zip(units, classes, strict=True))]
    write_unit_records(folder, TASKS["fsc"], splits)
    return folder


def config_of(*argv: str) -> ConfigDict:
    """The config of these flags."""
    values = flags.FlagValues()
    held = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    line = ["spjax.main", f"--config={ROOT / 'configs' / 'fsc.py'}", *argv]
    with mock.patch.object(sys, "argv", line):  # where config flags are read from
        values(line)
    return held.value


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_long_utterances_are_found_before_an_lm_is_pretrained(tmp_path: Path, split: str):
    """A very long utterance among short commands, in any split."""
    data = records(tmp_path / "units" / "fsc", {split: 60_001})
    flags = (f"--config.data={data}", f"--config.lm={tmp_path}/ulm/lm", f"--config.pretraining.data={data.parent}")
    config = config_of(*SMALL, *flags, "--config.pretraining.tasks=('fsc',)")
    fault = (
        rf"fsc, {split}: 1 of 18 utterances have more than max_length=512 units, the longest 60001: choose "
        r"--config.overlength=cut or --config.overlength=drop; if memory allows, "
        r"use all of them with --config.train.max_tokens=480064"
    )
    with pytest.raises(ValueError, match=fault):
        jobs.run(parse(config), str(tmp_path / "run"), None, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["units"]


@pytest.fixture(scope="module")
def long_ones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return records(tmp_path_factory.mktemp("long") / "fsc", {"train": 40, "test": 50})


def run(place: Place, data: Path, workdir: Path, *argv: str) -> list[str]:
    """Notes in the report."""
    batch = "--config.train.max_tokens=256"  # 8 rows of 32 units
    config = config_of(*SMALL, batch, f"--config.data={data}", f"--config.lm={place.folder / 'lm'}", *argv)
    jobs.run(parse(config), str(workdir), None, "")
    return json.loads((workdir / "results.json").read_text())["provenance"]["notes"]


@pytest.mark.parametrize(
    ("given", "limit", "tried"),
    [
        ((), 32, ["--config.overlength=cut"]),
        pytest.param(("--config.max_length=16",), 16, ["--config.overlength=drop"], marks=pytest.mark.slow),
        (("--config.max_length=2000",), 32, []),
    ],
)
def test_every_flag_that_the_message_names_works(
    place: Place, long_ones: Path, tmp_path: Path, given: tuple[str, ...], limit: int, tried: list[str]
):
    with pytest.raises(ValueError, match=r"fsc, train: \d+ of 18 utterances have more") as caught:
        run(place, long_ones, tmp_path / "none", *given)
    cut, drop, *more = re.findall(r"--config\.[\w.]+=\w+", str(caught.value))
    assert (cut, drop) == ("--config.overlength=cut", "--config.overlength=drop")
    for flag in tried:
        notes = run(place, long_ones, tmp_path / "some", *given, flag)
        verb = {cut: "cut", drop: "dropped"}[flag]
        assert [note for note in notes if note.endswith(f": {verb}")] == [
            f"{split}: 1 of 18 utterances have more than max_length={limit} units, the longest {longest}: {verb}"
            for split, longest in (("train", 40), ("test", 50))
        ]
    if len(more) == 2:  # both limits are raised
        assert not run(place, long_ones, tmp_path / "all", *given, *more)


def test_dropping_must_not_lose_a_label(place: Place, tmp_path: Path):
    data = records(tmp_path / "fsc", {"train": 40}, every=len(toy.COMBINATIONS["fsc"]))
    with pytest.raises(ValueError, match=r"train: 3 of 18 .*: dropped; no utterance is left for 1 labels"):
        run(place, data, tmp_path / "run", "--config.overlength=drop")


def test_a_batch_that_is_too_small(place: Place, long_ones: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"train.max_tokens=60 is too small for a batch of 8 .*max_tokens=64 or more"):
        run(place, long_ones, tmp_path, "--config.train.max_tokens=60")


def test_separators_and_labels_must_fit_in_learned_positions():
    learned = UnitLMConfig(positions="learned", max_positions=100)
    task_data.check_tail(learned, 60, 4, "digits")
    task_data.check_tail(UnitLMConfig(), 60, 5, "digits")
    with pytest.raises(ValueError, match="digits: 60 separators and 5 label steps need more than the 64 positions"):
        task_data.check_tail(learned, 60, 5, "digits")


def test_an_lm_of_too_few_positions_is_refused():
    with pytest.raises(ValueError, match="opt has 64 positions, of which 64 are kept for separators and labels"):
        task_data.read_splits(
            mock.Mock(PromptJob, lm="opt"), "fsc", "", UnitLMConfig(positions="learned", max_positions=64), None
        )
