"""`python -m spjax.main` as its users run it: processes in an empty directory, killed, stopped and started again."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spjax
from tests import toy
from tests.conftest import PACE, ROOT, Place, finish

LOSS_LINES = 4  # lines of log.jsonl that an epoch of toy.SMALL writes: two in its midst, one at its end, one of valid


def _results(workdir: Path) -> dict[str, Any]:
    """results.json less what names the work directory."""
    results = json.loads((workdir / "results.json").read_text())
    results.pop("command")
    return results


def _packs(workdir: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(workdir.glob("packs/*/prompt.safetensors"))}


def _predictions(workdir: Path) -> dict[str, str]:
    return {path.name: gzip.open(path, "rt").read() for path in sorted(workdir.glob("predictions/*.gz"))}


def _log(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _numbers(workdir: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in PACE} for line in _log(workdir)]


def _assert_same(workdir: Path, expected: Path, stopped: bool = False) -> None:
    """Bit for bit: scores, curves, probabilities, prompts, and the log; a run that was stopped logged one line more."""
    assert _results(workdir) == _results(expected)
    assert _packs(workdir) == _packs(expected)
    assert _predictions(workdir) == _predictions(expected)
    logs = [
        [line for line in _numbers(folder) if "valid/metric" in line or not stopped] for folder in (workdir, expected)
    ]
    assert logs[0] == logs[1]


def _fails(place: Place, *flags: str, config: str = "fsc") -> str:
    """The one line that a run ends with."""
    code, printed = place.run(config, *flags)
    assert code != 0, printed
    assert "Traceback" not in printed
    line = printed.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


# ---- from nothing to a score


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Place, str]:
    """An empty directory with unit text, after the main command of the README made records, LM and prompts."""
    folder = tmp_path_factory.mktemp("bare")
    toy.write_text(folder / "units", train=48, held_out=16)
    place = Place(folder, cache)
    code, printed = place.run(
        "fsc", "--units=units", "--workdir=runs/fsc", "--config.train.epochs=2", "--config.train.buckets=1",
        "--config.train.seeds=(0,)", "--config.pretraining.pretrain.epochs=1", "--config.pretraining.lm.layers=2",
    )  # fmt: skip
    assert code == 0, printed[-3000:]
    return place, printed


def test_the_main_command_makes_what_is_absent(bare: tuple[Place, str]) -> None:
    place, printed = bare
    runs = place.folder / "runs"
    for path in ("units/fsc/unit_card.json", "units/gsc/unit_card.json", "pretrain_ulm/lm/model.safetensors"):
        assert (runs / path).is_file()
    assert "no unit LM at runs/pretrain_ulm/lm: pretraining one first" in printed
    assert re.search(r"unit LM: runs/pretrain_ulm/lm; valid perplexity fsc \d+\.\d+, gsc \d+\.\d+", printed)
    assert spjax.load_unit_lm(runs / "pretrain_ulm" / "lm").config.dim == 256


def test_the_main_command_prints_the_test_score(bare: tuple[Place, str]) -> None:
    place, printed = bare
    results = _results(place.folder / "runs" / "fsc")
    (score,) = re.findall(r"test exact_match: (\d+\.\d+) %", printed)
    assert float(score) == pytest.approx(100 * results["headline"]["mean"], abs=0.006)
    assert "fsc: 48 train, 16 valid, 16 test utterances" in printed
    assert "n-gram: " in printed
    assert "linear probe: " in printed
    assert "report: runs/fsc/summary.md" in printed


def test_everything_lands_in_the_work_directory(finished_run: Path) -> None:
    for path in ("results.json", "summary.md", "config.json", "log.jsonl", "baselines.json"):
        assert (finished_run / path).stat().st_size > 100, path
    assert sorted(path.name for path in (finished_run / "plots").iterdir()) == [
        "confusion_0_action.png", "confusion_1_object.png", "confusion_2_location.png", "learning_curve.png"
    ]  # fmt: skip
    assert list((finished_run / "tensorboard").glob("events.out.tfevents*"))
    assert list(_packs(finished_run)) == ["seed_0", "seed_1"]
    config = json.loads((finished_run / "config.json").read_text())
    assert config["train"]["epochs"] == 6
    assert config["optim"]["lr"] == 0.03
    assert len(config["inputs"]["lm_hash"]) == 64


def test_the_report_says_what_was_run(finished_run: Path) -> None:
    results = json.loads((finished_run / "results.json").read_text())
    assert [member["seed"] for member in results["members"]] == [0, 1]
    assert all(len(member["curve"]) == 6 for member in results["members"])
    curve = np.asarray([[point["train_loss"] for point in member["curve"]] for member in results["members"]])
    assert (curve[:, -1] < 0.7 * curve[:, 0]).all()
    # 2 layers x 4 x 32 keys and as many values, 2 separators, steering of both in each layer, (24 + 4) x 104.
    assert results["parameters"] == {"trained": 2 * 2 * 4 * 32 + 2 * 32 + 2 * 2 * 32 + 28 * 104, "frozen": 20480}
    assert "--workdir=runs/undisturbed" in results["command"]
    assert results["config"]["task"] == "fsc"
    log = _log(finished_run)
    assert len(log) == 6 * LOSS_LINES
    assert log[-1]["valid/metric"] == [member["curve"][-1]["valid"] for member in results["members"]]


def test_a_finished_run_is_quick_to_run_again_and_the_same(place: Place, finished_run: Path) -> None:
    """In a copy, so that it shows too that checkpoints name no absolute path."""
    copy = place.folder / "elsewhere"
    shutil.copytree(finished_run, copy)
    (copy / "results.json").unlink()
    code, printed = place.run("fsc", "--workdir=elsewhere", *toy.SMALL)
    assert code == 0, printed[-3000:]
    assert "test exact_match" in printed
    assert "epoch 1/6" not in printed  # nothing was trained again
    _assert_same(copy, finished_run)


# ---- what is wrong is told in a line


def _refused(folder: Path, *words: str) -> str:
    """The one line that a command line is refused with, with status 2, before JAX is imported."""
    blocked = "import sys; sys.modules['jax'] = None; from spjax import process; process.run('spjax.main')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", blocked, *words], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


CONFIGS = {
    "empty.py": "",
    "syntax.py": "x = 1\ndef get_config(:\n",
    "without.py": "config = 3\n",
    "prose.txt": "hello\n",
    "image.png": "\0PNG",
    "null.py": "\0\ndef get_config(): pass",
    "number.py": "def get_config():\n    return 3\n",
    "raises.py": "def get_config(options=''):\n    raise RuntimeError('no data')\n",
    "attribute.py": "import os\nget_config = os.nothere\n",
    "key.py": "def get_config():\n    return {}['lr']\n",
    "missing.py": "import nothere\nfrom configs.fsc import get_config\n",
}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "fcs.py",
            "--config=my/fcs.py does not exist: did you mean my/fsc.py? my holds attribute.py, empty.py, fsc.py",
        ),
        ("fsc", "--config=my/fsc does not exist: did you mean my/fsc.py?"),
        ("zzz", "--config=my/zzz does not exist: my holds "),
        ("fcs.py:backbone=pgslm", "--config=my/fcs.py does not exist: did you mean my/fsc.py?"),
        (".", "--config=my/. is a directory: my holds "),
        ("empty.py", "--config=my/empty.py has no get_config(), which makes the config: my holds "),
        ("syntax.py", "my/syntax.py: SyntaxError: invalid syntax (syntax.py, line 2)"),
        ("without.py", "--config=my/without.py has no get_config()"),
        ("prose.txt", "--config=my/prose.txt has no get_config()"),
        ("image.png", "--config=my/image.png has no get_config()"),
        ("null.py", "my/null.py: "),
        ("number.py", "my/number.py: get_config() returns a int, must return a ConfigDict"),
        ("raises.py", "my/raises.py, line 2: RuntimeError: no data"),
        ("attribute.py", "my/attribute.py, line 2: AttributeError: module 'os' has no attribute 'nothere'"),
        ("key.py", "my/key.py, line 2: KeyError: 'lr'"),
        ("missing.py", "my/missing.py, line 1: ModuleNotFoundError: No module named 'nothere'"),
    ],
)
def test_a_config_that_is_none_is_told_with_what_there_is(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "my").mkdir()
    for file, text in {**CONFIGS, "fsc.py": "def get_config(): return 1\n"}.items():
        (tmp_path / "my" / file).write_text(text)
    assert _refused(tmp_path, f"--config=my/{name}").startswith(f"error: {why}")


def test_without_a_config_of_ones_own_ours_are_listed(tmp_path: Path) -> None:
    names = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
    listed = f"configs holds {', '.join(name for name in names if name not in ('__init__.py', 'defaults.py'))}"
    for words in ([], ["--config=configs/fcs.py"], ["--config", "fcs"]):
        assert listed in _refused(tmp_path, *words)
    assert _refused(ROOT, "--config=configs/gcs.py").startswith(
        "error: --config=configs/gcs.py does not exist: did you mean configs/gsc.py? configs holds adapters.py"
    )


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--wrkdir=x", "unknown flag --wrkdir: did you mean --workdir?"),
        ("--split-sed=1", "unknown flag --split-sed: did you mean --split-seed?"),
        ("--folders=https://x/y", "flag --folders=https://x/y: https://x/y is a https:// address"),
        ("-unit=x", "unknown flag -unit: did you mean --units?"),
        ("--zzzzz", "unknown flag --zzzzz: see --help"),
        ("--processes=x", "flag --processes=x: invalid literal for int() with base 10: 'x'"),
        ("fsc", "unexpected 'fsc': every argument is a --flag=value"),
        ("--config=https://x/y.py", "--config: https://x/y.py is a https:// address"),
        ("--config=", "--config: '' is not a path"),
        ("--workdir=https://x/y", "flag --workdir=https://x/y: https://x/y is a https:// address"),
        ("--workdir=", "flag --workdir=: '' is not a path"),
        ("--workdir=mine.py/x", "flag --workdir=mine.py/x: mine.py/x cannot be written ("),
        ("--units=s3://b/units", "flag --units=s3://b/units: s3://b/units is a s3:// address"),
        ("--compilation_cache=C:\\x", "flag --compilation-cache=C:\\x: C:\\x is a Windows path"),
    ],
)
def test_a_flag_that_is_none_is_told_with_the_nearest(tmp_path: Path, flag: str, why: str) -> None:
    (tmp_path / "mine.py").write_text("from ml_collections import ConfigDict\nget_config = ConfigDict\n")
    assert _refused(tmp_path, "--config=mine.py", flag).startswith(f"error: {why}")
    assert os.listdir(tmp_path) == ["mine.py"]


def test_a_cache_that_cannot_be_written_only_warns(place: Place) -> None:
    """The run then ends for another reason."""
    nowhere = Place(place.folder, place.folder / "lm" / "config.json" / "xla")
    code, printed = nowhere.run("fsc", "--config.lm=no/where")
    assert code == 1
    assert printed.count("compiled programs are not kept: ") == 1
    assert "error: no unit LM at no/where" in printed


@pytest.mark.parametrize("flag", ["--help", "--helpfull", "-h"])
def test_help_needs_no_config(tmp_path: Path, flag: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "spjax.main", flag], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("config", "units", "folders", "split-seed", "workdir", "coordinator", "compilation-cache"):
        assert f"  --{name}" in done.stdout


def test_an_unknown_setting_is_told(place: Place) -> None:
    line = _fails(place, "--config.few_shots=10")
    assert line == 'error: the config has no \'few_shots\': Did you mean "few_shot" instead of "few_shots"?'


def test_missing_units_are_told(place: Place) -> None:
    for flags in (("--config.data=nowhere", "--config.lm=lm"), ("--config.data=nowhere",)):
        code, printed = place.run("fsc", *flags)
        assert code == 1
        told = printed[printed.index("error: ") :]
        assert told.startswith(
            "error: no unit records of fsc at nowhere, and nothing to make them of\nAdd one of these"
        )
        ways = (
            "--raw=DIR --encoder=tiny",
            "--raw=DIR  ",
            "--units=DIR",
            "configs/demo.py",
            "configs/own.py --folders=DIR",
        )
        assert [told.index(way) for way in ways] == sorted(map(told.index, ways))  # the easiest first
        assert "Traceback" not in printed
        assert not (place.folder / "nowhere").exists()


def test_missing_units_to_pretrain_on_are_told(place: Place) -> None:
    line = _fails(place, "--config.lm=runs/none/lm", "--config.pretraining.tasks=('fsc','other')")
    assert "no unit records of other at runs/units/other" in line
    assert "which the LM runs/none/lm is to be pretrained on" in line
    assert "--config.pretraining.tasks" in line


def test_a_missing_lm_is_told(place: Place) -> None:
    assert "no unit LM at no/where: give --config.lm=DIR" in _fails(place, "--config.lm=no/where")


def test_settings_are_checked_before_an_lm_is_pretrained(place: Place) -> None:
    flags = ("--config.lm=runs/later/lm", "--config.prompt.length=-1", f"--units={place.folder}")
    assert "prompt: length -1" in _fails(place, *flags)
    assert not (place.folder / "runs/later").exists()


def test_processes_without_a_coordinator_are_told(place: Place) -> None:
    assert "--processes=2 requires --coordinator=HOST:PORT" in _fails(place, "--processes=2")
    assert "--process-id=1 must be less than --processes=1" in _fails(place, "--process_id=1")


def test_a_folder_of_units_that_is_not_there_is_told(place: Place) -> None:
    assert "--units=nowhere is no folder" in _fails(place, "--units=nowhere")


def test_another_pretraining_in_a_work_directory_is_told(bare: tuple[Place, str]) -> None:
    line = _fails(bare[0], "--workdir=runs/pretrain_ulm", "--config.lm.dim=64", config="pretrain_ulm")
    assert "runs/pretrain_ulm holds a run with " in line
    assert "lm.dim=" in line


def test_the_wrong_task_is_told(place: Place) -> None:
    line = _fails(place, "--config.lm=lm", "--config.data=runs/units/fsc", config="gsc")
    assert "runs/units/fsc has units of task 'fsc', the config is for 'gsc'" in line


def test_another_config_in_a_work_directory_is_told(place: Place, finished_run: Path) -> None:
    config = (finished_run / "config.json").read_text()
    line = _fails(place, "--workdir=runs/undisturbed", *toy.SMALL, "--config.optim.lr=0.5", "--config.train.epochs=7")
    assert "runs/undisturbed holds a run with optim.lr=0.03 (now 0.5), train.epochs=6 (now 7): use another" in line
    assert (finished_run / "config.json").read_text() == config


def test_divergence_ends_in_a_message(place: Place) -> None:
    line = _fails(place, "--workdir=runs/diverged", *toy.SMALL, "--config.optim.lr=1e6", "--config.optim.warmup=0.0")
    assert "training diverged at epoch 1, step " in line
    assert "lower the learning rate" in line.lower()
    assert not (place.folder / "runs/diverged/results.json").exists()


def test_a_full_disk_ends_in_a_message(place: Place) -> None:
    """Files may not grow over 24 kB: logs and records fit, a checkpoint does not."""
    code, printed = finish(place.start("fsc", "--workdir=runs/full", *toy.SMALL, limits="ulimit -f 24"))
    assert code == 1
    # Beside it, on a busy machine before it in its line, stands what other threads say, which cannot be silenced.
    assert re.search(r"error: .*a checkpoint could not be written.* last complete one is kept", printed, re.DOTALL)


# ---- killed and stopped


def _when(process: subprocess.Popen[str], happens: Callable[[], bool]) -> None:
    """Wait for a moment in the life of a run."""
    deadline = time.monotonic() + 200
    while not happens():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def _cut(
    place: Place, name: str, happens: Callable[[Path], bool], *, number: int = signal.SIGKILL, devices: int = 1
) -> tuple[int, str, float]:
    """Start a run, send it a signal at that moment; exit code, output and seconds until it ended."""
    workdir = place.folder / "runs" / name
    process = place.start("fsc", f"--workdir=runs/{name}", *toy.SMALL, devices=devices)
    _when(process, lambda: happens(workdir))
    start = time.monotonic()
    process.send_signal(number)
    code, printed = finish(process)
    return code, printed, time.monotonic() - start


def _lines(count: int) -> Callable[[Path], bool]:
    return lambda workdir: len(_log(workdir)) >= count


@pytest.mark.slow
def test_killed_while_training_it_ends_at_the_same_numbers(place: Place, finished_run: Path) -> None:
    code, _, _ = _cut(place, "killed", _lines(2 * LOSS_LINES + 1))
    assert code == -signal.SIGKILL
    assert not (place.folder / "runs/killed/results.json").exists()
    code, printed = place.run("fsc", "--workdir=runs/killed", *toy.SMALL)
    assert code == 0, printed[-3000:]
    assert "continuing from epoch " in printed
    _assert_same(place.folder / "runs/killed", finished_run)


def test_sigterm_saves_and_exits_and_the_run_goes_on(place: Place, finished_run: Path) -> None:
    code, printed, seconds = _cut(place, "stopped", _lines(LOSS_LINES + 2), number=signal.SIGTERM)
    assert code == 143, printed[-3000:]
    (line,) = re.findall(r"^stopped at epoch \d, step \d+: saved; the same command continues$", printed, re.MULTILINE)
    assert printed.strip().endswith(line)  # nothing came behind it, and no traceback before
    assert "Traceback" not in printed
    assert seconds < 60  # it hung in the interpreter's shutdown once
    code, printed = place.run("fsc", "--workdir=runs/stopped", *toy.SMALL)
    assert code == 0, printed[-3000:]
    _assert_same(place.folder / "runs/stopped", finished_run, stopped=True)


@pytest.mark.slow
def test_two_ctrl_c_interrupt_at_once(place: Place) -> None:
    workdir = place.folder / "runs/interrupted"
    process = place.start("fsc", "--workdir=runs/interrupted", *toy.SMALL, "--config.train.epochs=60")
    _when(process, lambda: _lines(2)(workdir))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    code, _ = finish(process)
    assert code == 130


def _in_evaluation(workdir: Path) -> bool:
    log = _log(workdir)
    return len(log) > LOSS_LINES and log[-1]["step"] % 12 == 0 and "train/loss" in log[-1]


def _in_checkpoint(workdir: Path) -> bool:
    folder = workdir / "checkpoints"
    return _lines(LOSS_LINES)(workdir) and any("tmp" in path.name for path in folder.iterdir())


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_at_the_same_numbers(place: Place, finished_run: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)  # shown if this fails
    draw = random.Random(seed)
    moments = [_in_evaluation, _in_checkpoint, _lines(draw.randrange(1, 5 * LOSS_LINES))]
    draw.shuffle(moments)
    for happens in moments:
        workdir = place.folder / "runs/random"
        process = place.start("fsc", "--workdir=runs/random", *toy.SMALL)
        ended = False
        while not (happens(workdir) or ended):
            time.sleep(0.001)
            ended = process.poll() is not None  # it may have been past this moment when it was killed last
        time.sleep(draw.random() * 0.05)
        process.kill()
        finish(process)
    code, printed = place.run("fsc", "--workdir=runs/random", *toy.SMALL)
    assert code == 0, printed[-3000:]
    _assert_same(place.folder / "runs/random", finished_run)


PRETRAIN = tuple(
    "--config." + override
    for override in """
    lm.dim=32 lm.layers=2 lm.heads=2 lm.ffn_dim=64 pretrain.epochs=6 pretrain.rows=8 pretrain.row_length=32
    pretrain.checkpoint_every=3 compute.dtype=float32""".split()  # noqa: SIM905 - as on a command line
)


@pytest.mark.slow
def test_pretraining_killed_at_random_moments_ends_at_the_same_lm(place: Place) -> None:
    runs = place.folder / "runs"
    code, printed = place.run("pretrain_ulm", "--workdir=runs/lm_undisturbed", *PRETRAIN)
    assert code == 0, printed[-3000:]
    draw = random.Random()
    for count in sorted(draw.sample(range(1, 18), 3)):
        process = place.start("pretrain_ulm", "--workdir=runs/lm_killed", *PRETRAIN)
        _when(process, lambda count=count: _lines(count)(runs / "lm_killed"))
        time.sleep(draw.random() * 0.05)
        process.kill()
        finish(process)
    code, printed = place.run("pretrain_ulm", "--workdir=runs/lm_killed", *PRETRAIN)
    assert code == 0, printed[-3000:]
    one, other = (runs / name / "lm" / "model.safetensors" for name in ("lm_undisturbed", "lm_killed"))
    assert one.read_bytes() == other.read_bytes()
    assert _numbers(runs / "lm_undisturbed") == _numbers(runs / "lm_killed")


# ---- more devices, more processes


def _assert_close(workdir: Path, expected: Path) -> None:
    """Losses to 1e-5 while rounding has not grown, to 1e-2 at the end; valid scores of the first epoch."""
    found, wanted = (
        {(before, line["step"]): line for before, line in zip([0, *steps], lines, strict=False)}
        for lines in ([line for line in _numbers(folder) if "train/loss" in line] for folder in (workdir, expected))
        for steps in [[line["step"] for line in lines]]
    )
    common = sorted(
        found.keys() & wanted.keys()
    )  # means over the same updates: a run that was stopped logged there too
    assert len(common) >= len(wanted) - 1
    for span in common:
        for name, rtol in (("train/loss", 1e-5), ("train/gradient_norm", 1e-4)):
            rtol = rtol if span[1] <= 12 else 1e-2
            np.testing.assert_allclose(found[span][name], wanted[span][name], rtol=rtol, err_msg=f"{name} in {span}")
    curves = [[member["curve"] for member in _results(folder)["members"]] for folder in (workdir, expected)]
    loss, valid = (
        [np.asarray([[point[name] for point in curve] for curve in members]) for members in curves]
        for name in ("train_loss", "valid")
    )
    np.testing.assert_allclose(loss[0][:, 0], loss[1][:, 0], rtol=1e-5)
    np.testing.assert_allclose(loss[0], loss[1], rtol=1e-2)
    np.testing.assert_allclose(valid[0][:, 0], valid[1][:, 0], atol=0.05)  # an utterance is 0.042
    for name, text in _predictions(expected).items():
        ids = [[json.loads(line)["id"] for line in each.splitlines()] for each in (text, _predictions(workdir)[name])]
        assert ids[0] == ids[1]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("devices", "model", "shards"),
    [
        (2, 1, 0),
        *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in [(8, 1, 1), (8, 2, 1), (8, 1, 0), (8, 2, 2)]),
    ],
)
def test_several_devices_give_the_same_losses(
    place: Place, finished_run: Path, devices: int, model: int, shards: int
) -> None:
    name = f"devices_{devices}_{model}_{shards}"
    flags = (
        f"--workdir=runs/{name}",
        *toy.SMALL,
        f"--config.model_parallel={model}",
        f"--config.weight_shards={shards}",
    )
    code, printed = place.run("fsc", *flags, devices=devices)
    assert code == 0, printed[-3000:]
    _assert_close(place.folder / "runs" / name, finished_run)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _two(place: Place, *flags: str) -> list[subprocess.Popen[str]]:
    where = f"--coordinator=localhost:{_free_port()}"
    return [place.start("fsc", *flags, where, "--processes=2", f"--process_id={i}") for i in range(2)]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_same_losses_and_go_on_after_a_stop(place: Place, finished_run: Path) -> None:
    """Records are absent at first: one process makes them. Then both are stopped, and both continue."""
    workdir = place.folder / "runs/two"
    flags = ("--workdir=runs/two", *toy.SMALL, "--units=units", "--config.data=runs/two_units")
    processes = _two(place, *flags)
    _when(processes[0], lambda: _lines(LOSS_LINES + 1)(workdir))
    processes[1].send_signal(signal.SIGTERM)  # one is asked, both leave at the same step
    ends = [finish(process) for process in processes]
    assert [code for code, _ in ends] == [143, 143], [printed[-2000:] for _, printed in ends]
    assert len({re.search(r"stopped at (.*): saved", printed)[1] for _, printed in ends}) == 1
    ends = [finish(process) for process in _two(place, *flags)]
    assert [code for code, _ in ends] == [0, 0], [printed[-2000:] for _, printed in ends]
    assert "test exact_match" in ends[0][1]
    assert "test exact_match" not in ends[1][1]
    _assert_close(workdir, finished_run)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_of_eight_devices_goes_on_with_one(place: Place, finished_run: Path) -> None:
    code, printed, _ = _cut(place, "moved", _lines(LOSS_LINES), number=signal.SIGTERM, devices=8)
    assert code == 143, printed[-3000:]
    code, printed = place.run("fsc", "--workdir=runs/moved", *toy.SMALL)
    assert code == 0, printed[-3000:]
    _assert_close(place.folder / "runs/moved", finished_run)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("devices", [2, 8])
def test_pretraining_on_several_devices_gives_the_same_losses(place: Place, devices: int) -> None:
    runs = place.folder / "runs"
    short = (*PRETRAIN, "--config.pretrain.epochs=2")
    if not (runs / "lm_one").exists():
        assert place.run("pretrain_ulm", "--workdir=runs/lm_one", *short)[0] == 0
    name = f"lm_{devices}"
    code, printed = place.run("pretrain_ulm", f"--workdir=runs/{name}", *short, devices=devices)
    assert code == 0, printed[-3000:]
    for one, other in zip(_numbers(runs / name), _numbers(runs / "lm_one"), strict=True):
        for key in one:
            np.testing.assert_allclose(one[key], other[key], rtol=1e-5, err_msg=key)
