"""Several processes of `python -m spjax.main` on this machine, as hosts would be: the numbers of one, whatever happens.

By default the mistakes alone (tests/test_main.py has two processes that train, stop and go on). The rest takes half an
hour:

    python -m pytest tests/multihost -m slow
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import toy
from tests.conftest import PACE, ROOT, Place, finish

pytestmark = pytest.mark.distributed

SHORT = (*toy.SMALL, "--config.train.epochs=3", "--config.train.checkpoint_every=4")
BANK = (*SHORT, "--config.task=fsc,gsc", "--config.data=runs/units")
PRETRAIN = tuple(
    "--config." + override
    for override in """
    lm.dim=32 lm.layers=2 lm.heads=2 lm.ffn_dim=64 compute.dtype=float32 pretrain.epochs=2 pretrain.rows=8
    pretrain.row_length=32 pretrain.checkpoint_every=3""".split()  # noqa: SIM905 - as on a command line
)
BOUND = 120  # seconds within which all end where one was killed


def _start(
    place: Place, config: str, *flags: str, processes: int, devices: int = 1, own: Sequence[Sequence[str]] = ()
) -> list[subprocess.Popen[str]]:
    """`processes` of a job on a free port; `own`: flags of each alone."""
    if processes == 1:
        return [place.start(config, *flags, devices=devices)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = (f"--coordinator=localhost:{free.getsockname()[1]}", f"--processes={processes}")
    own = own or [()] * processes
    return [
        place.start(config, *flags, *where, f"--process_id={i}", *own[i], devices=devices) for i in range(processes)
    ]


def _run(place: Place, config: str, *flags: str, processes: int, devices: int = 1) -> list[str]:
    """Output of each process of a job that must succeed."""
    ends = [finish(process) for process in _start(place, config, *flags, processes=processes, devices=devices)]
    assert [code for code, _ in ends] == [0] * processes, "\n\n".join(printed[-1500:] for _, printed in ends)
    return [printed for _, printed in ends]


def _when(processes: Sequence[subprocess.Popen[str]], ready: Callable[[], bool], timeout: float = 240) -> None:
    """Return once `ready`; the processes must still be running."""
    end = time.monotonic() + timeout
    while not ready():
        assert all(process.poll() is None for process in processes), [finish(p)[1][-1500:] for p in processes]
        assert time.monotonic() < end
        time.sleep(0.02)


def _checkpoint(workdir: Path) -> Callable[[], bool]:
    """Whether a complete checkpoint is there."""
    return lambda: any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def _log(workdir: Path) -> dict[tuple[int, str], Any]:
    """Numbers of log.jsonl by step and name; a stop adds lines at steps of its own, which shorten the next one's."""
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    before = [0, *(line["step"] for line in lines)]
    spans = [(start, line) for start, line in zip(before, lines, strict=False)]
    return {
        (start if name.startswith("train/") else 0, line["step"], name): value
        for start, line in spans
        for name, value in line.items()
        if name not in ("step", *PACE)
    }  # fmt: skip


def _assert_close(workdir: Path, expected: Path) -> None:
    """Losses and prompts to 1e-5, metrics equal, over the steps that both logged separately."""
    found, wanted = _log(workdir), _log(expected)
    common = found.keys() & wanted.keys()
    assert {key for key in wanted if not key[2].startswith("train/")} <= common
    assert len(common) >= len(wanted) * 2 / 3
    for key in common:
        exact = key[2].endswith("metric")
        as_numbers = [np.asarray(each[key], np.float64) for each in (found, wanted)]
        rtol = 0 if exact else 1e-4 if key[2].endswith("gradient_norm") else 1e-5
        np.testing.assert_allclose(*as_numbers, rtol=rtol, err_msg=str(key))
    for path in sorted(expected.rglob("*.safetensors")):
        here, there = load_file(workdir / path.relative_to(expected)), load_file(path)
        assert here.keys() == there.keys()
        # Outputs do not depend on the key bias: its gradient is rounding noise, which Adam normalises.
        for name, leaf in ((name, leaf) for name, leaf in there.items() if name != "layers/key/bias"):
            np.testing.assert_allclose(here[name], leaf, rtol=1e-5, atol=1e-5, err_msg=f"{path.parent.name} {name}")
    for path in sorted(expected.rglob("results.json")):
        here, there = (json.loads(file.read_text()) for file in (workdir / path.relative_to(expected), path))
        for key in ("headline", "valid", "baselines", "setting", "parameters", "confusions"):
            assert here[key] == there[key], key
    for path in sorted(expected.rglob("predictions/*.gz")):
        assert _answers(workdir / path.relative_to(expected)) == _answers(path)


def _answers(path: Path) -> list[tuple[str, dict[str, str]]]:
    with gzip.open(path, "rt") as lines:
        return [(row["id"], row["predicted"]) for row in map(json.loads, lines)]


@pytest.fixture(scope="module")
def alone(place: Place) -> Callable[..., Path]:
    """Work directory of a job that one process did, undisturbed; made once."""
    made: dict[tuple[str, ...], Path] = {}

    def of(config: str, *flags: str) -> Path:
        job = (config, *flags)
        if job not in made:
            name = f"runs/alone_{len(made)}"
            _run(place, *job, f"--workdir={name}", processes=1)
            made[job] = place.folder / name
        return made[job]

    return of


def _killed(processes: Sequence[subprocess.Popen[str]], who: int) -> None:
    """Kill one; the others must end soon, with our message, or JAX's if it aborts first."""
    processes[who].kill()
    since = time.monotonic()
    ends = [finish(process, timeout=BOUND) for process in processes]
    assert time.monotonic() - since < BOUND
    assert ends[who][0] == -signal.SIGKILL
    for number, (code, printed) in enumerate(ends):
        if number != who:
            message = f"error: process {number} of {len(processes)} stops, since another process ended"
            assert code in (1, -signal.SIGABRT), printed[-1500:]
            assert message in printed or "likely indicates that another task died" in printed, printed[-1500:]


@pytest.mark.slow
def test_a_bank_whose_process_was_killed_resumes_in_one_process(place: Place, alone: Callable[..., Path]) -> None:
    """Two processes, one of them killed, resumed in one. Curves, prompts, scores and baselines: as undisturbed."""
    _killed_and_continued(place, alone, BANK, who=1, first=2, then=1)


def _killed_and_continued(
    place: Place, alone: Callable[..., Path], job: Sequence[str], *, who: int, first: int, then: int
) -> None:
    name = f"runs/killed_{len(job)}_{who}_{first}_{then}"
    processes = _start(place, "fsc", *job, f"--workdir={name}", processes=first)
    _when(processes, _checkpoint(place.folder / name))
    _killed(processes, who)
    printed = _run(place, "fsc", *job, f"--workdir={name}", processes=then)
    assert re.search("continuing from epoch|epochs are done", printed[0])
    assert ["fsc: test exact_match" in each for each in printed] == [number == 0 for number in range(then)]
    _assert_close(place.folder / name, alone("fsc", *job))


def test_processes_with_different_settings_are_refused(place: Place) -> None:
    own = [(f"--config.optim.lr={lr}", f"--workdir=runs/refused_{lr}") for lr in (0.02, 0.01)]
    processes = _start(place, "fsc", *SHORT, processes=2, own=own)
    (one, odd) = (finish(process, timeout=BOUND) for process in processes)
    assert [one[0], odd[0]] == [1, 1]
    message = 'optim.lr=0.01 (process 0: 0.02), workdir="runs/refused_0.01" (process 0: "runs/refused_0.02")'
    assert f"error: process 1 has {message}: give all processes the same" in odd[1]
    assert "error: process 1 has other settings than process 0: see its message" in one[1]
    assert not list((place.folder / "runs").glob("refused*"))


# ---- slow


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory, place: Place) -> Place:
    """A place with other records of fsc under the same paths."""
    from data_pipelines.import_units import import_units

    folder = tmp_path_factory.mktemp("another")
    toy.write_text(folder / "units", train=88)
    import_units("fsc", folder / "units" / "fsc", folder / "runs" / "units" / "fsc")
    shutil.copytree(place.folder / "lm", folder / "lm")
    return Place(folder, place.cache)


def _apart(places: Sequence[Place], *flags: str, devices: Sequence[int] = (1, 1)) -> list[tuple[int, str]]:
    """Results of processes that each run in a different place."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = (f"--coordinator=localhost:{free.getsockname()[1]}", f"--processes={len(places)}")
    started = [
        each.start("fsc", *SHORT, *flags, *where, f"--process_id={i}", devices=count)
        for i, (each, count) in enumerate(zip(places, devices, strict=True))
    ]
    return [finish(process, timeout=BOUND) for process in started]


@pytest.mark.slow
def test_processes_with_different_data_are_refused(place: Place, another: Place) -> None:
    ends = _apart((place, another), "--workdir=runs/other_data")
    assert [code for code, _ in ends] == [1, 1]
    assert re.search(r'error: process 1 has units=\[".*\(process 0: \[".*give all processes', ends[1][1])


@pytest.mark.slow
def test_processes_without_the_same_lm_are_refused(place: Place, another: Place) -> None:
    shutil.copytree(place.folder / "lm", place.folder / "lm_of_one")
    ends = _apart((place, another), "--workdir=runs/other_lm", "--config.lm=lm_of_one")
    assert [code for code, _ in ends] == [1, 1]
    assert "error: process 1 has lm_of_one is there=false (process 0: true)" in ends[1][1]


@pytest.mark.slow
def test_processes_with_different_numbers_of_devices_are_refused(place: Place) -> None:
    ends = _apart((place, place), "--workdir=runs/uneven", devices=(1, 2))
    assert [code for code, _ in ends] == [1, 1]
    for _, printed in ends:
        assert "all processes must have the same number of devices: process 0 has 1, process 1 has 2" in printed


@pytest.mark.slow
def test_rows_that_are_not_divisible_are_refused_before_anything_is_written(place: Place) -> None:
    ends = _apart((place, place), "--workdir=runs/odd_rows", "--config.train.max_rows=9", devices=(2, 2))
    assert [code for code, _ in ends] == [1, 1]
    for _, printed in ends:
        assert "error: batches of 9 utterances for each of 2 members are not divisible by 4 devices: set" in printed
        assert "train.max_rows to a multiple of 2, such as 10" in printed
    assert not (place.folder / "runs/odd_rows").exists()


@pytest.mark.slow
def test_processes_that_do_not_share_a_work_directory_are_refused(place: Place, another: Place) -> None:
    shutil.copytree(place.folder / "runs/units/fsc", another.folder / "same")
    shutil.copytree(place.folder / "runs/units/fsc", place.folder / "same")
    (another.folder / "runs/not_shared").mkdir()
    (another.folder / "runs/not_shared/config.json").write_text("{}")  # of an earlier run
    ends = _apart((place, another), "--workdir=runs/not_shared", "--config.data=same")
    assert [code for code, _ in ends] == [1, 1]
    assert "cannot see runs/not_shared/config.json, which process 0 wrote" in ends[1][1]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 1), (4, 1), (2, 2), (2, 4)])
@pytest.mark.parametrize(
    "job", [("fsc", *SHORT), ("fsc", *BANK), ("pretrain_ulm", *PRETRAIN)], ids=["one", "bank", "lm"]
)
def test_several_processes_get_the_same_numbers(
    place: Place, alone: Callable[..., Path], job: tuple[str, ...], processes: int, devices: int
) -> None:
    workdir = f"runs/same_{len(job)}_{processes}_{devices}"
    _run(place, *job, f"--workdir={workdir}", processes=processes, devices=devices)
    _assert_close(place.folder / workdir, alone(*job))


INTERLEAVED = """
import sys
import jax
import numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from spjax.data.plan import Step, host_slice
from spjax.training import sharding
a, b, c, d = jax.devices()
mesh = sharding.make_mesh(1, 1, devices=[a, c, b, d])
ids, _ = host_slice(Step(8, np.arange(8, dtype=np.int32).reshape(2, 4)), *sharding.local_shards(mesh))
print(ids.tolist(), sharding.fetch(sharding.shard_rows(mesh, ids)).tolist())
"""


def test_rows_are_in_the_order_of_the_plan_if_devices_of_a_host_are_not_contiguous() -> None:
    """As on slices of more than one host: on v5e:16x16, a host's four chips are numbers 0, 1, 16 and 17 of a mesh."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", INTERLEAVED, where, str(number)], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for number in range(2)
    ]  # fmt: skip
    for process, own in zip(started, ([0, 1, 4, 5], [2, 3, 6, 7]), strict=True):
        code, printed = finish(process)
        assert code == 0, printed
        assert f"{own} {list(range(8))}" in printed


LAID = {  # layers and weights sharded beyond a process
    "model": (2, 1, ("--config.model_parallel=2",)),
    "model_of_four": (4, 1, ("--config.model_parallel=2",)),
    "pieces": (2, 2, ("--config.weight_shards=4",)),
    "both": (2, 2, ("--config.model_parallel=2", "--config.weight_shards=2")),
}


@pytest.mark.slow
@pytest.mark.parametrize("laid", LAID)
@pytest.mark.parametrize("job", [("fsc", *BANK), ("pretrain_ulm", *PRETRAIN)], ids=["bank", "lm"])
def test_layers_and_weights_sharded_over_processes_give_the_same_numbers(
    place: Place, alone: Callable[..., Path], job: tuple[str, ...], laid: str
) -> None:
    processes, devices, flags = LAID[laid]
    workdir = f"runs/laid_{len(job)}_{laid}"
    _run(place, *job, *flags, f"--workdir={workdir}", processes=processes, devices=devices)
    _assert_close(place.folder / workdir, alone(*job))


@pytest.mark.slow
def test_a_sharded_lm_resumes_unsharded(place: Place, alone: Callable[..., Path]) -> None:
    job = ("pretrain_ulm", *PRETRAIN, "--workdir=runs/pieces_then_whole")
    processes = _start(place, *job, "--config.weight_shards=2", processes=2)
    _when(processes, _checkpoint(place.folder / "runs/pieces_then_whole"))
    processes[1].send_signal(signal.SIGTERM)
    assert [finish(process, timeout=BOUND)[0] for process in processes] == [143, 143]
    _run(place, *job, processes=1)
    _assert_close(place.folder / "runs/pieces_then_whole", alone("pretrain_ulm", *PRETRAIN))


@pytest.mark.slow
@pytest.mark.parametrize("who", [[0], [3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("then", [1, 2])
def test_a_run_of_four_processes_resumes_with_fewer(
    place: Place, alone: Callable[..., Path], who: list[int], then: int
) -> None:
    """SIGTERM to one or all: all stop at the same step."""
    name = f"runs/stopped_{len(who)}{who[0]}_{then}"
    processes = _start(place, "fsc", *SHORT, f"--workdir={name}", processes=4)
    _when(processes, _checkpoint(place.folder / name))
    for number in who:
        processes[number].send_signal(signal.SIGTERM)
    ends = [finish(process, timeout=BOUND) for process in processes]
    assert [code for code, _ in ends] == [143] * 4, [printed[-1500:] for _, printed in ends]
    assert len({re.search(r"stopped at (.*): saved", printed)[1] for _, printed in ends}) == 1
    _run(place, "fsc", *SHORT, f"--workdir={name}", processes=then)
    _assert_close(place.folder / name, alone("fsc", *SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("job", [("fsc", *BANK), ("pretrain_ulm", *PRETRAIN)], ids=["bank", "lm"])
@pytest.mark.parametrize(("first", "then"), [(1, 4), (2, 1), (1, 2)])
def test_a_job_resumes_with_more_or_fewer(
    place: Place, alone: Callable[..., Path], job: tuple[str, ...], first: int, then: int
) -> None:
    name = f"runs/moved_{len(job)}_{first}_{then}"
    processes = _start(place, *job, f"--workdir={name}", processes=first)
    _when(processes, _checkpoint(place.folder / name))
    processes[-1].send_signal(signal.SIGTERM)
    ends = [finish(process, timeout=BOUND) for process in processes]
    assert [code for code, _ in ends] == [143] * first, [printed[-1500:] for _, printed in ends]
    _run(place, *job, f"--workdir={name}", processes=then)
    _assert_close(place.folder / name, alone(*job))


@pytest.mark.slow
@pytest.mark.parametrize(("job", "who", "first", "then"), [(SHORT, 0, 2, 2), (SHORT, 1, 2, 2), (BANK, 2, 4, 2)])
def test_the_same_command_resumes_after_one_was_killed(
    place: Place, alone: Callable[..., Path], job: tuple[str, ...], who: int, first: int, then: int
) -> None:
    _killed_and_continued(place, alone, job, who=who, first=first, then=then)


@pytest.mark.slow
def test_all_end_if_one_hangs(place: Place) -> None:
    """A stopped process keeps its connections: only missing heartbeats reveal it."""
    processes = _start(place, "fsc", *SHORT, "--config.train.epochs=500", "--workdir=runs/still", processes=2)
    _when(processes, _checkpoint(place.folder / "runs/still"))
    processes[1].send_signal(signal.SIGSTOP)
    code, printed = finish(processes[0], timeout=BOUND)
    processes[1].kill()
    finish(processes[1])
    assert code in (1, -signal.SIGABRT)
    assert "heartbeat" in printed or "stops, since" in printed


def _joined(arguments: str, body: str) -> subprocess.CompletedProcess[str]:
    """A process that does `body`, as one of several, or in vain."""
    code = f"import sys\nfrom spjax.training.processes import joined\nwith joined({arguments}):\n{body}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def test_a_process_that_waits_too_long_says_so() -> None:
    port = _free_port()
    done = _joined(f"'localhost:{port}', 3, 1, timeout=2.0", "    print('arrived')")
    assert done.returncode == 1
    assert f"error: process 1 of 3 waited 2 s for all processes at --coordinator=localhost:{port}" in (done.stderr)


def test_auto_without_a_cluster_says_so() -> None:
    done = _joined("None, None, None", "    print('arrived')")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: --coordinator=auto finds no cluster that it can use (" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_reported() -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        done = _joined(f"'localhost:{port}', 2, 0", "    print('arrived')")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"error: process 0 of 2 cannot start at --coordinator=localhost:{port} (" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("raise KeyboardInterrupt", 130, ""),
        (
            "try: raise OSError('gs://mine: Connection reset by peer')\nexcept OSError as e: sys.exit(f'error: {e}')",
            1, "\nerror: gs://mine: Connection reset by peer\n",
        ),
    ],
    ids=["second_interrupt", "own_connection"],
)  # fmt: skip
def test_exit_status_and_message_are_kept(body: str, status: int, message: str) -> None:
    body = "".join(f"    {line}\n" for line in body.split("\n"))
    done = _joined(f"'localhost:{_free_port()}', 1, 0", body)
    assert (done.returncode, done.stderr) == (status, message)


@pytest.mark.slow
def test_a_cluster_provides_the_process_ids(
    place: Place, alone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--coordinator=auto, with the environment variables of Slurm."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        monkeypatch.setenv("JAX_COORDINATOR_PORT", str(free.getsockname()[1]))
    for name, value in {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": "2", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    started = []
    for number in range(2):
        monkeypatch.setenv("SLURM_PROCID", str(number))
        started.append(place.start("fsc", *SHORT, "--workdir=runs/auto", "--coordinator=auto"))
    ends = [finish(process) for process in started]
    assert [code for code, _ in ends] == [0, 0], [printed[-1500:] for _, printed in ends]
    _assert_close(place.folder / "runs/auto", alone("fsc", *SHORT))


def test_a_coordinator_alone_is_not_enough(place: Place) -> None:
    code, printed = place.run("fsc", "--coordinator=localhost:1")
    assert code == 1
    assert "error: --coordinator=localhost:1 requires --processes (their number) and --process-id" in printed
