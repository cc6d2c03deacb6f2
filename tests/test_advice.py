"""Advice in messages is valid: flags, config settings and commands exist, and some advice is produced and followed."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from absl import flags as absl_flags
from ml_collections import ConfigDict

from configs import demo, fsc, pretrain_tiny, pretrain_ulm
from spjax import config as job_config
from spjax import jobs
from spjax.data import plan
from spjax.training import processes
from tests import toy
from tests.conftest import Place
from tests.test_architecture import files, module_name, parse
from tests.test_command_line import commands, parsers

ROOT = Path(__file__).resolve().parents[1]
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
SETTING = re.compile(r"--config\.([\w.]*\w)")
COMMAND = re.compile(r"python -m ([\w.]*\w)(?: (\w+))?")
NAMED = re.compile(r"\b((?:data_pipelines|spjax)\.\w+)")
# Flags of Beam, gcloud and curl; and a placeholder.
ELSEWHERE = {"location", "uniform-bucket-level-access"}
ELSEWHERE |= {"data-binary", "flag"}
ANY = "…"  # stands for values that a message fills in


class Message(NamedTuple):
    """A string in the sources that is neither a docstring nor a flag definition."""

    where: str
    module: str
    function: str  # the outermost one that contains it, or ""
    text: str


def _defines_flags(node: ast.AST) -> bool:
    called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    return called.endswith(("add_argument", "Parser", "add_parser", "define_path")) or called.startswith("flags.DEFINE")


def messages() -> Iterator[Message]:
    for path in files("spjax", "data_pipelines"):
        tree = parse(path)
        outer = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        skipped = {id(node.body[0].value) for node in ast.walk(tree)
                   if isinstance(node, outer) and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
        skipped |= {id(part) for node in ast.walk(tree) if _defines_flags(node) for part in ast.walk(node)}
        inside = {
            id(part): node.name for node in tree.body if isinstance(node, ast.FunctionDef) for part in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in skipped:
                continue
            if isinstance(node, ast.JoinedStr):
                skipped |= {id(part) for part in ast.walk(node)}
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else ANY for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            if re.search(r"--[a-z]|python -m|='", text) and "\n." not in text:  # no style sheets
                yield Message(
                    f"{path.relative_to(ROOT)}:{node.lineno}", module_name(path), inside.get(id(node), ""), text
                )


MESSAGES = list(messages())


@functools.cache
def flags_of(command: str) -> frozenset[str]:
    """Names of a command's flags, including those of its subcommands."""
    if command == "spjax.main":
        importlib.import_module(command)
        key = absl_flags.FLAGS.get_key_flags_for_module(command)
        return frozenset({"help", "helpfull", *(flag.name for flag in key)})
    found = {option for parser in parsers(command).values() for option in parser._option_string_actions}
    return frozenset(option.removeprefix("--") for option in found)


@functools.cache
def reach(module: str) -> frozenset[str]:
    """Our modules that a module imports, directly or indirectly, inside functions too."""
    found, todo = set(), [module]
    while todo:
        name = todo.pop()
        path = ROOT.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in found or not path.is_file():
            continue
        found.add(name)
        todo += _imported(path)
    return frozenset(found)


@functools.cache
def _imported(path: Path) -> tuple[str, ...]:
    from tests.test_architecture import imports

    names = [one.name for one in imports(parse(path)) if one.name.split(".")[0] in ("spjax", "data_pipelines")]
    return tuple(parent for name in names for parent in (name, name.rpartition(".")[0]) if "." in parent)


ALL_COMMANDS = ["spjax.main", *commands()]
# Modules that a command imports, but whose messages it cannot print.
APART = {
    # It only fetches published files, and gives the advice itself (`fetch.by_hand`); runner and workers are separate.
    "spjax.main": re.compile(r"spjax\.(convert|fetch)\b|data_pipelines\.(make_parts|extract)\b"),
    # Published files hold everything that is requested here, and no prompts.
    "spjax.fetch": re.compile(r"spjax\.convert\b"),
    # Its tables are not manifests, and it walks no folders of recordings.
    "data_pipelines.import_frames": re.compile(r"data_pipelines\.(tables|listing|builders\.easycall)\b"),
}


def readers(message: Message) -> list[str]:
    """The commands that may print a message."""
    if message.module in ALL_COMMANDS and message.function in (
        "main",
        "_parser",
        "_run",
        "_serve",
        "_extract_by",
        "listen",
    ):
        return [message.module]
    some = [command for command in ALL_COMMANDS if message.module in reach(command)]
    return [command for command in some if command not in APART or not APART[command].match(message.module)]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.where)
def test_flags_in_messages_exist_in_their_commands(message: Message) -> None:
    """Every command that may print it has the flag, or the message names the command that has it."""
    named = [name for name in map(_runnable, NAMED.findall(message.text)) if name in ALL_COMMANDS]
    for name, job in COMMAND.findall(message.text):
        assert name in ("pip", "zipfile") or _runnable(name) in ALL_COMMANDS, f"{name} is no command"
        assert name != "spjax.convert" or not job or (job,) in parsers("spjax.convert.__main__")
    for flag in {name for name in FLAG.findall(message.text) if name not in {*ELSEWHERE, "config"}}:
        if not any(flag in flags_of(name) for name in named):
            lacking = [command for command in readers(message) if flag not in flags_of(command)]
            assert not lacking, f"{lacking} may print this and have no --{flag}: {message.text}"


def test_the_check_detects_wrong_advice() -> None:
    for module, text in {
        "spjax.data.records": "replace it (--overwrite)",
        "spjax.jobs.inputs": "extract again with --f0",
        "spjax.serving.predictor": "choose --overlength=cut",
    }.items():
        with pytest.raises(AssertionError, match="may print this and have no --"):
            test_flags_in_messages_exist_in_their_commands(Message("", module, "", text))


def _runnable(name: str) -> str:
    return "spjax.convert.__main__" if name == "spjax.convert" else name


@pytest.mark.parametrize("message", [m for m in MESSAGES if "--config." in m.text], ids=lambda message: message.where)
def test_settings_in_messages_exist(message: Message) -> None:
    configs = [fsc.get_config(), demo.get_config(), pretrain_ulm.get_config(), pretrain_tiny.get_config()]
    for name in SETTING.findall(message.text):
        parts = name.split(".")
        assert any(_has(config, parts) for config in configs), f"no config has {name}"


def _has(config: object, parts: list[str]) -> bool:
    for part in parts:
        if not hasattr(config, "keys") or part not in config:  # type: ignore[operator]
            return False
        config = config[part]  # type: ignore[index]
    return True


# ---- following advice


class _Done(Exception):  # noqa: N818 - no error
    """Raised after the point of the error."""


def follow(config: ConfigDict, name: str, value: str) -> None:
    """Set what --config.NAME=VALUE would set; raises if the config does not have it."""
    old = functools.reduce(lambda part, key: part[key], name.split("."), config)
    config.update_from_flattened_dict({name: type(old)(value)})


def _job(place: Place, **settings: object) -> ConfigDict:
    config = fsc.get_config()
    config.lock()
    config.data, config.lm = str(place.folder / "runs/units/fsc"), str(place.folder / "lm")
    config.pretraining.data = str(place.folder / "runs/units")
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in settings.items()})
    return config


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"max_length": 8}, ["overlength", "overlength", "max_length"]),
        ({"train__select": "last", "train__patience": 2}, ["train.select", "train.select", "train.patience"]),
        ({"lm": "ulm/lm", "pretraining__lm__vocab_size": 54}, ["pretraining.lm.vocab_size"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_a_job_advises_work(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], names: list[str]
) -> None:
    """Each setting alone is enough."""

    def done(*_: object, **__: object) -> None:
        raise _Done

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spjax.training.train.train", done)
    monkeypatch.setattr("spjax.training.pretrain.pretrain", done)
    with pytest.raises(ValueError, match="--config") as refused:
        jobs.run(job_config.parse(_job(place, **settings)), "run", None, "")
    found = re.findall(r"--config\.([\w.]+)=(\w+)", str(refused.value))
    assert [name for name, _ in found] == names
    for number, (name, value) in enumerate(found):
        config = _job(place, **settings)
        follow(config, name, value)
        with pytest.raises(_Done):
            jobs.run(job_config.parse(config), f"run_{number}", None, "")


@pytest.mark.parametrize(
    "limits", [{"max_rows": 2, "max_tokens": 64}, {"max_rows": 8, "max_tokens": 16}, {"max_rows": 1, "max_tokens": 1}]
)
def test_advised_limits_of_a_batch_suffice(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"give --config\.train") as refused:
        plan.rows_per_step(8, row_multiple=4, **limits)
    found = {name: int(value) for name, value in re.findall(r"--config\.train\.(\w+)=(\d+)", str(refused.value))}
    assert plan.rows_per_step(8, row_multiple=4, **limits | found) == 4


def test_another_path_is_advised_if_the_lm_differs(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt job advises --config.lm, whose --workdir is another one; a pretraining job advises --workdir."""

    def done(*_: object, **__: object) -> None:
        raise _Done

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spjax.training.pretrain.pretrain", done)
    taken = _job(place).pretraining.to_dict() | {"inputs": {}, "tasks": ["gsc"]}
    (tmp_path / "ulm" / "checkpoints").mkdir(parents=True)
    (tmp_path / "ulm" / "config.json").write_text(json.dumps(taken))
    with pytest.raises(ValueError, match=r"ulm holds a run with tasks=.*: use another --config.lm, or remove"):
        jobs.run(job_config.parse(_job(place, lm="ulm/lm")), "run", None, "")
    with pytest.raises(_Done):
        jobs.run(job_config.parse(_job(place, lm="other/lm")), "run", None, "")
    with pytest.raises(ValueError, match=r"ulm holds a run with tasks=.*: use another --workdir, or remove"):
        jobs.run(job_config.parse(_job(place).pretraining), "ulm", None, "")


def test_advised_flags_of_several_processes_lead_to_a_run() -> None:
    """Following each error to the next leads to a run."""
    values: dict[str, object] = {"coordinator": None, "processes": 3, "process_id": None}
    for name, value in (("coordinator", "host:8476"), ("process_id", 0)):
        with pytest.raises(ValueError, match=f"requires --{name.replace('_', '-')}"):
            processes.check(**values)  # type: ignore[arg-type]
        values[name] = value
    assert processes.check(**values) == ("host:8476", 3, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "flag", "fixed"),
    [
        (["--task=fsc", "--vocabulary=50"], "--vocabulary", ["--task=fsc", "--vocabulary=100"]),
        (["--task=fsc", "--splits=train,dev"], "--splits", ["--task=fsc", "--splits=train,test"]),
        (["--task=home"], "--slots", ["--task=home", "--slots=slots.json"]),
        (["--task=fsc", "--metric=accuracy"], "--slots", ["--task=home", "--slots=slots.json", "--metric=accuracy"]),
        (["--task=fsc", "--slots=slots.json"], "--slots", ["--task=fsc"]),
        (["--task=fsc", "--out=full"], "--overwrite", ["--task=fsc", "--out=full", "--overwrite"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_advice_of_the_import_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], flag: str, fixed: list[str]
) -> None:
    from data_pipelines import import_units

    monkeypatch.chdir(tmp_path)
    toy.write_text(tmp_path / "units", train=12, held_out=12)
    slots = {f"slot{number}": [f"label {n}" for n in range(8)] for number in range(3)}
    (tmp_path / "slots.json").write_text(json.dumps(slots))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "unit_card.json").write_text("")
    common = ["--src=units/fsc", "--out=records"]
    with pytest.raises(SystemExit, match=f"^error: .*{flag}"):
        import_units.main([*common, *words])
    if "home" in fixed[0]:  # its classes are numbered differently
        for split in ("train", "valid", "test"):
            (tmp_path / "units" / "fsc" / f"{split}.txt").write_text("1 2 <s> 0 8 16\n")
    import_units.main([*common, *fixed])
