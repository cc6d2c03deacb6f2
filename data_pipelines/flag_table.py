"""Flags that name recordings and what encodes them, for argparse here and for absl in `spjax.main`: one table for both.

It imports nothing that takes time, since `spjax.main` answers wrong flags before it loads anything.
"""

from __future__ import annotations

from typing import Any

from spjax.command_line import place, seed

# By name: the kind of the value, and the help text.
FLAGS: dict[str, tuple[str, str]] = {
    "folders": ("path", "your own data: a folder a class, maybe below a folder a split"),
    "manifest": ("path", "your own data: a CSV with columns path, labels, maybe split, speaker, ..."),
    "raw": ("path", "root of the unpacked data set, or of the paths in --manifest (its folder)"),
    "labels": ("text", "label columns of --manifest, with commas (by default all unknown columns)"),
    "text": ("text", "columns of --manifest: free text, no labels, maybe with line ends"),
    "crops": ("switch", "columns start, duration of --manifest: crops, in seconds"),
    "source": ("text", "column of --manifest that says what recordings were cut from"),
    "metric": ("text", "of your own data (accuracy; exact_match of several label columns)"),
    "split-seed": ("seed", "random seed of splits made for your own data (0)"),
    "protocol": ("text", "splits of a data set that spjax knows: paper, honest, a fold (paper)"),
    "encoder": ("path", "mfcc, log_mel, tiny, or the directory of a HuBERT, wav2vec2, WavLM or Whisper"),
    "kmeans": ("path", "directory of the k-means of the encoder's features; tiny has its own"),
    "on-error": ("text", "at a file that cannot be used: stop, or skip (stop)"),
}  # fmt: skip
_ARGPARSE: dict[str, dict[str, Any]] = {
    "path": {"type": place},
    "text": {},
    "switch": {"action": "store_true"},
    "seed": {"type": seed},
}


def add(parser: Any, name: str, **settings: Any) -> None:
    """Add a flag of the table to a parser of argparse, or to a group of one; `settings` are those of `add_argument`."""
    kind, text = FLAGS[name]
    parser.add_argument(f"--{name}", **{"help": text.replace("%", "%%"), **_ARGPARSE[kind], **settings})


def words(values: dict[str, Any]) -> list[str]:
    """Flags of the table as a command line has them; those without a value are left out."""
    given = {name: value for name, value in values.items() if value not in (None, False)}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
