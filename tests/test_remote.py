"""Everything on gs://, in processes that ask Cloud Storage by its own names: what comes out, and what is told."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spjax.io import KMeans, save_kmeans
from tests import toy
from tests.conftest import ROOT, Place, finish
from tests.io import gcs_server
from tests.io.gcs_server import Bucket

RUN = "runs/fsc"
FLAGS = ("--config.lm=gs://spjax-tests/lm", "--config.data=gs://spjax-tests/units/fsc")


@dataclasses.dataclass(frozen=True)
class Remote:
    """A bucket with records, unit text and an LM, and an empty directory to run in.

    Attributes:
      bucket: holds `units`, `unit_text` and `lm`.
      folder: where processes run; they have no business there.
      cache: of compiled programs.
    """

    bucket: Bucket
    folder: Path
    cache: Path

    def start(self, module: str, *flags: str, **environment: str) -> subprocess.Popen[str]:
        """A process; its standard error comes with its output."""
        told = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **self.bucket.environment, **environment}
        told["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
        command = [sys.executable, "-m", module, *flags]
        return subprocess.Popen(
            command, cwd=self.folder, env=told, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def train(self, *flags: str, workdir: str = RUN) -> subprocess.Popen[str]:
        """Prompt tuning of seconds, everything on the bucket."""
        config = f"--config={ROOT / 'configs' / 'fsc.py'}"
        small = (flag for flag in toy.SMALL if flag != "--config.lm=lm")
        own = (f"--workdir=gs://spjax-tests/{workdir}", f"--compilation_cache={self.cache}")
        return self.start("spjax.main", config, *small, *FLAGS, *own, *flags)


@pytest.fixture
def remote(place: Place, tmp_path: Path) -> Iterator[Remote]:
    (tmp_path / "here").mkdir()
    with gcs_server.running(tmp_path) as bucket:
        bucket.put_tree(place.folder / "lm", "lm")
        bucket.put_tree(place.folder / "runs" / "units", "units")
        bucket.put_tree(place.folder / "units", "unit_text")
        yield Remote(bucket, tmp_path / "here", place.cache)


def _when(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Wait for something while a process runs."""
    end = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < end
        time.sleep(0.05)


def _json(content: bytes) -> dict[str, Any]:
    return {
        name: value for name, value in json.loads(content).items() if name not in ("command", "provenance", "config")
    }


def _assert_same(bucket: Bucket, expected: Path, workdir: str = RUN) -> None:
    """Scores, prompts and probabilities, bit for bit."""
    assert _json(bucket.objects[f"{workdir}/results.json"]) == _json((expected / "results.json").read_bytes())
    for seed in (0, 1):
        pack, said = f"packs/seed_{seed}/prompt.safetensors", f"predictions/seed_{seed}.jsonl.gz"
        assert bucket.objects[f"{workdir}/{pack}"] == (expected / pack).read_bytes()
        assert gzip.decompress(bucket.objects[f"{workdir}/{said}"]) == gzip.decompress((expected / said).read_bytes())


def _losses(lines: str) -> dict[int, Any]:
    return {line["step"]: line["train/loss"] for line in map(json.loads, lines.splitlines()) if "train/loss" in line}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_in_a_bucket_is_stopped_and_ends_as_one_that_nobody_stopped_here(
    remote: Remote, finished_run: Path
) -> None:
    bucket = remote.bucket
    process = remote.train()
    _when(process, lambda: any(re.match(rf"{RUN}/checkpoints/\d+/", name) for name in list(bucket.objects)))
    process.send_signal(signal.SIGTERM)
    code, printed = finish(process)
    assert code == 128 + signal.SIGTERM, printed[-3000:]
    assert "saved; the same command continues" in printed
    assert any(name.endswith("commit_success.txt") for name in bucket.objects)
    logged = bucket.objects[f"{RUN}/log.jsonl"].decode()
    assert logged.count("\n") >= 1

    code, printed = finish(remote.train())
    assert code == 0, printed[-3000:]
    assert "continuing from epoch" in printed
    _assert_same(bucket, finished_run)
    here, there = (
        _losses((finished_run / "log.jsonl").read_text()),
        _losses(bucket.objects[f"{RUN}/log.jsonl"].decode()),
    )
    assert max(there) == max(here)
    events = [content for name, content in bucket.objects.items() if name.startswith(f"{RUN}/tensorboard/events")]
    assert len(events) == 2
    assert all(len(content) > 500 for content in events)
    assert {name for name in bucket.objects if "/plots/" in name and name.endswith(".png")}
    assert not list(remote.folder.iterdir()), "something was written on this machine"


@pytest.mark.slow
def test_killed_in_a_checkpoint_it_goes_on_from_the_one_before(remote: Remote, finished_run: Path) -> None:
    bucket = remote.bucket

    def half() -> bool:
        names = [
            name.removeprefix(f"{RUN}/checkpoints/").split("/")
            for name in list(bucket.objects)
            if "/checkpoints/" in name
        ]
        done = {parts[0] for parts in names if parts[1:] == ["commit_success.txt"]}
        return bool(done) and bool({parts[0] for parts in names if len(parts) > 2} - done)

    process = remote.train()
    _when(process, half)
    process.kill()
    finish(process)
    left = dict(bucket.objects)
    code, printed = finish(remote.train())
    assert code == 0, printed[-3000:]
    assert "continuing from epoch" in printed
    _assert_same(bucket, finished_run)
    steps = {name.split("/")[3] for name in bucket.objects if re.match(rf"{RUN}/checkpoints/\d+/.", name)}
    assert len(steps) == 1, "only the last one is kept"
    assert any("/checkpoints/" in name for name in left.keys() - bucket.objects.keys())


@pytest.mark.slow
def test_a_bucket_that_is_away_for_seconds_disturbs_nothing(remote: Remote, finished_run: Path) -> None:
    bucket = remote.bucket
    process = remote.train()
    _when(process, lambda: any(name.endswith("commit_success.txt") for name in list(bucket.objects)))
    bucket.status = 503
    time.sleep(3)
    bucket.status = None
    code, printed = finish(process)
    assert code == 0, printed[-3000:]
    _assert_same(bucket, finished_run)


@pytest.mark.distributed
def test_packs_and_records_of_a_bucket_are_answered(remote: Remote, finished_run: Path) -> None:
    bucket = remote.bucket
    bucket.put_tree(finished_run, RUN)
    bucket.put(f"{RUN}/packs/", b"")  # as TensorFlow's file system marks a folder
    code, printed = finish(
        remote.start(
            "spjax.predict", "--lm=gs://spjax-tests/lm", f"--packs=gs://spjax-tests/{RUN}", "--json",
            "--data=gs://spjax-tests/units/fsc", f"--compilation-cache={remote.cache}",
        )
    )  # fmt: skip
    assert code == 0, printed[-3000:]
    answers = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    results = json.loads((finished_run / "results.json").read_text())
    assert [one["value"] for one in answers] == pytest.approx(results["headline"]["values"], abs=1e-9)
    assert not list(remote.folder.iterdir())


TRIES = """
import sys
from spjax.io import banks, load_kmeans, places, unit_lms

def tell(what, attempt, *arguments):
    try:
        print(what, "|", attempt(*arguments), flush=True)
    except (OSError, ValueError) as error:
        print(what, "|", error, flush=True)

tell("check", places.check_buckets, ["gs://spjax-tests/a", "gs://spjax-tests/b", 3, None, "runs/here"])
tell("bucket", places.check_buckets, ["gs://nobodys-bucket/run"])
tell("scheme", places.check_buckets, ["s3://bucket/run"])
tell("lm", lambda: unit_lms.read_unit_lm("gs://spjax-tests/lm")[2]["hash"])
tell("kmeans", lambda: load_kmeans("gs://spjax-tests/kmeans").id)
tell("no lm", unit_lms.read_unit_lm, "gs://spjax-tests/nowhere")
tell("packs", lambda: list(banks.load_packs("mine=gs://spjax-tests/runs/fsc/packs/seed_0")))
tell("no packs", banks.load_packs, "gs://spjax-tests/units")
"""


def _told(remote: Remote, **environment: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", TRIES], cwd=remote.folder, capture_output=True, text=True, timeout=200, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **remote.bucket.environment, **environment},
    )  # fmt: skip
    return dict(line.split(" | ", 1) for line in done.stdout.splitlines())


def test_what_a_bucket_holds_and_lacks_is_told(remote: Remote, finished_run: Path, tmp_path: Path) -> None:
    kmeans = KMeans(np.eye(4, dtype=np.float32), {"encoder": "mfcc"})
    save_kmeans(tmp_path / "kmeans", kmeans)
    remote.bucket.put_tree(tmp_path / "kmeans", "kmeans")
    remote.bucket.put_tree(finished_run, RUN)
    told = _told(remote)
    assert told["kmeans"] == kmeans.id
    assert told["check"] == "None"
    assert "there is no bucket gs://nobodys-bucket: check its name, or create it with gcloud storage" in told["bucket"]
    assert "s3://bucket is not a Cloud Storage bucket" in told["scheme"]
    assert told["lm"] == json.loads(remote.bucket.objects["lm/config.json"])["hash"]
    assert "gs://spjax-tests/nowhere/config.json does not exist" in told["no lm"]
    assert told["packs"] == "['mine']"
    assert "gs://spjax-tests/units is not a prompt pack, a bank" in told["no packs"]


def test_who_is_refused_is_told_what_to_do(remote: Remote) -> None:
    told = _told(remote, GOOGLE_APPLICATION_CREDENTIALS="")
    for what in ("check", "lm", "packs"):
        assert "a bucket refuses access (" in told[what]
        assert "gs://spjax-tests" in told[what] or what == "check"
        assert "roles/storage.objectUser" in told[what]
        assert "gcloud auth application-default login" in told[what]


@pytest.mark.slow
def test_a_run_without_its_bucket_ends_before_anything_is_made(remote: Remote) -> None:
    code, printed = finish(remote.train("--config.lm=gs://nobodys-bucket/lm"))
    assert code == 1
    assert printed.strip().splitlines()[-1].startswith("error: there is no bucket gs://nobodys-bucket")
    assert not [name for name in remote.bucket.objects if name.startswith("runs/")]
    assert not list(remote.folder.iterdir())


@pytest.mark.slow
def test_records_and_an_lm_of_a_bucket_are_made_where_they_are_absent(remote: Remote) -> None:
    """From unit text on gs:// to a score; the half of an import that was cut off is no records."""
    bucket = remote.bucket
    for name in [name for name in bucket.objects if name.startswith(("units/", "lm/"))]:
        del bucket.objects[name]
    bucket.put("ulm/lm/model.safetensors", b"half of it")
    small = {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 64}
    flags = [f"--config.pretraining.lm.{name}={value}" for name, value in small.items()]
    flags += ["--config.pretraining.tasks=('fsc',)", "--config.pretraining.data=gs://spjax-tests/units"]
    flags += ["--config.pretraining.pretrain.epochs=1", "--config.train.epochs=1", "--units=gs://spjax-tests/unit_text"]
    code, printed = finish(remote.train(*flags, "--config.lm=gs://spjax-tests/ulm/lm"))
    assert code == 0, printed[-3000:]
    assert "unit LM: gs://spjax-tests/ulm/lm; valid perplexity fsc" in printed
    assert {"ulm/lm/config.json", "ulm/lm/model.safetensors", "units/fsc/unit_card.json", f"{RUN}/results.json"} <= set(
        bucket.objects
    )
    assert not list(remote.folder.iterdir())


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_a_bucket(remote: Remote, finished_run: Path) -> None:
    """Stopped and continued; the second sees in the bucket what the first one made."""
    bucket = remote.bucket

    def two() -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            where = f"--coordinator=localhost:{free.getsockname()[1]}"
        own = ("--units=gs://spjax-tests/unit_text", "--config.data=gs://spjax-tests/made/fsc", where, "--processes=2")
        return [remote.train(*own, f"--process_id={number}") for number in range(2)]

    processes = two()
    _when(processes[0], lambda: any(re.match(rf"{RUN}/checkpoints/\d+/", name) for name in list(bucket.objects)))
    processes[1].send_signal(signal.SIGTERM)
    ends = [finish(process) for process in processes]
    assert [code for code, _ in ends] == [143, 143], [printed[-2000:] for _, printed in ends]
    ends = [finish(process) for process in two()]
    assert [code for code, _ in ends] == [0, 0], [printed[-2000:] for _, printed in ends]
    assert "continuing from epoch" in ends[0][1] + ends[1][1]
    ours, theirs = (
        json.loads(bucket.objects[f"{RUN}/results.json"]),
        json.loads((finished_run / "results.json").read_text()),
    )
    for one, other in zip(ours["members"], theirs["members"], strict=True):
        curves = [[point["train_loss"] for point in member["curve"]] for member in (one, other)]
        assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert not list(remote.folder.iterdir())


@pytest.mark.slow
def test_speech_is_not_made_in_a_bucket(remote: Remote) -> None:
    config = f"--config={ROOT / 'configs' / 'demo.py'}"
    code, printed = finish(remote.start("spjax.main", config, "--workdir=gs://spjax-tests/demo"))
    assert code == 1
    assert "--workdir=gs://spjax-tests/demo is in a bucket, but speech is synthesised locally" in printed
    assert not list(remote.folder.iterdir())
