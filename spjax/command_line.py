"""The parser of the commands' flags: an error is one sentence, an unknown flag is answered with the nearest one."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from spjax import paths


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose errors are one sentence, with exit status 2, and without abbreviations.

    An unknown flag is reported before a missing one, which it may be meant for. `--helpfull` is `--help`, as of
    `spjax.main`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self.add_argument("--helpfull", action="help", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message in one line."""
        self.exit(2, f"error: {' '.join(message.split()).removeprefix('argument ')}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of `argparse`; the flags of a subcommand are checked by its own parser."""
        if args is not None:  # the outermost one is called by `parse_args`, which knows the process's own
            self._check_names(args)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As of `argparse`."""
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
    """The end of a message about an unknown flag: the known one that is most like it, else where they are listed."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f": did you mean {found[0]}?" if found else ": see --help"


def place(text: str) -> str:
    """A path as a flag gives it, for `type=`: `~` is expanded, file:// removed, URLs other than gs:// are refused."""
    return _checked(paths.given, text)


def place_or_none(text: str) -> str:
    """As `place`, or nothing."""
    return place(text) if text else text


def local_path(text: str) -> Path:
    """As `place`, not in a bucket."""
    return Path(_checked(_here, place(text)))


def output(text: str) -> str:
    """As `place`; something can be written there."""
    return _checked(paths.to_write, text)


def output_file(text: str) -> str:
    """As `output`, of a file."""
    return _checked(lambda given: paths.to_write(given, file=True), text)


def local_output(text: str) -> Path:
    """As `output`, not in a bucket."""
    return Path(_checked(_here, output(text)))


def pack_place(text: str) -> str:
    """As `place`, of what `storage.load_packs` takes: [NAME=]PATH."""
    name, equals, rest = text.partition("=")
    return place(text) if "/" in name or not equals else f"{name}={place(rest)}"


def seed(text: str) -> int:
    """The number that a draw starts from, for `type=`."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2^32 - 1")
    return int(text)


def positive(text: str) -> int:
    """How many of something there may be, one at least, for `type=`."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _here(text: str) -> str:
    if paths.is_remote(text):
        raise ValueError(f"{text} is in a bucket: this command wants a path of this machine, copy it here")
    return text


def _checked(check: Callable[[str], str], text: str) -> str:
    try:
        return check(text)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
