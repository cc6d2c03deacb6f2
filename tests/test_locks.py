"""The locks hold what requirements*.txt ask for, once, with hashes, for every supported Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {
    "requirements.lock": ("requirements.txt", "requirements-demo.txt"),
    "requirements-dev.lock": ("requirements.txt", "requirements-demo.txt", "requirements-dev.txt"),
}


def asked(name: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


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
    for file in LOCKS[lock]:
        for requirement in asked(file):
            if requirement.marker is None or requirement.marker.evaluate(here):
                version = pins.get(canonicalize_name(requirement.name), "none")
                assert version in requirement.specifier, f"{file} asks for {requirement}, {lock} has {version}"


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
