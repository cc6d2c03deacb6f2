"""Extraction over the cluster protocol in separate processes; workers, job services and pools are killed."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from data_pipelines import beam_worker, fit_kmeans, heartbeats, job_service, parts, run_pipeline, worker_pool
from data_pipelines import extract as extraction
from data_pipelines.extract import extract
from data_pipelines.pipeline import ExtractError, build_pipeline, unknown_options
from data_pipelines.worker_pool import WorkerRequest
from spjax.speech2unit.encoder import load_encoder
from spjax.storage import save_kmeans
from tests.data_pipelines.corpus import TASK, make_corpus

ROOT = Path(__file__).resolve().parents[2]
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")


class Place:
    """A corpus of five parts, its k-means, and its records made by a runner in this process."""

    def __init__(self, folder: Path) -> None:
        self.raw, self.kmeans, self.manifest = folder / "raw", folder / "kmeans", folder / "toy.csv"
        splits = make_corpus(self.raw, {"train": 280, "test": 10})
        fitted = fit_kmeans.fit_kmeans(
            splits["train"][:40], self.raw, load_encoder("mfcc"), clusters=12, described="toy"
        )
        save_kmeans(self.kmeans, fitted)
        rows = [
            f"{clip.path},{split},{clip.speaker},{clip.start},{clip.duration or ''},{','.join(clip.labels)}"
            for split, clips in splits.items()
            for clip in clips
        ]
        self.manifest.write_text("\n".join(["path,split,speaker,start,duration,pitch,noise", *rows]) + "\n")
        self.make_here(folder / "here")
        self.records = content(folder / "here")

    def flags(self, out: Path) -> list[str]:
        """Flags of the command, except the runner's."""
        ours = [
            f"--manifest={self.manifest}",
            "--name=corpus",
            "--crops",
            f"--raw={self.raw}",
            "--encoder=mfcc",
            f"--kmeans={self.kmeans}",
        ]
        return [*ours, f"--out={out}"]

    def make_here(self, out: Path) -> None:
        extraction.main([*self.flags(out), "--runner=FnApiRunner"])

    def start(self, out: Path, job: str, pool: str, *flags: str) -> subprocess.Popen[str]:
        """Runs extraction with two workers of a pool, through a job service."""
        beam = [f"--job_endpoint={job}", "--environment_type=EXTERNAL", f"--environment_config={pool}"]
        ours = [*self.flags(out), *flags, "--runner=PortableRunner", "--", *beam, "--direct_num_workers=2"]
        command = [sys.executable, "-m", "data_pipelines.extract", *ours]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@contextlib.contextmanager
def service(module: str, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Starts one of our services, whose first line of output is its address."""
    command = [sys.executable, "-m", module, *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        output = process.stdout.readline()
        assert ": localhost:" in output, output
        yield process, output.split(": ")[1].strip()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def pool() -> Iterator[str]:
    with service("data_pipelines.worker_pool", "--port=0") as (_, address):
        yield address


@pytest.fixture
def job() -> Iterator[tuple[subprocess.Popen[str], str]]:
    with service("data_pipelines.job_service", "--port=0") as running:
        yield running


def until(seen: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120) -> Any:
    """Waits until `seen` returns a true value, and returns it; fails if the process ends."""
    start = time.monotonic()
    while not (found := seen()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - start < seconds
        time.sleep(0.02)
    return found


def working(folder: Path, count: int) -> set[int]:
    """Process ids of the workers with heartbeats, once there are `count`."""
    found = set()
    for path in folder.glob(f".*.parts-*/{heartbeats.PREFIX}*"):
        with contextlib.suppress(OSError, IndexError):
            found.add(int(path.read_text().split()[1]))
    return found if len(found) >= count else set()


def made(folder: Path) -> dict[str, int]:
    """Parts, and the time at which each was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(".*.parts-*/part-*")}


def hold(folder: Path, process: subprocess.Popen[str], workers: int) -> int:
    """Stops one of the workers in its first part, once the others have made one, so that the job cannot end."""
    pids = until(lambda: working(folder, workers), process)
    os.kill(min(pids), signal.SIGSTOP)
    if workers > 1:
        until(lambda: made(folder), process)
    return min(pids)


def gone(pid: int, seconds: float = 30) -> bool:
    """Returns whether a process ends within `seconds`."""
    start = time.monotonic()
    while Path(f"/proc/{pid}").exists() and time.monotonic() - start < seconds:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


# ---- processes


@pytest.mark.slow
@ON_LINUX
@pytest.mark.distributed
def test_a_killed_workers_parts_are_resubmitted(tmp_path, place, pool, job):
    launcher = place.start(tmp_path / "u", job[1], pool)
    victim = hold(tmp_path, launcher, workers=2)
    others = working(tmp_path, 1) - {victim}
    before = made(tmp_path)
    os.kill(victim, signal.SIGKILL)
    after = until(lambda: len(found := made(tmp_path)) > len(before) and found, launcher)
    assert {name: after[name] for name in before} == before  # none is made twice
    output, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    assert "a worker died" in errors
    assert "Resubmitting" in errors
    assert "Traceback" not in errors
    assert "test: 10 utterances" in output
    assert content(tmp_path / "u") == place.records
    assert [path.name for path in tmp_path.iterdir()] == ["u"]
    assert all(gone(pid) for pid in others)


@pytest.mark.slow
@ON_LINUX
@pytest.mark.distributed
def test_a_killed_job_service_ends_the_run_and_the_same_command_continues(tmp_path, place, pool, job, monkeypatch):
    encode_part = parts.encode_part
    launcher = place.start(tmp_path / "u", job[1], pool)
    held = hold(tmp_path, launcher, workers=2)
    job[0].kill()
    _, errors = launcher.communicate(timeout=120)
    os.kill(held, signal.SIGCONT)
    assert launcher.returncode == 1
    assert "PortableRunner failed: " in errors  # it has ended, so no second attempt
    assert errors.strip().splitlines()[-1].startswith(f"error: --job_endpoint={job[1]} cannot be reached")
    assert errors.rstrip().endswith("run the same command again to continue.")
    assert "Traceback" not in errors
    assert gone(held)
    assert not (tmp_path / "u").exists()
    before = made(tmp_path)
    assert before
    written = []
    monkeypatch.setattr(parts, "encode_part", lambda *args: written.append(args[2]) or encode_part(*args))
    place.make_here(tmp_path / "u")
    assert {f"part-{number:06d}.npz" for number in written}.isdisjoint(before)
    assert len(written) + len(before) == 5
    assert content(tmp_path / "u") == place.records


@pytest.mark.slow
@ON_LINUX
@pytest.mark.distributed
def test_missing_heartbeats_end_a_job_that_beam_waits_for(tmp_path, place, pool):
    """There is one worker, so all heartbeats end with it."""
    port_file = tmp_path / "port"
    beams = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main", f"--port_file={port_file}"]
    server = subprocess.Popen(beams, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"localhost:{until(lambda: port_file.exists() and port_file.read_text(), server)}"
        out = tmp_path / "out"
        launcher = place.start(out / "u", address, pool, "--patience=20")
        until(lambda: len(made(out)) > 1, launcher)
        os.kill(working(out, 1).pop(), signal.SIGKILL)
        _, errors = launcher.communicate(timeout=200)
        assert launcher.returncode == 0, errors
        assert "no worker of PortableRunner has sent a heartbeat for 2" in errors
        assert "Resubmitting" in errors
        assert content(out / "u") == place.records
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
@ON_LINUX
@pytest.mark.distributed
def test_a_killed_pool_ends_the_run(tmp_path, place, job):
    with service("data_pipelines.worker_pool", "--port=0") as (pool, address):
        launcher = place.start(tmp_path / "u", job[1], address)
        pids = until(lambda: working(tmp_path, 2), launcher)
        pool.kill()
        _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("error: PortableRunner failed: ")
    assert all(gone(pid) for pid in pids)


# ---- the pool


class Requests(queue.Queue[WorkerRequest]):
    """Queue of a pool that ends when `over` is set."""

    over = False

    def get(self, block: bool = True, timeout: float | None = None) -> WorkerRequest:
        if self.over:
            raise KeyboardInterrupt
        return super().get(block, timeout)

    def give(self, worker: str, job: str) -> None:
        request = WorkerRequest(worker, job, "log:1", Future())
        self.put(request)
        request.done.result(30)


@pytest.fixture
def pool_requests(monkeypatch) -> Iterator[tuple[Requests, list[subprocess.Popen[bytes]]]]:
    """Yields the request queue of a pool whose workers sleep, and the workers in the request of their start."""
    started: list[subprocess.Popen[bytes]] = []

    def start(request: WorkerRequest) -> subprocess.Popen[bytes]:
        if request.job == "none":
            raise OSError("no more processes")
        started.append(subprocess.Popen(["sleep", "60"]))
        return started[-1]

    def serve() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            worker_pool.serve(given)

    monkeypatch.setattr(worker_pool, "_start", start)
    monkeypatch.setattr(worker_pool, "LOOK_SECONDS", 0.02)
    given = Requests()
    thread = threading.Thread(target=serve)
    thread.start()
    yield given, started
    given.over = True
    thread.join(10)
    assert None not in [process.poll() for process in started]


def states(started: list[subprocess.Popen[bytes]]) -> list[int | None]:
    return [process.poll() for process in started]


def test_a_pool_ends_other_workers_of_a_broken_job(pool_requests, capfd):
    given, started = pool_requests
    for worker, job in (("a", "first:1"), ("b", "first:1"), ("c", "second:1")):
        given.give(worker, job)
    started[0].kill()
    while "was killed by SIGKILL" not in capfd.readouterr().err:
        time.sleep(0.02)
    assert states(started[1:]) == [None, None]  # the other may still be making a part
    given.give("d", "second:1")
    assert states(started[1:]) == [-signal.SIGTERM, None, None]
    given.give("c", "")
    assert states(started[2:]) == [-signal.SIGTERM, None]


def test_a_pool_reports_a_worker_that_cannot_start(pool_requests):
    given, _ = pool_requests
    with pytest.raises(OSError, match="no more processes"):
        given.give("a", "none")
    given.give("b", "some:1")


@pytest.mark.parametrize("ours", [worker_pool, job_service])
def test_a_port_in_use_is_refused(ours, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"error: port {port} is in use"):
            ours.main([f"--port={port}"])


@ON_LINUX  # where every 127.x.x.x is a loopback address
@pytest.mark.parametrize(("host", "elsewhere"), [("localhost", False), ("0.0.0.0", True)])
def test_a_pool_listens_on_its_host(host, elsewhere):
    def reached(by: str) -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection((by, int(address.split(":")[1])), timeout=5).close()
            return True
        return False

    address, server = worker_pool.listen(host, 0, queue.Queue())
    try:
        assert address.startswith(f"{host}:")
        assert (reached("127.0.0.1"), reached("127.0.0.2")) == (True, elsewhere)
    finally:
        server.stop(0)


def test_a_host_of_another_machine_is_refused(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"error: cannot listen on 192\.0\.2\.1:.* --host must be an address of"):
        worker_pool.main(["--host=192.0.2.1", "--port=0"])


def test_a_worker_refuses_to_start_by_hand():
    for arguments in ([], ["--help"], ["1", "2"]):
        with pytest.raises(SystemExit, match=r"data_pipelines\.worker_pool --help"):
            beam_worker.main(["beam_worker", *arguments])


# ---- heartbeats


def test_heartbeats_while_there_is_work(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeats, "BEAT_SECONDS", 0.05)
    folder = epath.Path(tmp_path)
    assert heartbeats.beats(folder) == frozenset()
    with heartbeats.beating(folder, "part-7"):
        seen = set()
        start = time.monotonic()
        while len(seen) < 4:  # none yet, and three beats
            seen.add(heartbeats.beats(folder))
            assert time.monotonic() - start < 30
            time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []


def test_work_continues_if_heartbeats_cannot_be_written(tmp_path):
    with heartbeats.beating(epath.Path(tmp_path) / "none", "part-7"):
        assert heartbeats.beats(epath.Path(tmp_path)) == frozenset()


class Away:
    """A folder in an unreachable bucket, which raises TensorFlow's errors, not OSErrors."""

    error = type("UnavailableError", (Exception,), {"__module__": "tensorflow.python.framework.errors_impl"})

    def __init__(self) -> None:
        self.beats, self.unlinked = 0, 0

    def __truediv__(self, name: str) -> Away:
        return self

    def write_text(self, _: str) -> None:
        self.beats += 1
        raise self.error("no connection")

    def unlink(self, missing_ok: bool) -> None:
        self.unlinked += 1
        raise self.error("no connection")


def test_heartbeats_continue_if_a_bucket_is_unreachable(monkeypatch):
    monkeypatch.setattr(heartbeats, "BEAT_SECONDS", 0.02)
    away, start = Away(), time.monotonic()
    with heartbeats.beating(away, "part-7"):
        while away.beats < 3:
            assert time.monotonic() - start < 30
            time.sleep(0.01)
    assert away.unlinked == 1


def test_a_part_is_written_before_its_heartbeat_stops(tmp_path, place, monkeypatch):
    @contextlib.contextmanager
    def beating(folder: epath.Path, name: str) -> Iterator[None]:
        yield
        assert (folder / f"{name}.npz").exists()

    monkeypatch.setattr(parts, "beating", beating)
    place.make_here(tmp_path / "u")


def test_a_launcher_reports_an_unreachable_bucket(tmp_path, place, monkeypatch):
    def away(*_: Any, **__: Any) -> None:
        raise Away.error("no connection")

    monkeypatch.setattr(extraction, "extract", away)
    with pytest.raises(SystemExit, match=r"error: a bucket cannot be reached \(no connection\): .*again to continue"):
        extraction.main(place.flags(tmp_path / "u"))


class Silent:
    """A pipeline on a cluster without heartbeats."""

    def __init__(self) -> None:
        from apache_beam.options.pipeline_options import PipelineOptions

        self.options, self.over = PipelineOptions([]), threading.Event()

    def run(self) -> Silent:
        return self

    def wait_until_finish(self) -> str:
        self.over.wait(60)
        return "CANCELLED"

    def cancel(self) -> None:
        self.over.set()


def test_a_job_without_heartbeats_is_aborted(tmp_path, monkeypatch):
    monkeypatch.setattr(run_pipeline, "POLL_SECONDS", 0.02)
    silent = Silent()
    with pytest.raises(ExtractError, match=r"no worker of Flink .*--patience.*same command again"):
        run_pipeline.run_pipeline(silent, "Flink", tmp_path, lambda: False, lambda: 0, patience=0.3)
    assert silent.over.is_set()
    assert run_pipeline.run_pipeline(Silent(), "Flink", tmp_path, lambda: True, lambda: 0, patience=0.3) == "DONE"


def test_heartbeats_extend_the_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(run_pipeline, "POLL_SECONDS", 0.02)
    living, start = Silent(), time.monotonic()
    threading.Timer(1.5, living.over.set).start()
    state = run_pipeline.run_pipeline(living, "Flink", tmp_path, lambda: False, time.monotonic, patience=0.5)
    assert (state, time.monotonic() - start > 1.4) == ("CANCELLED", True)


def test_patience_must_exceed_a_few_heartbeats(tmp_path, place):
    with pytest.raises(ExtractError, match=r"--patience=10: .* every 5 s: give 15 or more"):
        extract(TASK, {}, place.raw, tmp_path / "u", encoder="mfcc", kmeans=place.kmeans, patience=10)


# ---- options


def test_a_missing_job_service_is_reported_at_once(tmp_path):
    pipeline = build_pipeline([("job.json", 0)], "PortableRunner", options=["--job_endpoint=localhost:9"])
    with pytest.raises(
        ExtractError, match=r"--job_endpoint=localhost:9 cannot be reached .* start the job service there"
    ):
        run_pipeline.run_pipeline(pipeline, "PortableRunner", tmp_path, lambda: False, time.monotonic, 60)


def test_beams_time_limit_on_whole_jobs_is_lifted():
    def limit(*options: str) -> int:
        pipeline = build_pipeline([("job.json", 0)], "PortableRunner", options=["--job_endpoint=h:1", *options])
        return pipeline.options.get_all_options()["job_server_timeout"]

    assert limit() > 1e8
    assert limit("--job_server_timeout=7") == 7


def test_a_flag_unknown_to_beam_is_reported():
    assert unknown_options(["--flink_master=h:1", "--parallelism=3", "--paralelism=3"]) == ["paralelism"]
    assert unknown_options([]) == []


def test_an_invalid_value_of_a_beam_flag_is_named():
    with pytest.raises(ExtractError, match=r"--runner=FlinkRunner --parallelism=many: .*invalid int value: 'many'"):
        build_pipeline([("job.json", 0)], "FlinkRunner", options=["--parallelism=many"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_pool_ends_by_signals_that_its_parent_ignored(number: int, code: int):
    ignored = f"trap '' INT TERM; exec {sys.executable} -m data_pipelines.worker_pool --port=0"
    pool = subprocess.Popen(
        ["bash", "-c", ignored], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert pool.stdout is not None
        assert pool.stdout.readline().startswith("worker pool: ")
        pool.send_signal(number)
        _, errors = pool.communicate(timeout=120)
    finally:
        pool.kill()
    assert (pool.returncode, errors) == (code, "")
