"""Argument parser of the commands: errors are one sentence, and an unknown flag suggests the closest known one."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from spjax import paths

COLUMNS = 100  # of help
_TEXTS = ("prog", "usage", "description", "epilog")
_SENTENCES = (  # instead of argparse's messages
    (r"argument job: invalid choice: '?(.*?)'? \(choose from (.*)\)", r"no command \1: choose from \2"),
    (r"argument (\S+): invalid choice: (.*?) \(choose from (.*)\)", r"\1: \2 is unknown: choose from \3"),
    (r"the following arguments are required: job", "a command is missing: see --help"),
    (r"the following arguments are required: (.*)", r"\1 missing: see --help"),
    (r"one of the arguments (.*) is required", r"give one of \1"),
    (r"argument (\S+): not allowed with argument (\S+)", r"\1 and \2 exclude each other: leave one out"),
    (r"argument (\S+): expected (?:one|at least one) argument", r"\1 needs a value: see --help"),
    (r"argument (\S+): ignored explicit argument (.*)", r"\1 takes no value, not \2: leave it out"),
    (r"argument (\S+): invalid int value: (.*)", r"\1: \2 is not an integer"),
    (r"argument (\S+): invalid float value: (.*)", r"\1: \2 is not a number"),
    (r"unrecognized arguments: (.*)", r"unexpected \1: see --help"),
    (r"argument (.*)", r"\1"),
)


class _Help(argparse.HelpFormatter):
    """Help of at most `COLUMNS` columns: `--flag=VALUE` beside its text; indented paragraphs are kept as they are."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size((COLUMNS, 24)).columns, COLUMNS)
        super().__init__(prog, max_help_position=24, width=width)

    def format_help(self) -> str:
        """See `argparse`; without blank lines between groups."""
        close = re.sub(r"\n\n(?=\S[^\n]*:\n  )", "\n", super().format_help())
        return re.sub(r"\n(?=\S[^\n]*:\n  )", "\n\n", close, count=1)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.strip("\n").split("\n\n")
        if parts[1:] and parts[1].startswith(" "):  # the usual calls come before the summary line
            parts[:2] = parts[1::-1]
        lines = [part if part.startswith(" ") else textwrap.fill(part, width, break_on_hyphens=False) for part in parts]
        return "\n\n".join(lines)

    def _format_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None) -> str:
        needed = [group for group in groups if group.required]
        words = [self._prog, *(f"({' | '.join(map(self._word, one._group_actions))})" for one in needed)]
        words += [self._word(action) for action in actions if action.required or not action.option_strings]
        if any(action.option_strings and action.help != argparse.SUPPRESS for action in actions):
            words.append("[--flag=value ...]")
        return textwrap.fill(f"usage: {' '.join(words)}", self._width, subsequent_indent=" " * 7) + "\n\n"

    def _word(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            return "COMMAND ..."
        return (
            self._format_action_invocation(action) if action.option_strings else self._format_args(action, action.dest)
        )

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):  # without a line that lists the names once more
            return "".join(super(_Help, self)._format_action(one) for one in self._iter_indented_subactions(action))
        return super()._format_action(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = action.option_strings[-1]
        return name if action.nargs == 0 else f"{name}={self._metavar_formatter(action, 'VALUE')(1)[0]}"


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` without abbreviations, whose errors are one sentence with exit status 2.

    An unknown flag is reported before a missing one, since it may be a typo of it. `--helpfull` is accepted like
    `--help`, as in `spjax.main`. The description starts with the usual calls; subcommands are called `job`.
    """

    def __init__(self, **settings: Any) -> None:
        if sys.argv[0].startswith("spjax "):  # called by `spjax.cli`
            called = settings.get("prog", "")
            texts = {name: text for name, text in settings.items() if name in _TEXTS and text}
            if called.startswith("python -m "):  # a subcommand's follows its parser's
                settings |= {name: text.replace(called, sys.argv[0]) for name, text in texts.items()}
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=_Help, **settings)
        self._optionals.title = "flags"
        self.add_argument("-h", "--help", "--helpfull", action="help", help=argparse.SUPPRESS)

    def add_commands(self) -> Any:
        """Add subcommands: the result's `add_parser` adds one."""
        return self.add_subparsers(dest="job", required=True, title="commands", prog=self.prog)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message in one line."""
        text = re.sub(r"'(\w+)'(?=[,)])", r"\1", " ".join(message.split()))  # choices have quotes before Python 3.12
        plain = next((found.expand(to) for form, to in _SENTENCES if (found := re.fullmatch(form, text))), text)
        self.exit(2, f"error: {plain}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse`; a subcommand's parser checks the subcommand's flags."""
        if args is not None:  # the outermost parser is called by `parse_args`, which passes sys.argv
            self._check_names(args)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """See `argparse`."""
        return super().parse_args(sys.argv[1:] if args is None else list(args), namespace)

    def _check_names(self, args: Sequence[str]) -> None:
        for word in args:
            if word == "--" or (self._subparsers and not word.startswith("-")):
                return
            name = word.split("=", 1)[0]
            if re.fullmatch(r"(--\w|-[A-Za-z])[\w.-]*", name) and name not in self._option_string_actions:
                known = [flag for flag in self._option_string_actions if flag not in ("-h", "--helpfull")]
                self.error(f"unknown flag {name}{nearest('--' + name.lstrip('-').replace('_', '-'), known)}")


def nearest(name: str, known: Sequence[str]) -> str:
    """End of a message about an unknown flag: the most similar known one, or where they are listed."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f": did you mean {found[0]}?" if found else ": see --help"


def place(text: str) -> str:
    """For `type=`: a path; `~` is expanded, file:// removed, URLs other than gs:// are refused."""
    return _checked(paths.given, text)


def place_or_none(text: str) -> str:
    """As `place`, or an empty string."""
    return place(text) if text else text


def local_path(text: str) -> Path:
    """As `place`, but not in a bucket."""
    return Path(_checked(_here, place(text)))


def output(text: str) -> str:
    """As `place`; the directory must be writable."""
    return _checked(paths.to_write, text)


def output_file(text: str) -> str:
    """As `output`, for a file."""
    return _checked(lambda given: paths.to_write(given, file=True), text)


def local_output(text: str) -> Path:
    """As `output`, but not in a bucket."""
    return Path(_checked(_here, output(text)))


def pack_place(text: str) -> str:
    """For `type=`: [NAME=]PATH, as `io.load_packs` takes."""
    name, equals, rest = text.partition("=")
    return place(text) if "/" in name or not equals else f"{name}={place(rest)}"


def seed(text: str) -> int:
    """For `type=`: a random seed, 0 to 2^32 - 1."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 2^32 - 1")
    return int(text)


def positive(text: str) -> int:
    """For `type=`: an integer of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def _here(text: str) -> str:
    if paths.is_remote(text):
        raise ValueError(f"{text} is in a bucket: this command needs a local path, copy it to this machine")
    return text


def _checked(check: Callable[[str], str], text: str) -> str:
    try:
        return check(text)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
