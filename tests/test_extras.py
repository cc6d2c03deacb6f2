"""Where a package of an extra is missing, the message names the extra, in Python and on the command line."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import pytest

from data_pipelines import espeak
from data_pipelines.make_parts import build_pipeline
from spjax.data import records
from spjax.extras import MissingExtraError, require
from spjax.serving import frozen

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [
        ("apache_beam", "data", lambda: build_pipeline([], "DirectRunner")),
        ("espeakng_loader", "demo", espeak.data_path),
        ("qwix", "quant", lambda: frozen.quantize({"layers": {"up": {"kernel": jnp.ones((1, 2, 2))}}}, "int8")),
        ("tensorflow_datasets.proto", "data", lambda: records._read_shard(ROOT, None, None, True)),
    ],
)
def test_the_extra_of_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, module: str, extra: str, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"needs the extra {extra} .*'spjax\[{extra}\]'"):
        call()
    assert extra in EXTRAS


def test_it_is_named_before_long_work(monkeypatch: pytest.MonkeyPatch):
    require("data", "writing unit records", "tensorflow_datasets")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(MissingExtraError, match=r"writing unit records needs the extra data .No module named 'tensorf"):
        require("data", "writing unit records", "tensorflow_datasets")


def test_a_command_says_so_without_a_traceback(tmp_path: Path):
    (tmp_path / "lacking.py").write_text(
        "from spjax.extras import needs\n\n"
        "def main():\n    with needs('quant', 'this'):\n        import nothing_of_that_name\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from spjax import process; process.run('lacking')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: this needs the extra quant (No module named 'nothing_of_that_name'): python -m pip install "
        "'spjax[quant]', or '.[quant]' in a checkout\n"
    )
