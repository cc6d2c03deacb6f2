"""The locks hold what pyproject.toml asks for, once, with hashes, for every supported Python."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUN = ("data", "demo", "quant", "serve")  # the extras of the README's commands
LOCKS = {"requirements.lock": RUN, "requirements-dev.lock": (*RUN, "dev")}


def asked(extras: tuple[str, ...]) -> list[str]:
    """The requirements of the package with these extras, without the extras that the extra dev names."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [line for line in lines if not line.startswith("spjax[")]


def locked(name: str) -> list[tuple[Requirement, list[str]]]:
    """Every pin of a lock, and its hashes."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return [
        (Requirement(line.partition("--hash=")[0]), re.findall(r"--hash=sha256:[0-9a-f]{64}", line)) for line in lines
    ]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_pins_all_that_is_asked_for_once(lock: str, python: str):
    here = {"python_version": python, "python_full_version": f"{python}.1"}
    pins: dict[str, str] = {}
    for pin, hashes in locked(lock):
        assert hashes, f"{lock}: {pin} has no hash"
        if pin.marker is None or pin.marker.evaluate(here):
            assert canonicalize_name(pin.name) not in pins, f"{lock}: {pin.name} is pinned twice"
            (exact,) = pin.specifier
            assert exact.operator == "=="
            pins[canonicalize_name(pin.name)] = exact.version
    for requirement in map(Requirement, asked(LOCKS[lock])):
        if requirement.marker is None or requirement.marker.evaluate(here):
            version = pins.get(canonicalize_name(requirement.name), "none")
            assert version in requirement.specifier, f"pyproject.toml has {requirement}, {lock} {version}: scripts/lock"


def test_requirements_are_those_of_pyproject():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines[1:] == asked(RUN), "run scripts/lock"
    assert PROJECT["optional-dependencies"]["dev"][0] == f"spjax[{','.join(RUN)}]"


def test_both_locks_pin_the_same_versions():
    runtime, tests = ({f"{pin.name}{pin.specifier}" for pin, _ in locked(lock)} for lock in LOCKS)
    assert runtime <= tests, sorted(runtime - tests)


def test_the_lock_of_the_site_pins_what_it_needs():
    pins = {canonicalize_name(pin.name): (pin, hashes) for pin, hashes in locked("requirements-docs.lock")}
    assert all(hashes for _, hashes in pins.values())
    for line in (ROOT / "requirements-docs.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            wanted = Requirement(line)
            (exact,) = pins[canonicalize_name(wanted.name)][0].specifier
            assert exact.version in wanted.specifier
