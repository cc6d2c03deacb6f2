"""What the documents promise: their links lead somewhere, their commands and flags exist, their examples run."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import yaml

from spjax import config_file, tasks
from tests import test_command_line

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """A fenced block of a document."""

    where: str  # file and line
    language: str
    text: str


def blocks(path: Path) -> list[Block]:
    found, start, language, lines = [], 0, "", []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```") and not start:
            start, language, lines = number, line[3:].strip(), []
        elif line.startswith("```"):
            found.append(Block(f"{path.relative_to(ROOT)}:{start}", language, "\n".join(lines)))
            start = 0
        elif start:
            lines.append(line)
    assert not start, f"{path.name}:{start} opens a block that never closes"
    return found


BLOCKS = [block for path in DOCUMENTS for block in blocks(path)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def commands(text: str) -> list[list[str]]:
    """Words of every `python -m MODULE ...` in shell text, from MODULE on."""
    joined = re.sub(r"\\\n\s*", " ", text)
    pieces = [piece for line in joined.splitlines() for piece in re.split(r"&&|\|\||;", line)]
    words = [shlex.split(piece, comments=True) for piece in pieces]
    return [w[2:] for w in words if len(w) > 2 and re.fullmatch(r"(.*/)?python3?", w[0]) and w[1] == "-m"]


COMMANDS = [
    pytest.param(words, id=f"{block.where} {words[0]}")
    for block in BLOCKS
    if block.language == "bash"
    for words in commands(block.text)
    if words[0] not in ("pip", "venv", "pytest")
]


def run(words: list[str], folder: Path = ROOT) -> str:
    """Output of `python -m WORDS` in `folder`, with this checkout importable."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    return output


@functools.cache
def help_of(words: tuple[str, ...]) -> str:
    """`--help` of a command, without a process where it has our parser (tests/test_cli.py starts some)."""
    module, *job = words
    if module == "spjax.main":
        importlib.import_module(module)  # defines the flags
        return config_file.help_text()
    ours = [name for name in test_command_line.commands() if name.removesuffix(".__main__") == module]
    if not ours:
        return run([*words, "--help"])
    parsers = test_command_line.parsers(ours[0], only_leaves=False)
    return parsers.get(tuple(job), parsers[()]).format_help()


def commands_of(page: str, module: str) -> list[list[str]]:
    """Commands of a module on a page, such as docs/models.md."""
    found = [c.values[0] for c in COMMANDS if c.values[0][0] == module and c.id.startswith(f"{page}:")]
    assert found, f"{page} no longer shows {module}"
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path):
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in LINK.findall(prose):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name) if name else path
        assert file.exists(), f"{path.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, f"{path.name} links to {target}"


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.where)
def test_python_blocks_use_what_there_is(block: Block):
    import spjax

    for node in ast.walk(ast.parse(block.text, filename=block.where)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "spjax":
            assert hasattr(spjax, node.attr), f"{block.where} uses spjax.{node.attr}"


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_exist_with_their_flags(words: list[str]):
    module, *rest = words
    assert importlib.util.find_spec(module), f"no module {module}"
    command = [
        word for word in rest[:1] if word.isidentifier() and word.islower()
    ]  # a subcommand, as in `convert prompt`
    text = help_of((module, *command))
    rest = list(itertools.takewhile(lambda word: word != "--", rest))  # what is behind it is Beam's
    for flag in (word[2:].split("=")[0] for word in rest if word.startswith("--")):
        assert re.search(rf"--(\[no\])?{re.escape(flag.split('.')[0])}\b", text), f"{module} has no flag --{flag}"


@pytest.mark.parametrize("words", [c for c in COMMANDS if any(w.startswith("--config=") for w in c.values[0])])
def test_configs_and_their_overrides_exist(words: list[str]):
    name = next(word for word in words if word.startswith("--config=")).split("=", 1)[1]
    name, _, options = name.partition(":")
    assert (ROOT / name).is_file(), f"no config {name}"
    config = importlib.import_module(name.removesuffix(".py").replace("/", ".")).get_config(options)
    for word in words:
        if word.startswith("--config."):
            at = config
            for key in word.removeprefix("--config.").split("=")[0].split("."):
                assert key in at, f"{name} has no {word.split('=')[0]}"
                at = at[key]


def test_ci_reads_the_test_command_from_the_readme():
    """Runs the line of .ci/run that extracts the command, and finds in it all that a bare machine needs."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    extract = next(line for line in script.splitlines() if line.startswith("command="))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'{extract}\nprintf %s "$command"'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    command = done.stdout.strip()
    for part in (
        "-m venv .venv",
        "--require-hashes -r requirements-dev.lock",
        "-r requirements-torch.txt",
        "-m pytest",
    ):
        assert part in command
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    newest = next(line.strip() for line in script.splitlines() if line.strip().startswith("newest)"))
    assert re.search(r"/(--require-hashes.*?)/-e", newest).group(1) in command  # what it replaces is there


def test_readme_opens_with_the_two_commands():
    first, second = [block for block in blocks(ROOT / "README.md") if block.language == "bash"][:2]
    assert "python3 -m venv .venv" in first.text
    assert "--require-hashes -r requirements.lock" in first.text
    assert "spjax.main --config=configs/demo.py" in first.text
    assert second.text.rstrip().endswith("-m pytest -n 2 --dist loadfile")


def test_readme_fits_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in (ROOT / "docs").glob("*.md") if f"({path.name})" not in index]
    assert missing == ["README.md"]


def test_units_are_imported_as_documented(tmp_path: Path):
    """The import commands of docs/unit_text.md, on unit text in the forms that it shows."""
    known = [f"71 12 63 {a} 20 <s> {a} {6 + b} {20 + b % 4}" for a in range(6) for b in range(14)]
    spelled = ["71 12 63 <s> turn on | kitchen", "71 12 <s> turn off | none"]
    for task, lines in (("fsc", known), ("home", spelled)):
        source = tmp_path / "UNIT_TEXT" / task
        source.mkdir(parents=True)
        for split in ("train", "valid", "test"):
            (source / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "slots.json").write_text('{"action": ["turn on", "turn off"], "room": ["none", "kitchen"]}')
    for words in commands_of("docs/unit_text.md", "data_pipelines.import_units"):
        run(words, tmp_path)
    for task in ("fsc", "home"):
        found = {path.name for path in (tmp_path / "RECORDS" / task).rglob("*")}
        assert "dataset_info.json" in found, "not a directory that TFDS would read"
        assert any("tfrecord" in name for name in found)


def test_conversion_and_the_python_example_work(tmp_path: Path, golden: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The conversions of docs/models.md, then the Python example of docs/quick_start.md on the results."""
    shutil.copy(golden / "lm" / "checkpoint_best.pt", tmp_path)
    shutil.copy(golden / "lm" / "dict.txt", tmp_path)
    shutil.copy(golden / "prompt" / "b_linear24_multi_prompt_ckpt.pt", tmp_path / "prompt_checkpoint.pt")
    shutil.copy(golden / "pgslm" / "discrete_prosody.pt", tmp_path / "discrete_prosody_shift_1_1.pt")
    shutil.copy(golden / "pgslm" / "f0_bin.th", tmp_path / "mean_norm_log_f0_seg_bin.th")
    shutil.copy(golden / "hubert" / "hubert_tiny.pt", tmp_path / "hubert_base_ls960.pt")
    shutil.copy(golden / "kmeans" / "km_hubert_layer6_sk1.0.1.bin", tmp_path / "km.bin")
    noise = np.random.default_rng(0).standard_normal(8000).astype(np.float32) / 10
    soundfile.write(tmp_path / "turn_on_the_lights.wav", noise, 16_000)
    for words in commands_of("docs/models.md", "spjax.convert"):
        run(words, tmp_path)
    (example,) = [block for block in PYTHON if block.where.startswith("docs/quick_start.md:")]
    monkeypatch.chdir(tmp_path)
    exec(compile(example.text, example.where, "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2  # one answer an utterance


def test_extending_names_what_there_is():
    """Names behind `[file](../file): ` on docs/extending.md are defined in that file."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    found = re.findall(r"\]\(\.\./([\w/]+\.py)\): ((?:`\w+`(?:, )?)+)", text)
    assert len(found) > 10
    for file, names in found:
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(def|class) {name}\b|^{name}\b.* = ", source, flags=re.MULTILINE), f"{name} of {file}"


def test_the_builder_of_the_docs_lists_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The row and the builder of docs/extending.md, on a small raw folder."""
    row, builder = [block.text for block in PYTHON if block.where.startswith("docs/extending.md:")]
    task = eval(row, {"Task": tasks.Task, "Slot": tasks.Slot, "_words": str.split})
    monkeypatch.setitem(tasks.TASKS, task.name, task)
    for speaker, vowel in itertools.product(range(10), "aeiou"):
        (tmp_path / f"s{speaker}").mkdir(exist_ok=True)
        (tmp_path / f"s{speaker}" / f"{vowel}_0.wav").touch()
    module: dict[str, Any] = {}
    exec(compile(builder, "docs/extending.md", "exec"), module)
    splits = module["clips"](tmp_path)
    assert {split: len(clips) for split, clips in splits.items()} == {"train": 40, "valid": 5, "test": 5}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ADDRESS = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")


def naming(root: Path, repository: str) -> dict[str, set[str]]:
    """Names of GitHub repositories that match a pattern, by the file that has them in a link to GitHub or Colab."""
    paths = [
        *root.glob("*.*"),
        *(path for part in ("docs", "colabs", ".github") for path in (root / part).rglob("*.*")),
    ]
    texts = {path: path.read_text(encoding="utf-8") for path in paths if path.is_file()}
    link = re.compile(rf"(?:github\.com|google\.com/github)/({repository})(?![\w.-])")
    return {str(path.relative_to(root)): set(link.findall(text)) for path, text in texts.items() if link.search(text)}


def test_the_repository_has_one_address():
    assert PROJECT["urls"] == {"Repository": f"https://github.com/{ADDRESS}"}
    others = {name: owners - {ADDRESS} for name, owners in naming(ROOT, r"[\w-]+/spjax").items()}
    assert not any(others.values()), f"pyproject.toml has {ADDRESS}: change it with scripts/set_repository only"


def test_set_repository_changes_every_address(tmp_path: Path):
    if not all(map(shutil.which, ("git", "perl"))):
        pytest.skip("needs git and perl")
    named = naming(ROOT, re.escape(ADDRESS))
    assert {"pyproject.toml", "CITATION.cff", "colabs/quick_start.ipynb"} <= named.keys()
    for name in [*named, "scripts/set_repository"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for command in ("git init -q", "git add .", "scripts/set_repository new-owner/new.name"):
        subprocess.run(command.split(), cwd=tmp_path, check=True, timeout=60)
    assert naming(tmp_path, "new-owner/new.name").keys() == named.keys()
    assert not naming(tmp_path, re.escape(ADDRESS))


def test_citation_and_workflow():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format requires
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["check"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run ${{ matrix.python }}"]
    for template in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"):
        assert {"name", "about"} <= yaml.safe_load(template.read_text(encoding="utf-8").split("---")[1]).keys()
