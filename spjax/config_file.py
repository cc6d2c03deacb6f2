"""The flags of `spjax.main`, by absl and ml_collections; every error is one sentence."""

from __future__ import annotations

import difflib
import itertools
import os
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from spjax import paths
from spjax.command_line import COLUMNS, nearest

flags.disclaim_key_flags()  # flags defined by `define_path` are key flags of the caller
_SHIPPED = Path(__file__).resolve().parents[1] / "configs"
_NO_EXPERIMENTS = ("__init__", "defaults")
_USAGE = """usage: {program} --config=FILE [--flag=value ...]

  {program} --config=configs/own.py --folders=DIR    recordings of your own, a folder a class
  {program} --config=configs/fsc.py --raw=DIR        a data set that spjax knows, unpacked in DIR
  {program} --config=configs/fsc.py --units=DIR      its units as text

Unit records and the unit LM that the config names are made first if they are absent. A run found
in --workdir is continued. A setting of the config is changed by a flag such as
--config.train.epochs=10 (docs/settings.md).
"""
_GROUPS = {
    "experiment": ("config", "workdir"),
    "source of the unit records": ("units", "raw", "folders", "manifest"),
    "recordings": ("encoder", "kmeans", "protocol", "on-error", "metric", "split-seed"),
    "columns of --manifest": ("labels", "text", "crops", "source"),
    "several processes that train together": ("coordinator", "processes", "process-id"),
    "compiled programs": ("compilation-cache",),
}


def define_flags(recordings: Mapping[str, tuple[str, str]]) -> None:
    """Define the flags of the calling module, `--config` included.

    Args:
      recordings: flags that name recordings: kind ("path", "switch", ...) and help text by name.
    """
    config_flags.DEFINE_config_file("config", None, "the experiment: a file in configs/", lock_config=True)
    define_path("workdir", paths.to_write, "directory to write (runs/CONFIG or runs/CONFIG_BACKBONE)")
    units = "units as text: a folder with TASK/{train,valid,test}.txt or SOURCE.PART.frames.txt"
    define_path("units", paths.given, units)
    for name, (kind, text) in recordings.items():
        if kind == "path":
            define_path(name, paths.given, text)
        elif kind == "switch":
            flags.DEFINE_boolean(name, False, text)
        else:
            flags.DEFINE_string(name, None, text)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; auto: as Cloud TPU, Slurm or MPI say")
    flags.DEFINE_integer("processes", 1, "number of processes", lower_bound=1)
    flags.DEFINE_integer("process-id", None, "number of this process, from 0 on", lower_bound=0)
    define_path(
        "compilation-cache",
        lambda text: paths.given(text) if text else text,
        "directory of compiled programs; '' for none",
        default="~/.cache/spjax/xla",
    )
    for name in "process-id", "compilation-cache":
        flags.DEFINE_alias(name.replace("-", "_"), name)  # the names of version 0.1


def help_text() -> str:
    """The usual calls, then the flags in groups."""
    program = sys.argv[0] if sys.argv[0].startswith("spjax ") else "python -m spjax.main"
    width = min(shutil.get_terminal_size((COLUMNS, 24)).columns, COLUMNS)
    lines = [_USAGE.format(program=program)]
    for title, names in _GROUPS.items():
        lines.append(f"{title}:")
        for name in names:
            flag = f"  --{name}" + ("" if flags.FLAGS[name].boolean else "=...")
            text = str(flags.FLAGS[name].help)
            lines += textwrap.wrap(text, width, initial_indent=f"{flag:25} ", subsequent_indent=" " * 26)
    return "\n".join(lines)


def parse_flags(argv: Sequence[str], module: str) -> list[str]:
    """Parse the command line, for `absl.app.run`; `--help` needs no config, and exits with 0.

    Args:
      argv: sys.argv, with the program's name.
      module: name of the module that defines the flags (`--config` and others).

    Returns:
      The program's name, without the flags.

    Raises:
      SystemExit: status 2 after a message about a wrong flag or config file.
    """
    values = flags.FLAGS
    for word in argv[1:]:
        if re.fullmatch("--?(h|help|helpshort|helpfull)", word):
            print(values.get_help() if word.endswith("full") else help_text())
            sys.exit(0)
    files = list(_config_files(argv))
    known = [f"--{flag.name}" for flag in values.get_key_flags_for_module(module)]
    for word in argv[1:]:  # before the config file is loaded, whose errors would come first
        name = re.match(r"--?(no)?([A-Za-z][\w-]*)(?==|$)", word)
        if name and name[2] not in values and f"{name[1] or ''}{name[2]}" not in values:
            _refuse(f"unknown flag {name[0]}{nearest(f'--{name[2]}', known)}")
    if not files:
        _refuse(f"no --config: give --config=FILE; {_listed(_experiments('configs'))}")
    for file in files:
        _check_file(file)
    try:
        rest = values(argv)
        found = values["config"].value
    except flags.Error as error:  # a config file's ValueError about its options comes as the end of a traceback
        _refuse(str(error).strip().splitlines()[-1].removeprefix("ValueError: "))
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
        if frames or not isinstance(error, AttributeError | KeyError):  # raised by the config file's code
            line = f", line {frames[-1].lineno}" if frames else ""
            _refuse(f"{files[-1]}{line}: {type(error).__name__}: {' '.join(str(error).split())}")
        reason = error.args[0] if error.args else error  # a --config.NAME that the config lacks
        text = reason.args[0] if isinstance(reason, KeyError) else str(reason)
        _refuse(f"the config has no {': '.join(str(text).splitlines())}")
    if not isinstance(found, ConfigDict):
        _refuse(f"{files[-1]}: get_config() returns a {type(found).__name__}, must return a ConfigDict")
    if len(rest) > 1:
        _refuse(f"unexpected {rest[1]!r}: every argument is a --flag=value")
    return list(rest)


class _PathParser(flags.ArgumentParser):
    def __init__(self, check: Callable[[str], str]) -> None:
        self._check = check

    def parse(self, argument: str) -> str:
        try:
            return self._check(argument)
        except OSError as error:
            raise ValueError(str(error)) from error


def define_path(
    name: str, check: Callable[[str], str], text: str, default: str | None = None
) -> flags.FlagHolder[str | None]:
    """Define a flag whose value is a path, which `check` returns or refuses with a ValueError or OSError."""
    return flags.DEFINE(_PathParser(check), name, default, text, serializer=flags.ArgumentSerializer())


def default_workdir() -> str:
    """The default of `--workdir` for `--config`: runs/CONFIG or runs/CONFIG_BACKBONE."""
    file, _, options = str(config_flags.get_config_filename(flags.FLAGS["config"])).partition(":")
    return os.path.join("runs", "_".join((Path(file).stem, *re.findall(r"=(\w+)", options))))


def _refuse(text: str) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def _config_files(argv: Sequence[str]) -> Iterator[str]:
    """Values of `--config`, without the options after the colon."""
    for word, following in itertools.pairwise([*argv[1:], ""]):
        if found := re.fullmatch(r"--?config(=(.*))?", word, re.DOTALL):
            value = found[2] if found[1] else following
            yield value if paths.is_remote(value) else value.partition(":")[0]


def _experiments(folder: str) -> list[Path]:
    """The config files of a folder; those of this repository if it has none."""
    found = [path for path in sorted(Path(folder).glob("*.py")) if path.stem not in _NO_EXPERIMENTS]
    return found if found or Path(folder) == _SHIPPED else _experiments(str(_SHIPPED))


def _listed(experiments: Sequence[Path]) -> str:
    return f"{experiments[0].parent} holds {', '.join(path.name for path in experiments)}" if experiments else ""


def _check_file(file: str) -> None:
    """Refuse a file that does not exist or is not a config, and list the available ones."""
    try:
        path = Path(paths.given(file))
    except ValueError as error:
        _refuse(f"--config: {error}")
    experiments = _experiments(os.path.dirname(file) or "configs")
    if not path.is_file():
        close = difflib.get_close_matches(path.stem, [one.stem for one in experiments], n=1)
        meant = [f"did you mean {one}? " for one in experiments if one.stem in close]
        what = "is a directory" if path.is_dir() else "does not exist"
        _refuse(f"--config={file} {what}: {''.join(meant)}{_listed(experiments)}")
    try:
        source = path.read_bytes()
    except OSError as error:
        _refuse(f"--config={file} cannot be read: {error.strerror}")
    if not re.search(rb"^[^#\n]*\bget_config\b", source, re.MULTILINE):  # other Python files must not be executed
        _refuse(f"--config={file} has no get_config(), which makes the config: {_listed(experiments)}")
