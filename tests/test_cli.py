"""`spjax COMMAND`: every command under one name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from spjax import cli
from tests.test_command_line import commands

ROOT = Path(__file__).resolve().parents[1]


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spjax", *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def test_help_lists_the_commands() -> None:
    done = _run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {name} " in done.stdout for name in cli.COMMANDS)
    assert done.stdout.count("\n") < 30
    assert _run().stdout == done.stdout


def test_a_command_that_does_not_exist_is_refused() -> None:
    done = _run("predct")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no command predct: did you mean predict?\n"


@pytest.mark.parametrize("name", ["train", "leaks"])
def test_a_command_is_called_by_its_name_in_its_help(name: str) -> None:
    done = _run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: spjax {name} ")
    assert "python -m" not in done.stdout


def test_modules_of_commands_are_commands() -> None:
    modules = {module for module, _ in cli.COMMANDS.values()}
    assert modules <= {"spjax.main", *(name.removesuffix(".__main__") for name in commands())}
