"""The scripts of scripts/tpu, with a gcloud of our own: what they would run, what they run, what workers then do."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "tpu"
NAMES = sorted(path.name for path in SCRIPTS.iterdir() if path.suffix != ".sh")
WHERE = ("--name=pod", "--zone=us-west4-a", "--project=mine-1")
ASKED = ("--type=v5litepod-16", "--bucket=gs://bucket/somewhere", "--spot", "--every=0")
RUN = ("--", "--config=configs/fsc.py:backbone=pgslm", "--workdir=gs://bucket/runs/it's a $HOME run", "--config.lm=a b")

# Records its arguments, one JSON line a call, and answers as it was told to.
GCLOUD = f"""#!{sys.executable}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1:4] == ["storage", "cp", "-"]:
    (here / "stored").write_bytes(sys.stdin.buffer.read())
said, file = " ".join(sys.argv[1:]), here / "answers"
answers = json.loads(file.read_text()) if file.exists() else {{}}
for part, told in answers.items():
    if part in said:
        status, _, text = told.pop(0).partition(" ") if len(told) > 1 else told[0].partition(" ")
        file.write_text(json.dumps(answers))
        print(text)
        sys.exit(int(status))
"""


class Cloud:
    """A folder with a gcloud, first in PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "gcloud").write_text(GCLOUD)
        (folder / "gcloud").chmod(0o755)

    def answer(self, part: str, *answers: str) -> None:
        """To calls that contain `part`: "STATUS TEXT" of one after the other; the last one stays."""
        file = self.folder / "answers"
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**before, part: answers}))

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        if script in ("install", "resume") and (shutil.which("git") is None or not (ROOT / ".git").exists()):
            pytest.skip("this is no clone, or there is no git")
        environment = {**os.environ, "PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run(
            [str(SCRIPTS / script), *arguments], env=environment, cwd=self.folder, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("there is no shellcheck (the extra dev)")
    files = [path for path in (ROOT / "scripts").rglob("*") if path.is_file() and path.suffix != ".py"]
    done = subprocess.run([program, "-x", *files], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", NAMES)
def test_help_tells_every_flag_that_is_needed(cloud: Cloud, script: str) -> None:
    done = cloud.run(script, "--help")
    assert done.returncode == 0, done.stderr
    for flag in ("--name=NAME", "--zone=ZONE", "--project=ID", "--dry-run", f"scripts/tpu/{script} "):
        assert flag in done.stdout or (script == "resume" and flag == "--project=ID")
    assert cloud.calls() == []


@pytest.mark.parametrize("script", [name for name in NAMES if name != "resume"])
def test_what_is_printed_is_what_is_run(cloud: Cloud, script: str) -> None:
    cloud.answer("resources list", "0 ACTIVE")
    printed = cloud.run(script, *WHERE, *ASKED, "--dry-run", *RUN)
    assert printed.returncode == 0, printed.stderr
    assert cloud.calls() == []
    lines = subprocess.run(  # a shell reads each line back
        ["bash", "-c", f"gcloud() {{ printf '%s\\0' \"$@\"; printf '\\n\\0'; }}\n{printed.stdout}"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    expected = [call.split("\0")[:-1] for call in lines.stdout.split("\n\0")[:-1]]
    assert expected
    done = cloud.run(script, *WHERE, *ASKED, *RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == expected


def test_spot_and_on_demand(cloud: Cloud) -> None:
    asked = "gcloud compute tpus queued-resources create pod --node-id=pod --zone=us-west4-a --accelerator-type="
    flags = ("--name=pod", "--zone=us-west4-a", "--dry-run")
    one, spot = (
        shlex.split(cloud.run("create", *flags, *more).stdout.splitlines()[0])
        for more in (("--type=v5p-8",), ("--type=v6e-256", "--spot", "--account=a@b.iam"))
    )
    assert one == [*shlex.split(f"{asked}v5p-8"), "--runtime-version=v2-alpha-tpuv5"]
    assert spot[len(one) - 2 :] == [
        "--accelerator-type=v6e-256", "--runtime-version=v2-alpha-tpuv6e", "--spot", "--service-account=a@b.iam",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("create", ("--zone=us-west4-a", "--type=v5p-8"), "--name is missing"),
        ("create", ("--name=pod", "--type=v5p-8"), "--zone is missing"),
        ("create", ("--name=pod", "--zone=us-west4-a"), "--type is missing"),
        ("create", ("--name=pod", "--zone=us-west4-a", "--type=v9-8"), "no runtime is known for --type=v9-8"),
        ("create", ("--name=pod", "--zone=us-west4-a", "--type=v5p-8; rm"), "--type=v5p-8; rm is no accelerator type"),
        ("create", ("--name=Pod;", "--zone=us-west4-a", "--type=v5p-8"), "--name=Pod; must be lower-case"),
        ("create", ("--name=pod", "--zone=here", "--type=v5p-8"), "--zone=here is no zone"),
        ("create", (*WHERE, "--type=v5p-8", "--sport"), "unknown argument --sport"),
        ("create", (*WHERE, "--type=v5p-8", "--project=$(id)"), "is no project's id"),
        ("install", WHERE, "--bucket is missing"),
        ("install", (*WHERE, "--bucket=bucket"), "--bucket=bucket must be gs://BUCKET"),
        ("install", (*WHERE, "--bucket=gs://b u"), "must be gs://BUCKET"),
        ("run", WHERE, "--workdir= must be a folder on gs://"),
        ("run", (*WHERE, "--", "--workdir=runs/fsc"), "--workdir=runs/fsc must be a folder on gs://"),
        ("run", (*WHERE, "--", "--workdir=gs://bucket"), "must be a folder on gs://"),
        ("watch", (*WHERE, "--tensorboard"), "must be a folder on gs://"),
        ("resume", (*WHERE, *ASKED, "--retries=x", *RUN), "are whole numbers"),
    ],
)
def test_what_is_missing_or_odd_is_told(cloud: Cloud, script: str, arguments: tuple[str, ...], told: str) -> None:
    done = cloud.run(script, *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.startswith("error: ")
    assert cloud.calls() == []


@pytest.mark.parametrize("script", [name for name in NAMES if name != "resume"])
def test_a_gcloud_that_fails_ends_the_script(cloud: Cloud, script: str) -> None:
    cloud.answer("compute", "3 ")
    done = cloud.run(script, *WHERE, *ASKED, *RUN)
    assert done.returncode == 3
    assert len([call for call in cloud.calls() if call[0] == "compute"]) == 1


def test_capacity_that_is_refused_is_told(cloud: Cloud) -> None:
    cloud.answer("resources list", "0 WAITING_FOR_RESOURCES", "0 PROVISIONING", "0 FAILED")
    done = cloud.run("create", *WHERE, *ASKED)
    assert done.returncode == 2
    assert "pod was not given" in done.stderr
    assert len(cloud.calls()) == 4


def _on_worker(home: Path, command: str, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], env={"HOME": str(home), "PATH": path}, cwd=home, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip


@pytest.fixture
def worker(cloud: Cloud, tmp_path: Path) -> tuple[Path, str]:
    """A home directory with ~/spjax, whose Python writes down its arguments and ends with 7 on SIGTERM, and a PATH."""
    home = tmp_path / "home"
    (home / "spjax" / ".venv" / "bin").mkdir(parents=True)
    python = home / "spjax" / ".venv" / "bin" / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "open('arguments', 'w').write(json.dumps([os.getpid(), *sys.argv[1:]]))\n"
        "time.sleep(60 if os.path.exists('stay') else 0)\n"
    )
    python.chmod(0o755)
    for program, does in (("hostname", "echo t1v-n-0-w-0"), ("pgrep", "exit 1")):  # whatever else runs here
        (cloud.folder / program).write_text(f"#!/bin/sh\n{does}\n")
        (cloud.folder / program).chmod(0o755)
    return home, f"{cloud.folder}{os.pathsep}{os.environ['PATH']}"


def _until(file: Path) -> str:
    for _ in range(600):
        if file.exists() and (text := file.read_text()):
            return text
        time.sleep(0.05)
    pytest.fail(f"{file} never came")


@pytest.mark.parametrize("stay", [False, True])
def test_workers_run_the_very_flags_and_tell_how_it_ended(cloud: Cloud, worker: tuple[Path, str], stay: bool) -> None:
    home, path = worker
    if stay:
        (home / "spjax" / "stay").touch()
    assert cloud.run("run", *WHERE, *RUN).returncode == 0
    assert _until(cloud.folder / "stored") == "running\n"
    (cloud.folder / "stored").unlink()
    command = cloud.calls()[-1][-1].removeprefix("--command=")
    done = _on_worker(home, command, path)
    assert done.returncode == 0, done.stderr
    number, *flags = json.loads(_until(home / "spjax" / "arguments"))
    assert flags == ["-m", "spjax.main", "--coordinator=auto", *RUN[1:]]
    if stay:
        os.kill(number, signal.SIGTERM)
    assert _until(cloud.folder / "stored") == ("7\n" if stay else "0\n")
    assert cloud.calls()[-1] == ["storage", "cp", "-", f"{RUN[2].removeprefix('--workdir=')}/exit_status"]


def test_a_run_is_not_begun_over_the_status_of_the_last(cloud: Cloud) -> None:
    cloud.answer("storage cp", "3 ")
    assert cloud.run("run", *WHERE, *RUN).returncode == 3
    assert [_what(call) for call in cloud.calls()] == ["ssh", "begin"]


def test_install_changes_nothing_while_one_worker_is_busy(cloud: Cloud) -> None:
    cloud.answer("a run is going on", "1 ")
    assert cloud.run("install", *WHERE, *ASKED).returncode == 1
    assert "rm -rf" not in str(cloud.calls())


def test_install_brings_the_commit(cloud: Cloud, worker: tuple[Path, str]) -> None:
    home, path = worker
    assert cloud.run("install", *WHERE, *ASKED).returncode == 0
    archive = (cloud.folder / "stored").read_bytes()
    (cloud.folder / "gcloud").write_text(f"#!/bin/sh\ncat {cloud.folder}/stored\n")
    (cloud.folder / "python3").write_text(f'#!/bin/sh\necho "$@" >>{cloud.folder}/installed\n')
    (cloud.folder / "python3").chmod(0o755)
    command = cloud.calls()[-1][-1].removeprefix("--command=")
    for _ in range(2):  # and again, over what is there
        done = _on_worker(home, command, path)
        assert done.returncode == 0, done.stderr
    assert len(archive) > 10_000
    assert (home / "spjax" / "spjax" / "main.py").is_file()
    assert (home / "spjax" / ".venv" / "bin" / "python").is_file(), "the environment is kept"
    assert not (home / "spjax.new").exists()
    installed = (cloud.folder / "installed").read_text()
    assert installed.count("-r requirements.txt jax[tpu]") == 2


# ---- resume


def _what(call: list[str]) -> str:
    begin = call[:2] == ["storage", "cp"] and call[-1].endswith("/exit_status")
    return call[3] if call[0] == "compute" else "begin" if begin else call[1]


def test_resume_prints_a_round(cloud: Cloud) -> None:
    done = cloud.run("resume", *WHERE, *ASKED, "--dry-run", *RUN)
    assert done.returncode == 0, done.stderr
    calls = [line.split()[:5] for line in done.stdout.splitlines() if line.startswith("gcloud")]
    assert [call[2] if call[1] == "storage" else call[4] for call in calls] == [
        "cat", "list", "delete", "create", "list", "ssh", "cp", "ssh", "ssh", "cp", "ssh"
    ]  # fmt: skip
    assert cloud.calls() == []


def test_resume_ends_where_the_run_has_ended_well(cloud: Cloud) -> None:
    cloud.answer("storage cat gs://bucket/runs", "0 0")
    done = cloud.run("resume", *WHERE, *ASKED, *RUN)
    assert done.returncode == 0, done.stderr
    assert "finished: gs://bucket/runs/it's a $HOME run" in done.stdout
    assert len(cloud.calls()) == 1


def test_resume_begins_with_nothing_and_goes_on_after_a_preemption(cloud: Cloud) -> None:
    # No TPU yet; asked for; taken away while it runs; asked for again; finished.
    cloud.answer("storage cat gs://bucket/runs", "1 ", "1 ", "1 ", "1 ", "0 0")
    cloud.answer(
        "resources list", "0 ", "0 ACTIVE", "0 ACTIVE", "0 SUSPENDED", "0 PROVISIONING", "0 ACTIVE", "0 ACTIVE"
    )
    cloud.answer("echo 'a run is going on", "0 ")  # asked before it is begun
    cloud.answer("pgrep -f '[s]pjax", "1 ")  # asked alone, by resume: whether it runs
    done = cloud.run("resume", *WHERE, *ASKED, *RUN)
    assert done.returncode == 0, done.stderr
    did = [_what(call) for call in cloud.calls() if _what(call) in ("create", "delete", "cp", "begin")]
    assert did == ["delete", "create", "cp", "begin", "delete", "create", "cp", "begin"]


def test_resume_takes_silence_for_no_preemption(cloud: Cloud) -> None:
    cloud.answer("storage cat gs://bucket/runs", "1 ", "1 ", "0 0")
    cloud.answer("resources list", "0 ACTIVE", "1 ", "0 ACTIVE")
    cloud.answer("pgrep -f '[s]pjax", "0 ")
    done = cloud.run("resume", *WHERE, *ASKED, *RUN)
    assert done.returncode == 0, done.stderr
    assert "gcloud does not answer: looking again" in done.stderr
    assert "delete" not in [_what(call) for call in cloud.calls()]


def test_resume_ends_where_gcloud_never_answered(cloud: Cloud) -> None:
    cloud.answer("storage cat gs://bucket/runs", "1 ")
    cloud.answer("resources list", "1 ")
    done = cloud.run("resume", *WHERE, *ASKED, *RUN)
    assert done.returncode == 2
    assert "gcloud does not answer, as it says above" in done.stderr


def test_the_workers_find_each_other(cloud: Cloud) -> None:
    done = cloud.run("run", *WHERE, *RUN, "--coordinator=here:1")
    assert done.returncode == 2
    assert "--coordinator=here:1: the workers find each other, leave it out" in done.stderr
    assert not cloud.calls()


def test_resume_gives_up_on_a_run_that_fails_again_and_again(cloud: Cloud) -> None:
    cloud.answer("storage cat gs://bucket/runs", "0 1")
    cloud.answer("resources list", "0 ACTIVE")
    done = cloud.run("resume", *WHERE, *ASKED, "--retries=2", *RUN)
    assert done.returncode == 2
    assert "the run ended with status 1 for the last time" in done.stderr
    assert [_what(call) for call in cloud.calls()].count("begin") == 3


def test_resume_counts_no_stop_as_a_failure(cloud: Cloud) -> None:
    cloud.answer("storage cat gs://bucket/runs", *["0 143"] * 9, "0 0")  # once, then looked at twice each
    cloud.answer("resources list", "0 ACTIVE")
    done = cloud.run("resume", *WHERE, *ASKED, "--retries=0", *RUN)
    assert done.returncode == 0, done.stderr
    assert [_what(call) for call in cloud.calls()].count("begin") == 5


@pytest.mark.parametrize("said", ["1 ", "0 running"])
def test_resume_gives_up_on_runs_that_end_without_a_word(cloud: Cloud, said: str) -> None:
    cloud.answer("storage cat gs://bucket/runs", said)
    cloud.answer("resources list", "0 ACTIVE")
    cloud.answer("echo 'a run is going on", "0 ")
    cloud.answer("pgrep -f '[s]pjax", "1 ")
    done = cloud.run("resume", *WHERE, *ASKED, "--retries=2", *RUN)
    assert done.returncode == 2
    assert "the run ended with no word for the last time" in done.stderr
    assert [_what(call) for call in cloud.calls()].count("begin") == 3


def test_resume_gives_up_on_a_stopped_run_that_cannot_be_started(cloud: Cloud) -> None:
    cloud.answer("storage cat gs://bucket/runs", "0 143")
    cloud.answer("resources list", "0 ACTIVE")
    cloud.answer("a run is going on", "1 ")
    done = cloud.run("resume", *WHERE, *ASKED, "--retries=2", *RUN)
    assert done.returncode == 2
    assert [_what(call) for call in cloud.calls()].count("ssh") == 3


def test_resume_counts_no_preemption_as_a_failure(cloud: Cloud) -> None:
    # Whose sign may be an error of the workers that are left.
    cloud.answer("storage cat gs://bucket/runs", *["0 1"] * 4, "0 0")
    cloud.answer("resources list", "0 ACTIVE", "0 SUSPENDED", "0 ACTIVE", "0 SUSPENDED", "0 ACTIVE")
    done = cloud.run("resume", *WHERE, *ASKED, "--retries=0", *RUN)
    assert done.returncode == 0, done.stderr
    assert [_what(call) for call in cloud.calls()].count("delete") == 2


def test_resume_waits_for_how_a_run_ended(cloud: Cloud) -> None:
    cloud.answer("storage cat gs://bucket/runs", "1 ", "0 running", "0 0")
    cloud.answer("resources list", "0 ACTIVE")
    cloud.answer("echo 'a run is going on", "0 ")
    cloud.answer("pgrep -f '[s]pjax", "1 ")
    done = cloud.run("resume", *WHERE, *ASKED, "--retries=0", *RUN)
    assert done.returncode == 0, done.stderr
    assert [_what(call) for call in cloud.calls()].count("begin") == 1


def test_resume_counts_no_look_that_failed(cloud: Cloud) -> None:
    cloud.answer("storage cat gs://bucket/runs", *["0 running"] * 6, "0 0")
    cloud.answer("resources list", "0 ACTIVE")
    cloud.answer("echo 'a run is going on", "0 ")
    cloud.answer("pgrep -f '[s]pjax", "1 ", "255 ", "0 ")  # not begun; then a connection that breaks
    done = cloud.run("resume", *WHERE, *ASKED, "--retries=0", *RUN)
    assert done.returncode == 0, done.stderr
    assert [_what(call) for call in cloud.calls()].count("begin") == 1


# ---- the runbook


def _documented() -> list[list[str]]:
    text = (ROOT / "docs" / "cloud_tpu.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    found = [shlex.split(line) for line in blocks.splitlines() if line.startswith("scripts/tpu/")]
    return found + [shlex.split(line) for line in re.findall(r"`(scripts/tpu/\w+ --[^`.]+)`", text)]


@pytest.mark.parametrize("words", _documented(), ids=lambda words: Path(words[0]).name)
def test_what_the_runbook_says_can_be_run(cloud: Cloud, words: list[str]) -> None:
    meant = {"NAME": "pod", "ZONE": "us-west4-a"}
    script, *flags = (word.replace("gs://BUCKET", "gs://bucket") for word in words)
    flags = [f"{flag}={meant.get(value, value)}" if equals else flag for flag, equals, value in map(_cut, flags)]
    done = cloud.run(Path(script).name, "--dry-run", *flags)
    assert done.returncode == 0, done.stderr
    assert "gcloud" in done.stdout


def _cut(flag: str) -> tuple[str, str, str]:
    return flag.partition("=")


def test_the_runbook_shows_every_script() -> None:
    assert {Path(words[0]).name for words in _documented()} == set(NAMES)


def test_runs_of_the_runbook_have_flags_that_there_are() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "spjax.main", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    from configs import fsc

    config = fsc.get_config()
    runs = [words[words.index("--") + 1 :] for words in _documented() if "--" in words]
    for flag in {word.split("=")[0].removeprefix("--") for words in runs for word in words}:
        if flag.startswith("config."):
            assert flag.removeprefix("config.") in config
        else:
            assert f"  --{flag}=" in told.stdout
