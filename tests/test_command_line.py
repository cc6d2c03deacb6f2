"""The flags of every command: help, unknown flags, and paths that are URLs or not writable."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from pathlib import Path
from typing import Any

import pytest

from spjax import cli, command_line, config_file
from spjax.command_line import Parser

ROOT = Path(__file__).resolve().parents[1]
INPUTS = (
    command_line.place,
    command_line.place_or_none,
    command_line.local_path,
    command_line.pack_place,
)
OUTPUTS = (command_line.output, command_line.output_file, command_line.local_output)


def commands() -> list[str]:
    """Modules that `python -m` runs, except `spjax.main`, which has absl's flags."""
    paths = [path for folder in ("spjax", "data_pipelines") for path in sorted((ROOT / folder).rglob("*.py"))]
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in paths
        if "\n    process.run(" in path.read_text()
    ]
    return [name for name in names if name != "spjax.main"]


class _Parsed(Exception):  # noqa: N818 - no error
    pass


def parsers(command: str, only_leaves: bool = True) -> dict[tuple[str, ...], Parser]:
    """The parsers of a command: its parser, or those of its subcommands by name; without `only_leaves` all of them."""
    found: list[Parser] = []

    def seen(self: Parser, *_: object) -> Any:
        found.append(self)
        raise _Parsed

    main = importlib.import_module(command).main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", seen)
        with pytest.raises(_Parsed):
            main([])
    (parser,) = found
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    found_below = {(name,): sub for action in below for name, sub in action.choices.items()}
    return found_below if found_below and only_leaves else {(): parser, **found_below}


def refused(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which a command line is refused, before anything is done."""
    with pytest.raises(SystemExit) as end:
        importlib.import_module(command).main(words)
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("command", commands())
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in parsers(command):
        for flag in ("--help", "--helpfull", "-h"):
            with pytest.raises(SystemExit) as end:
                importlib.import_module(command).main([*words, flag])
            assert end.value.code == 0
            assert f"usage: python -m {command.removesuffix('.__main__')}" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_fits_a_screen_and_starts_with_the_usual_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [f"spjax {name}"])
    monkeypatch.setenv("COLUMNS", "200")
    command = cli.COMMANDS[name][0]
    if command == "spjax.main":
        importlib.import_module(command)  # defines the flags
        pages = {(): config_file.help_text()}
    else:
        found = parsers("spjax.convert.__main__" if name == "convert" else command, only_leaves=False)
        pages = {words: parser.format_help() for words, parser in found.items()}
    for words, page in pages.items():
        lines = page.splitlines()
        assert len(lines) <= 50
        assert max(map(len, lines)) <= 100, max(lines, key=len)
        assert "python -m" not in page
        if not words:
            calls = [line for line in lines[: lines.index("", lines.index("") + 1)] if line.startswith("  ")]
            assert sum(f" spjax {name} " in line or " curl " in line for line in calls) == 3


ARGPARSE = re.compile(r"argument|choice|required|\bexpected|not allowed|invalid (int|float)|job")


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("spjax.packs", ["shwo"], "no command shwo: choose from show, merge, split, refresh, push, pull"),
        ("spjax.packs", [], "a command is missing: see --help"),
        ("spjax.packs", ["merge", "a"], "--out missing: see --help"),
        ("spjax.packs", ["split", "a", "b", "--out=c"], "unexpected b: see --help"),
        ("spjax.packs", ["push", "a", "b", "--private=1"], "--private takes no value, not '1': leave it out"),
        ("spjax.fetch", ["km50", "--out"], "--out needs a value: see --help"),
        ("spjax.fetch", ["km50", "km100"], "unexpected km100: see --help"),
        ("spjax.predict", ["--lm=a", "--packs=b", "--layer=x"], "--layer: 'x' is not an integer"),
        ("spjax.predict", ["--lm=a", "--packs=b", "--lowpass=x"], "--lowpass: 'x' is not a number"),
        ("spjax.predict", ["--lm=a", "--packs=b", "--compute=x"], "--compute: 'x' is unknown: choose from float32,"),
        ("data_pipelines.leaks", [], "give one of --task --splits --manifest --folders"),
        ("data_pipelines.leaks", ["--task=a", "--splits=b"], "--splits and --task exclude each other: leave one out"),
    ],
)
def test_messages_are_sentences(
    command: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(command, words, capsys)
    assert line.startswith(f"error: {message}")
    assert not ARGPARSE.search(line)


@pytest.mark.parametrize("command", commands())
def test_a_misspelt_flag_is_corrected(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is reported before missing flags, since it may be one of them; abbreviations are unknown too."""
    for words, parser in parsers(command).items():
        flags = [f for f in parser._option_string_actions if f.startswith("--") and f not in ("--help", "--helpfull")]
        for flag in flags:
            for typo in (f"{flag[:-2]}{flag[-1]}{flag[-2]}x", f"{flag}s"):
                assert f"unknown flag {typo}: did you mean --" in refused(command, [*words, f"{typo}=1"], capsys)
    assert "unknown flag --zzzzzz: see --help" in refused(command, [*words, "--zzzzzz"], capsys)


BAD = {
    "https://host/a.wav": "https:// address, which is not supported",
    "http://host/a": "http:// address",
    "HTTPS://host/a": "https:// address",
    "https:/host/a": "https:// address",
    "s3://bucket/key": "give their path or gs://BUCKET/PATH",
    "hdfs://host/x": "hdfs:// address",
    "file://host/a": "is on another machine",
    "gs:/bucket/x": "write gs://BUCKET/PATH",
    "GS://bucket/x": "write gs://BUCKET/PATH",
    "gs://": "write gs://BUCKET/PATH",
    "C:\\data\\a.wav": "is a Windows path",
    "": "is not a path",
    "  ": "is not a path",
}


@pytest.mark.parametrize("command", commands())
def test_urls_are_refused_wherever_a_path_is_taken(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every flag and argument for a file or directory, and nothing is created."""
    monkeypatch.chdir(tmp_path)
    sound = re.compile(r"\b(PATH|DIR|FILE|CSV|SRC|OUT|BANK|PACK|RECORDS|LM|FOLDER)\b|directory|folder|\bfile\b")
    for words, parser in parsers(command).items():
        before: list[str] = list(words)
        for action in parser._actions:
            path = action.type in (*INPUTS, *OUTPUTS)
            named = f"{action.metavar or ''} {action.help or ''}"
            if not path:
                other = action.nargs == 0 or action.choices or action.type in (int, float) or action.dest == "name"
                assert other or not sound.search(named), f"{action.dest} is a path"
                before += [] if action.option_strings else ["x"]
                continue
            for bad, why in BAD.items():
                given = [f"{action.option_strings[0]}={bad}"] if action.option_strings else [bad]
                if bad or action.type is not command_line.place_or_none:
                    assert why in refused(command, [*before, *given], capsys)
            before += [] if action.option_strings else [str(tmp_path)]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", commands())
def test_an_unwritable_path_is_refused_before_any_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below a file, which fails for root too, and where the system refuses; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    places = ["file/out", *(["/proc/out"] if Path("/proc/self").exists() else [])]
    for words, parser in parsers(command).items():
        before: list[str] = list(words)
        for action in parser._actions:
            for place in places if action.type in OUTPUTS else ():
                given = [f"{action.option_strings[0]}={place}"] if action.option_strings else [place]
                line = refused(command, [*before, *given], capsys)
                assert f"{place} cannot be written (" in line
                assert "choose another place" in line
                assert ".spjax-" not in line
            before += [] if action.option_strings else ["file"]
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("given", ["-1", "1.5", "", "x", str(2**32)])
def test_bad_seeds(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="it")
    parser.add_argument("--seed", type=command_line.seed)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--seed={given}"])
    assert f"--seed: {given!r} is not an integer from 0" in capsys.readouterr().err
    assert parser.parse_args(["--seed=7"]).seed == 7
