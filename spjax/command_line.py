"""Argument parser of the commands: errors are one sentence, and an unknown flag suggests the closest known one."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from spjax import paths

_TEXTS = ("prog", "usage", "description", "epilog")


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` without abbreviations, whose errors are one sentence with exit status 2.

    An unknown flag is reported before a missing one, since it may be a typo of it. `--helpfull` is accepted like
    `--help`, as in `spjax.main`.
    """

    def __init__(self, **settings: Any) -> None:
        if sys.argv[0].startswith("spjax "):  # called by `spjax.cli`
            called = settings.get("prog", "")
            texts = {name: text for name, text in settings.items() if name in _TEXTS and text}
            settings |= {name: text.replace(called, sys.argv[0]) for name, text in texts.items() if called}
        super().__init__(allow_abbrev=False, **settings)
        self.add_argument("--helpfull", action="help", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message in one line."""
        self.exit(2, f"error: {' '.join(message.split()).removeprefix('argument ')}\n")

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
