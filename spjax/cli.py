"""`spjax COMMAND ...`, also `python -m spjax COMMAND ...`: every command under one name."""

from __future__ import annotations

import runpy
import sys

from spjax.command_line import nearest

USAGE = """usage: spjax COMMAND [--flag=value ...]

  spjax train --config=configs/demo.py --workdir=runs/demo        see the whole chain on synthesised speech
  spjax train --config=configs/own.py --folders=DIR               your recordings, a folder a class
  spjax predict --lm=tiny --encoder=tiny --packs=PACK FILE.wav    classify recordings
"""
# By name: the module, and what it does.
COMMANDS = {
    "train": ("spjax.main", "train adapters or prompts, or a unit LM, and score them on test"),
    "predict": ("spjax.predict", "classify recordings, or score packs on unit records"),
    "serve": ("spjax.serve", "a web page and an HTTP API"),
    "packs": ("spjax.packs", "show, merge, split, push and pull prompt packs"),
    "inspect": ("spjax.inside", "interpret trained prompts: tables and plots"),
    "convert": ("spjax.convert", "import models of fairseq, Hugging Face and scikit-learn"),
    "fetch": ("spjax.fetch", "download published models and data sets"),
    "extract": ("data_pipelines.extract", "recordings to unit records"),
    "import-units": ("data_pipelines.import_units", "unit text to unit records"),
    "fit-kmeans": ("data_pipelines.fit_kmeans", "fit a k-means to the features of an encoder"),
    "leaks": ("data_pipelines.leaks", "find recordings and speakers that are in several splits"),
}


def main() -> None:
    """Run the command that the command line names.

    Raises:
      SystemExit: as the command; with status 2 after a message, if there is no such command.
    """
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "--helpfull"):
        listed = [f"  {command:13} {text}" for command, (_, text) in COMMANDS.items()]
        print("\n".join([USAGE, "commands:", *listed, "", "spjax COMMAND --help has the flags of a command"]))
        return
    if name not in COMMANDS:
        print(f"error: no command {name}{nearest(name, list(COMMANDS))}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"spjax {name}", *rest]
    runpy.run_module(COMMANDS[name][0], run_name="__main__")
