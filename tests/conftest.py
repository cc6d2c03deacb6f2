"""Fixtures shared by every test: reference material (skipped where absent), a toy world, and whole processes in it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import shapes

shapes.install()  # before the first import of the modules that it checks

# PyTorch's CUDA build brings triton, whose LLVM crashes a process that has TensorFlow's or JAX's. No test needs it.
sys.modules["triton"] = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
# What differs between two logs of the same run.
PACE = ("time", "utt_s", "step_s", "step_bytes", "peak_share", "input_wait")

# The first example of a property often pays for a compilation, and the machine may be busy.
hypothesis.settings.register_profile("spjax", deadline=None)
hypothesis.settings.load_profile("spjax")


def _folder(*parts: str) -> Path:
    folder = SHARED.joinpath(*parts)
    if not folder.exists():
        pytest.skip(f"reference material {'/'.join(parts)} is not beside this checkout (../shared)")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of golden vectors produced by the original code."""
    return _folder("golden")


@pytest.fixture(scope="session")
def unit_text() -> Path:
    """Folder with the real HuBERT-100 units of fsc and gsc."""
    return _folder("units", "hubert100")


@dataclasses.dataclass(frozen=True)
class Place:
    """A directory to run `python -m spjax.main` in, as a process of its own.

    Attributes:
      folder: where it runs; holds `units` (toy unit text).
      cache: compiled programs, shared by all processes of a test session.
    """

    folder: Path
    cache: Path

    def start(self, config: str, *flags: str, devices: int = 1, limits: str = "true") -> subprocess.Popen[str]:
        """Start a process; `config` is a file of configs/, `limits` a shell command to run first (ulimit).

        Its standard error comes with its output.
        """
        command = [sys.executable, "-m", "spjax.main", f"--config={ROOT / 'configs' / config}.py", *flags]
        command = ["bash", "-c", f'{limits} && exec "$@"', "spjax", *command, f"--compilation_cache={self.cache}"]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            # Quick compilation: tiny programs run in no time anyhow.
            "XLA_FLAGS": f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}",
        }
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, config: str, *flags: str, devices: int = 1) -> tuple[int, str]:
        """Exit code and everything that was printed."""
        return finish(self.start(config, *flags, devices=devices))


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str]:
    """Exit code and output of a process; one that does not end is killed and fails the test."""
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"still running after {timeout} s: {process.communicate()[0][-2000:]}")
    return process.returncode, printed


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of compiled programs."""
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def quick_compile(cache: Path) -> Iterator[None]:
    """Compile in haste, and what was compiled before not at all: tests of logic spend most of their time there."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {"jax_disable_most_optimizations": True, "jax_persistent_cache_min_compile_time_secs": 0.1}
    settings["jax_compilation_cache_dir"] = str(cache)
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Place:
    """A place with toy unit text under `units`, its records under `runs/units`, a tiny random unit LM under `lm`."""
    from data_pipelines.import_units import import_units
    from spjax.io.unit_lms import save_unit_lm
    from tests import toy

    folder = tmp_path_factory.mktemp("place")
    toy.write_text(folder / "units")
    for task in ("fsc", "gsc"):
        import_units(task, folder / "units" / task, folder / "runs" / "units" / task)
    save_unit_lm(folder / "lm", toy.LM, toy.tiny_lm(seed=7))
    return Place(folder, cache)


@pytest.fixture(scope="session")
def finished_run(place: Place) -> Path:
    """Work directory of a small fsc run that nothing disturbed (toy.SMALL)."""
    from tests import toy

    code, printed = place.run("fsc", "--workdir=runs/undisturbed", *toy.SMALL)
    assert code == 0, printed[-3000:]
    return place.folder / "runs" / "undisturbed"
