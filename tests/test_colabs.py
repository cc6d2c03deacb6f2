"""The notebooks: their form; and each executed from first to last cell, with no network but this machine's own.

Nothing in a notebook is edited to run it: what a reader would set in its settings cell is set in the environment, and
what a reader would upload (a zip, published checkpoints, the unpacked data set) is made here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
from packaging.requirements import Requirement

from tests import toy
from tests.data_pipelines import corpus
from tests.io import gcs_server, hub_server

ROOT = Path(__file__).resolve().parents[1]
COLABS = ROOT / "colabs"
LOOKS = {"listen", "look", "recording", "speed"}  # cells that show what the one above them made
NAMES = ("quick_start", "own_data", "fsc_published_weights", "cloud_tpu")
# Small enough for a minute: settings of spjax.main, as a reader would give them.
TRAIN = '--config.train.epochs=2 --config.train.buckets=1 --config.train.max_rows=8 --config.train.seeds="(0,1)"'
SMALL_LM = (
    "--config.pretraining.lm.dim=32 --config.pretraining.lm.layers=2 --config.pretraining.lm.ffn_dim=64 "
    "--config.pretraining.pretrain.epochs=1"
)

GUARD = '''
"""Python's start-up hook of a notebook's kernel and of all that it starts: no connection leaves this machine."""
import errno
import os
import sys

HERE = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", "", None}


def _guard(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        asked = args[1][0] if isinstance(args[1], tuple) else None  # a path: a socket of this machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        asked = args[0]
    else:
        return
    asked = asked.decode() if isinstance(asked, bytes) else asked
    if asked not in HERE:
        with open(os.environ["SPJAX_TEST_ASKED"], "a") as log:
            log.write(f"{event} {args[:2]}\\n")
        raise OSError(errno.ENETUNREACH, f"the network is off: {asked}")


sys.addaudithook(_guard)
'''

STRICT = '''
"""IPython's start-up file: a command that fails ends the notebook, as it would not by itself."""
shell = get_ipython()
plain = shell.system


def strict(command):
    plain(command)
    if shell.user_ns["_exit_code"]:
        raise RuntimeError(f"status {shell.user_ns['_exit_code']}: {command}")


shell.system = strict
'''


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(COLABS / f"{name}.ipynb", as_version=4)


def repository() -> str:
    """owner/name, which pyproject.toml decides."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    return urls["Repository"].removeprefix("https://github.com/")


def source(notebook: nbformat.NotebookNode, kind: str) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == kind)


# ---- form


def test_every_notebook_is_known_here_and_to_the_readmes():
    assert sorted(path.stem for path in COLABS.glob("*.ipynb")) == sorted(NAMES)
    for name in NAMES:
        assert f"({name}.ipynb)" in (COLABS / "README.md").read_text()
        assert f"colabs/{name}.ipynb" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_form(name: str):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), f"{cell.id}: clear the outputs"
            assert len(cell.source.splitlines()) <= 32, f"{cell.id}: more than a step"
    ids = [cell.id for cell in notebook.cells]
    assert ids[0] == "title"
    assert [cell.id for cell in notebook.cells if cell.cell_type == "code"][:2] == ["install", "settings"]
    assert "docs/design.md" in source(notebook, "markdown")
    for before, after in itertools.pairwise(notebook.cells):
        explained = before.cell_type == "markdown" or after.cell_type == "markdown" or after.id in LOOKS
        assert explained, f"{after.id}: say first what the cell does"


@pytest.mark.parametrize("name", NAMES)
def test_badge_opens_this_notebook(name: str):
    badge = read(name).cells[0].source.splitlines()[2]
    place = f"https://colab.research.google.com/github/{repository()}/blob/main/colabs/{name}.ipynb"
    assert badge == f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({place})"
    assert place in (COLABS / "README.md").read_text()


@pytest.mark.parametrize("name", [*NAMES, "README"])
def test_links_name_one_repository_and_files_of_it(name: str):
    text = (COLABS / ("README.md" if name == "README" else f"{name}.ipynb")).read_text(encoding="utf-8")
    owned = re.findall(
        r"https://(?:github\.com|colab\.research\.google\.com/github)/([\w-]+/[\w-]+)([^\s)>\"'\\]*)", text
    )
    assert owned
    for where, rest in owned:
        assert where == repository()
        path, _, anchor = rest.removeprefix("/blob/main/").partition("#")
        if path:
            assert (ROOT / path).is_file(), rest
        if anchor:
            assert re.search(rf"^#+ {anchor}$", (ROOT / path).read_text(), flags=re.M | re.I), rest


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_all_there_is_to_set(name: str):
    """What the environment may say is read in the settings cell alone, and everything there is used."""
    cells = {cell.id: cell.source for cell in read(name).cells if cell.cell_type == "code"}
    settings = cells.pop("settings")
    assert not any("os.environ" in text for text in cells.values())
    for variable, asked in re.findall(r'^([A-Z]+) = .*os\.environ\.get\("(\w+)"', settings, flags=re.M):
        assert asked == f"SPJAX_{variable}"
        assert any(re.search(rf"\b{variable}\b", text) for text in [settings.replace(asked, ""), *cells.values()])
        used = sum(len(re.findall(rf"\b{variable}\b", text)) for text in cells.values())
        assert used or settings.count(variable) > 2, f"nothing reads {variable}"


# ---- execution


def outputs(notebook: nbformat.NotebookNode, ident: str) -> str:
    """All text that a cell gave, markdown and plain."""
    (cell,) = [cell for cell in notebook.cells if cell.id == ident]
    return "\n".join(
        output.get("text", "")
        + "".join(output.get("data", {}).get(kind, "") for kind in ("text/markdown", "text/plain"))
        for output in cell.outputs
    )


def pictures(notebook: nbformat.NotebookNode, ident: str) -> int:
    (cell,) = [cell for cell in notebook.cells if cell.id == ident]
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


Execute = Callable[..., nbformat.NotebookNode]


@pytest.fixture
def execute(tmp_path: Path, cache: Path) -> Execute:
    """execute(notebook, SETTING=..., **environment): run in a kernel of its own; the notebook with its outputs.

    A cell or a command that fails, or anything that asks the network, fails the test.
    """
    guard, profile, asked = tmp_path / "guard", tmp_path / "ipython" / "profile_default" / "startup", tmp_path / "asked"
    guard.mkdir()
    profile.mkdir(parents=True)
    (guard / "sitecustomize.py").write_text(GUARD)
    (profile / "00-strict.py").write_text(STRICT)

    def run(
        notebook: nbformat.NotebookNode, *, importable: bool = True, devices: int = 1, online: bool = False, **told: str
    ) -> nbformat.NotebookNode:
        home = cache / "home"  # compiled programs are kept there, for all notebooks
        home.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SPJAX_", "HF_"))} | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(guard), *[str(ROOT)] * importable]),
            "HOME": str(home),
            "IPYTHONDIR": str(tmp_path / "ipython"),
            "HF_HOME": str(tmp_path / "hf"),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}",
            "SPJAX_TEST_ASKED": str(asked),
            **told,
        }
        done = nbformat.from_dict(notebook)
        client = nbclient.NotebookClient(
            done, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        )
        client.execute(env=environment)
        if not online:
            assert not asked.exists(), f"asked for the network: {asked.read_text()}"
        return done

    return run


def notebook_of(*cells: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(text) for text in cells],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)",
        "import urllib.request; urllib.request.urlopen('http://example.org', timeout=5)",
        "!python -c \"import urllib.request; urllib.request.urlopen('https://huggingface.co', timeout=5)\"",
    ],
)
def test_the_network_is_off(execute: Execute, tmp_path: Path, attempt: str):
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        execute(notebook_of(attempt))
    assert (tmp_path / "asked").read_text().startswith("socket.")


def test_a_command_that_fails_ends_the_notebook(execute: Execute):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="status 3"):
        execute(notebook_of("!exit 3"))


def lacking() -> list[str]:
    """Requirements of the repository that this environment does not meet by name and version."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line[0] != "#"]
    versions = {wheel.name.lower().replace("_", "-"): wheel.version for wheel in importlib.metadata.distributions()}
    return [
        str(one)
        for one in wanted
        if (one.marker is None or one.marker.evaluate())
        and not one.specifier.contains(versions.get(one.name.lower().replace("_", "-"), "0"), prereleases=True)
    ]


def test_install_cells_differ_in_what_they_add_only():
    installing = {name: next(cell.source for cell in read(name).cells if cell.id == "install") for name in NAMES}
    common = installing["own_data"].splitlines()
    for text in installing.values():
        assert [line for line in text.splitlines() if line in common] == common


def test_install_cell_fetches_what_is_not_there(execute: Execute, tmp_path: Path):
    """The clone is of this checkout, by git's own redirection; its requirements are met already."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no clone, or there is no git")
    if importlib.util.find_spec("pip") is None or lacking():
        pytest.skip(f"pip would have to download {', '.join(lacking()) or 'itself'}")
    installing = next(cell.source for cell in read("quick_start").cells if cell.id == "install")
    done = execute(
        notebook_of(installing, "import data_pipelines\nprint(data_pipelines.__file__, os.getcwd())", installing),
        importable=False,
        GIT_CONFIG_COUNT="1",
        GIT_CONFIG_KEY_0=f"url.{ROOT.as_uri()}.insteadOf",
        GIT_CONFIG_VALUE_0=f"https://github.com/{repository()}",
        PIP_NO_INDEX="1",
    )
    printed = "".join(output.get("text", "") for output in done.cells[1].outputs)
    assert printed.split() == [str(tmp_path / "checkout/data_pipelines/__init__.py"), str(tmp_path / "checkout")]


def small_recordings(folder: Path) -> Path:
    """Speech or none: recordings in a folder a class, and where they are."""
    pytest.importorskip("espeakng_loader", reason="the voice is optional (the extra demo)")
    from data_pipelines import synthesize

    synthesize.synthesize(folder, synthesize.SynthesisConfig(40, 10, 10), ["voice_activity"])
    for clips in synthesize.clips(folder / "voice_activity").values():
        for clip in clips:
            to = folder / "mine" / clip.labels[0] / clip.path.replace("/", "_")
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(folder / "voice_activity" / clip.path, to)
    return folder / "mine"


@pytest.mark.slow
def test_quick_start(execute: Execute, tmp_path: Path):
    pytest.importorskip("espeakng_loader", reason="the voice is optional (the extra demo)")
    done = execute(
        read("quick_start"),
        SPJAX_WORKDIR=str(tmp_path / "run"),
        SPJAX_TASKS="voice_activity,commands",
        SPJAX_TRAIN="40", SPJAX_VALID="12", SPJAX_TEST="12",
        SPJAX_MORE="--config.train.epochs=1 --config.train.buckets=1",
    )  # fmt: skip
    assert "commands" in outputs(done, "report")
    assert "linear probe" in outputs(done, "report")
    answered = outputs(done, "predictor").splitlines()[-4:]
    assert re.search(r"\| of voice_activity \| (speech|background) \| [\w_]+ \|", "\n".join(answered))
    assert [pictures(done, cell) for cell in ("report", "units", "probabilities", "inside")] == [1] * 4
    assert "bank of 2 prompts: voice_activity, commands" in outputs(done, "bank")
    assert re.search(r"voice_activity, \w+: (speech|background) \([01]\.\d\d\)\n", outputs(done, "ask"))
    assert "status 0" in outputs(done, "stop")


@pytest.mark.slow
def test_own_data(execute: Execute, tmp_path: Path):
    recordings = small_recordings(tmp_path / "speech")
    (recordings / "speech" / "broken.wav").write_bytes(b"no audio")
    upload = shutil.make_archive(str(tmp_path / "upload"), "zip", recordings.parent, "mine")
    new = next(iter(sorted((recordings / "speech").glob("test_*.wav"))))
    with hub_server.running() as hub:
        done = execute(
            read("own_data"),
            SPJAX_UPLOAD=upload,
            SPJAX_NAME="vad_of_mine",
            SPJAX_WORKDIR=str(tmp_path / "run"),
            SPJAX_CLUSTERS="40",
            SPJAX_MORE=f"{SMALL_LM} {TRAIN}",
            SPJAX_RECORDING=str(new),
            SPJAX_REPOSITORY="someone/vad_of_mine",
            HF_ENDPOINT=hub.url,
            HF_TOKEN=hub_server.TOKEN,
        )
        published = hub.commits["someone/vad_of_mine"][hub.branches["someone/vad_of_mine"]["main"]]
    assert "label: background, speech" in outputs(done, "look")
    assert "broken.wav" in outputs(done, "extract") + (tmp_path / "run/units/vad_of_mine-refused.jsonl").read_text()
    assert "vad_of_mine: accuracy" in outputs(done, "report")
    assert re.search(r"label: (speech|background) [01]\.\d\d, (speech|background) [01]\.\d\d", outputs(done, "predict"))
    assert "vad_of_mine: a prompt pack" in outputs(done, "card")
    assert re.search(r"someone/vad_of_mine, commit \w+: [\d,]+ numbers", outputs(done, "hub"))
    assert published.keys() == {"card.json", "prompt.safetensors", "README.md"}
    shutil.unpack_archive(tmp_path / "run" / "vad_of_mine.zip", tmp_path / "got")
    import spjax

    shared = tmp_path / "got" / "shared"  # as the notebook says
    predictor = spjax.SpeechPrompt.load(shared / "lm", "mfcc", [shared / "pack"], kmeans=shared / "kmeans")
    (answer,) = predictor.predict([new])
    label = answer["vad_of_mine"]["labels"]["label"]
    assert f"label: {label} {answer['vad_of_mine']['probabilities']['label'][label]:.2f}" in outputs(done, "predict")


@pytest.mark.slow
def test_own_data_without_data(execute: Execute, tmp_path: Path):
    """Nothing set: the example, by CSV; nothing is published."""
    pytest.importorskip("espeakng_loader", reason="the voice is optional (the extra demo)")
    done = execute(read("own_data"), SPJAX_WORKDIR=str(tmp_path / "run"), SPJAX_MORE=f"{SMALL_LM} {TRAIN}")
    assert "train: 300 recordings" in outputs(done, "look")
    assert "mine: accuracy" in outputs(done, "report")
    assert "not published" in outputs(done, "hub")


def published_checkpoints(golden: Path, folder: Path) -> None:
    """The golden HuBERT and unit LM under their published names, and a k-means of 100 clusters between them."""
    import joblib
    from sklearn.cluster import MiniBatchKMeans

    folder.mkdir()
    shutil.copy(golden / "hubert" / "hubert_tiny.pt", folder / "hubert_base_ls960.pt")
    for name in ("checkpoint_best.pt", "dict.txt"):
        shutil.copy(golden / "lm" / name, folder)
    recorded = np.load(golden / "hubert" / "hubert_feats.npz")
    frames = np.concatenate([recorded[name] for name in recorded.files if name.startswith("layer6_")])
    joblib.dump(MiniBatchKMeans(100, n_init=1, random_state=0).fit(frames), folder / "km.bin")


@pytest.mark.slow
def test_fsc_published_weights(execute: Execute, tmp_path: Path, golden: Path):
    corpus.fsc_tree(tmp_path / "raw")
    published_checkpoints(golden, tmp_path / "checkpoints")
    done = execute(
        read("fsc_published_weights"),
        SPJAX_RAW=str(tmp_path / "raw"),
        SPJAX_CHECKPOINTS=str(tmp_path / "checkpoints"),
        SPJAX_MODELS=str(tmp_path / "models"),
        SPJAX_WORKDIR=str(tmp_path / "run"),
        SPJAX_MORE=f"{TRAIN} --config.prompt.length=4",
        SPJAX_RECORDING=str(tmp_path / "raw/wavs/speakers/test/035.wav"),
    )
    assert "8 test utterances of fsc" in outputs(done, "look")
    assert "fsc: exact match" in outputs(done, "report")
    assert "98.4" in outputs(done, "report")  # the published ones beside it
    assert outputs(done, "predict").count("| wavs/speakers/test/") == 8
    assert re.search(r"action: [\w ]+ \([01]\.\d\d\)", outputs(done, "recording"))
    assert "int8 against float32" in outputs(done, "narrow")


@pytest.mark.slow
def test_fsc_from_unit_text(execute: Execute, tmp_path: Path, golden: Path):
    published_checkpoints(golden, tmp_path / "checkpoints")
    done = execute(
        read("fsc_published_weights"),
        SPJAX_UNIT_TEXT=str(toy.write_text(tmp_path / "unit_text")),
        SPJAX_CHECKPOINTS=str(tmp_path / "checkpoints"),
        SPJAX_MODELS=str(tmp_path / "models"),
        SPJAX_WORKDIR=str(tmp_path / "run"),
        SPJAX_MORE=f"{TRAIN} --config.prompt.length=4",
    )
    assert "24 test utterances of fsc" in outputs(done, "look")
    assert "name a recording" in outputs(done, "recording")


@pytest.mark.slow
@pytest.mark.parametrize(("missing", "told"), [("models", "put it at"), ("data", "where is Fluent Speech Commands")])
def test_fsc_says_what_is_missing(execute: Execute, tmp_path: Path, golden: Path, missing: str, told: str):
    """Without network and without files: the sentence that says which file to put where."""
    published_checkpoints(golden, tmp_path / "checkpoints")
    given = {} if missing == "models" else {"SPJAX_CHECKPOINTS": str(tmp_path / "checkpoints")}
    with pytest.raises(nbclient.exceptions.CellExecutionError) as raised:
        execute(
            read("fsc_published_weights"), SPJAX_MODELS=str(tmp_path / "models"), SPJAX_WORKDIR=str(tmp_path), **given
        )
    assert told in str(raised.value)


@pytest.mark.distributed
@pytest.mark.slow
def test_cloud_tpu(execute: Execute, tmp_path: Path):
    """Eight devices of this CPU are the chips, the bucket is one of our own; stopped once on the way."""
    from spjax.io.unit_lms import save_unit_lm

    toy.write_text(tmp_path / "unit_text", train=48)
    save_unit_lm(tmp_path / "lm", toy.LM, toy.tiny_lm(seed=7))
    with gcs_server.running(tmp_path) as bucket:
        for name in ("unit_text", "lm"):
            bucket.put_tree(tmp_path / name, name)
        done = execute(
            read("cloud_tpu"),
            devices=8,
            SPJAX_BUCKET=bucket.name,
            SPJAX_MORE=f"{TRAIN} --config.train.epochs=4 --config.prompt.length=4 --config.prompt.separators=2",
            SPJAX_MINUTES="0.25",
            **bucket.environment,
        )
    assert "unit_text" in outputs(done, "bucket")
    assert "8 x cpu on cpu" in outputs(done, "devices")
    stopped = re.search(r"stopped at (epoch \d+, step \d+): saved", outputs(done, "train"))
    if stopped:
        assert "ended with status 124" in outputs(done, "train")
        assert "continuing from epoch" in outputs(done, "resume")
    assert "fsc: exact match" in outputs(done, "report")
    assert re.search(r"\d+ updates; at best [\d,]+ utterances a second", outputs(done, "speed"))
    assert json.loads(bucket.objects["runs/fsc/results.json"])["baselines"]
