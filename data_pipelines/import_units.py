"""Imports units from text files as unit records.

    python -m data_pipelines.import_units --task=fsc --src=UNITS/fsc --out=RECORDS/fsc
    python -m data_pipelines.import_units --task=home --slots=slots.json --src=UNITS/home --out=RECORDS/home
    python -m data_pipelines.import_units --task=home --slots=slots.json --labels=names --src=DIR --out=DIR

A split is `SRC/<split>.txt`, one utterance a line: units, `<s>` and one label a slot, in the order of the slots. A
label is a class id over all slots, or with `--labels=names` a name, with slots separated by `|`:

    71 12 56 12 63 <s> 0 6 20
    71 12 56 12 63 <s> change language | none | none

`SRC/<split>.named`, beside or instead of the text, names the utterances, `file|units|labels`. A new task needs
`--slots`, a JSON file of its slots and labels in class order: {"action": ["turn on", "turn off"], "room": ["none"]}.
Durations are unknown, and units are assumed to be merged unless many equal the one before (docs/unit_text.md).
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from spjax import process

    process.run("data_pipelines.import_units")

import argparse
import hashlib
import io
import itertools
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from data_pipelines.splits import BuildError, read_text
from spjax.command_line import Parser, output, place
from spjax.data.records import Card
from spjax.data.tfrecords import RecordError
from spjax.data.write_records import Utterance, write_unit_records
from spjax.io import places
from spjax.tasks import METRICS, TASKS, Slot, Task

SPLITS = ("train", "valid", "test")
SEPARATOR = "<s>"
MOST_EQUAL = 0.15  # of neighbouring units that may be equal in merged text (chunk borders); unmerged text has about 0.4


def import_units(
    task: Task | str,
    src: str | Path,
    out: str | Path,
    *,
    splits: Sequence[str] = SPLITS,
    labels: Literal["ids", "names"] = "ids",
    dedup: bool = False,
    shards: int | None = None,
    overwrite: bool = False,
    vocabulary: int = 100,
    **made_by: Any,
) -> Card:
    """Reads unit text (see the module for the format), checks every line, and writes unit records.

    Args:
      task: a task, or the name of one in `spjax.tasks.TASKS`.
      src: directory of the text.
      out: directory of the records.
      splits: names of the splits to import.
      labels: "ids" for class ids over all slots, "names" for label names separated by `|`.
      dedup: drop lines that repeat an earlier one (including the file name, if there is one). The split "test" keeps
        every line, so that its scores stay comparable.
      shards: files a split; see `write_unit_records`.
      overwrite: replace existing records.
      vocabulary, made_by: number of units and fields of `Card` that describe their origin (encoder, layer, kmeans).

    Returns:
      The card of the records.

    Raises:
      RecordError: a missing file or an invalid line; names file, line, value and a fix.
    """
    task = _known_task(task) if isinstance(task, str) else task
    if vocabulary < 1:
        raise RecordError(f"vocabulary is {vocabulary}: give the number of units, at least 1")
    read, sources, notes = {}, {}, []
    pairs = equal = 0
    for split in splits:
        utterances, repeats, files = _read_split(places.at(src), split, task, vocabulary, labels)
        total = len(utterances)
        drop = dedup and split != "test"
        if drop:
            utterances = [one for one, again in zip(utterances, repeats, strict=True) if not again]
        if any(repeats):
            what = "dropped" if drop else "kept"
            notes.append(f"{split}: {sum(repeats)} of {total} lines repeat an earlier one, {what}")
        runs = [sum(a == b for a, b in itertools.pairwise(one.units)) for one in utterances]
        pairs, equal = pairs + sum(len(one.units) - 1 for one in utterances), equal + sum(runs)
        if any(runs):
            many = sum(map(bool, runs))
            notes.append(
                f"{split}: {many} of {len(runs)} lines have equal neighbouring units, which merging would remove"
            )
        read[split] = utterances
        sources.update(files)
    if task.name == "gsc" and notes:
        notes.append("gsc: the published train and valid are class-balanced resamples with replacement")
    merged = equal <= MOST_EQUAL * pairs
    how = "were merged" if merged else "were not merged, as many equal the one before,"
    notes.append(f"units {how} before they were written as text: durations are unknown")
    return write_unit_records(
        out,
        task,
        read,
        shards=shards,
        overwrite=overwrite,
        vocabulary=vocabulary,
        **made_by,
        merged=merged,
        sources=sources,
        notes=notes,
    )


def read_slots(path: str | Path, name: str, metric: str | None = None) -> Task:
    """Reads a task from a JSON file `{"slot": ["label", ...], ...}`; slots and labels in class order.

    The metric defaults to accuracy for one slot and to exact_match for several.

    Raises:
      RecordError: the file is missing or has another format.
    """
    try:
        slots = json.loads(read_text(places.at(path)), object_pairs_hook=_pairs)
        if not isinstance(slots, list) or not slots or not all(isinstance(pair, tuple) for pair in slots):
            raise ValueError("it names no slots")
        for slot, labels in slots:
            if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
                raise ValueError(f"the labels of {slot!r} are not a list of strings")
        rows = tuple(Slot(slot, tuple(labels)) for slot, labels in slots)
        return Task(name, rows, metric or ("accuracy" if len(rows) == 1 else "exact_match"))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RecordError(f'{path} is not a JSON object {{"slot": ["label", ...], ...}}: {error}') from error


def main(argv: Sequence[str] | None = None) -> None:
    """The command line (`--help`)."""
    parser = Parser(prog="python -m data_pipelines.import_units", description=__doc__)
    parser.add_argument("--task", metavar="NAME", required=True, help="one that spjax knows, or a new name and --slots")
    add_import_flags(parser, "directory of <split>.txt and <split>.named")
    text = parser.add_argument_group("text")
    text.add_argument("--labels", metavar="FORM", choices=("ids", "names"), default="ids", help="ids or names (ids)")
    text.add_argument("--splits", metavar="A,B", default=",".join(SPLITS), help="splits to import (%(default)s)")
    text.add_argument("--dedup", action="store_true", help="drop repeated lines of every split but test")
    text.add_argument("--shards", metavar="N", type=int, help="files a split (default: one for 50,000 utterances)")
    new = parser.add_argument_group("new task")
    new.add_argument("--slots", metavar="FILE", type=place, help='JSON {"slot": ["label", ...], ...}')
    new.add_argument(
        "--metric",
        metavar="NAME",
        choices=tuple(METRICS),
        help=f"{', '.join(METRICS)} (accuracy; exact_match of several slots)",
    )
    args = parser.parse_args(argv)
    try:
        if args.slots and args.task in TASKS:
            raise RecordError(f"task {args.task} is known and has its own slots: leave --slots out or rename the task")
        if args.metric and not args.slots:
            raise RecordError(f"--metric={args.metric} is for a new task, described with --slots=slots.json")
        card = import_units(
            read_slots(args.slots, args.task, args.metric) if args.slots else args.task,
            args.src,
            args.out,
            splits=[split.strip() for split in args.splits.split(",") if split.strip()],
            labels=args.labels,
            dedup=args.dedup,
            shards=args.shards,
            **import_settings(args),
        )
    except (RecordError, OSError) as error:
        sys.exit(f"error: {error}")
    print_card(card, args.out)


def add_import_flags(parser: argparse.ArgumentParser, src: str) -> None:
    """Adds the flags of every import: input, output, and origin of the units. `src` is the help of --src."""
    parser.add_argument("--src", metavar="DIR", type=place, required=True, help=src)
    parser.add_argument(
        "--out", metavar="DIR", type=output, required=True, help="unit records to make (local or gs://)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing records in --out")
    units = parser.add_argument_group("origin of the units")
    for name, default, text in (
        ("vocabulary", 100, "number of units"), ("encoder", "hubert_base_ls960", "speech encoder"),
        ("layer", 6, "layer of the encoder"), ("kmeans", "km100", "id of the k-means"),
    ):  # fmt: skip
        units.add_argument(
            f"--{name}", metavar="N" if isinstance(default, int) else "NAME", type=type(default), default=default,
            help=f"{text} (%(default)s)",
        )  # fmt: skip


def import_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the values of the flags of `add_import_flags` as keyword arguments of the imports."""
    return {name: getattr(args, name) for name in ("overwrite", "vocabulary", "encoder", "layer", "kmeans")}


def print_card(card: Card, out: str) -> None:
    """Prints a summary of the records made."""
    for split, count in card.counts.items():
        print(f"{split}: {count:,} utterances in {len(card.shards[split])} file(s)")
    for note in card.notes:
        print(f"note: {note}")
    print(f"unit records: {out}")


def _known_task(name: str) -> Task:
    if name not in TASKS:
        raise RecordError(
            f"unknown task {name!r}: choose {', '.join(TASKS)}, or describe it with --slots=slots.json of "
            "data_pipelines.import_units"
        )
    return TASKS[name]


def _pairs(pairs: list[tuple[str, object]]) -> list[tuple[str, object]]:
    """Keeps a JSON object as pairs, so that duplicate slots are detected."""
    return pairs


def _read_split(
    src: Path, split: str, task: Task, vocabulary: int, labels: str
) -> tuple[list[Utterance], list[bool], dict[str, str]]:
    """Returns utterances, whether each repeats an earlier line, and the sha256 of the files read."""
    text, named = src / f"{split}.txt", src / f"{split}.named"
    lines_of = {path: _lines(path) for path in (text, named) if path.exists()}
    if not lines_of:
        raise RecordError(
            f"{text} is missing, and so is {named.name}: put it there, or import other --splits by "
            "data_pipelines.import_units"
        )
    if len(lines_of) == 2 and len(lines_of[text]) != len(lines_of[named]):
        raise RecordError(
            f"{named} has {len(lines_of[named])} lines where {text.name} has {len(lines_of[text])}: "
            "they must have the same utterances, remove the one that is out of date"
        )
    path = named if named in lines_of else text
    unit_of = {str(unit): unit for unit in range(vocabulary)}
    class_of = [_classes_of(slot, first, labels) for slot, first in zip(task.slots, task.slot_offsets, strict=False)]

    utterances: list[Utterance] = []
    repeats: list[bool] = []
    seen: set[str] = set()
    times: Counter[str] = Counter()
    for number, line in enumerate(tqdm(lines_of[path], desc=f"{path.name}", unit=" lines", leave=False), start=1):
        where = f"{path}, line {number}"
        name, units, labels_text = _parts(line, named=path is named, where=where)
        expected = [*units.split(), SEPARATOR, *labels_text.split()]
        if len(lines_of) == 2 and lines_of[text][number - 1].split() != expected:
            raise RecordError(f"{where} and the same line of {text.name} differ: remove the file that is out of date")
        utterances.append(
            Utterance(
                id=_unique(name, times) if name else f"{split}-{number - 1:06d}",
                units=_units(units, unit_of, where),
                classes=_classes(labels_text, task, class_of, labels, where),
                provenance=f"{path.name}:{number}",
            )
        )
        same = " ".join(line.split())
        repeats.append(same in seen)
        seen.add(same)
    return utterances, repeats, {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in lines_of}


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.rstrip("\n") for line in io.StringIO(read_text(path), newline=None)]
    except BuildError as error:
        raise RecordError(str(error)) from error
    if not lines:
        raise RecordError(f"{path} is empty: fill it, or import other --splits by data_pipelines.import_units")
    return lines


def _parts(line: str, named: bool, where: str) -> tuple[str, str, str]:
    """Splits a line into (file name or "", units, labels)."""
    if named:
        parts = line.split("|", 2)
        if len(parts) < 3 or not parts[0].strip():
            raise RecordError(f"{where}: {_short(line)} is not `file|units|labels`")
        return parts[0].strip(), parts[1], parts[2]
    units, separator, labels = line.partition(SEPARATOR)
    if not separator:
        raise RecordError(
            f"{where}: {_short(line)} has no {SEPARATOR} between units and labels: add it, or drop the line"
        )
    return "", units, labels


def _units(text: str, unit_of: Mapping[str, int], where: str) -> list[int]:
    words = text.split()
    if not words:
        raise RecordError(f"{where}: the utterance has no units: drop the line")
    try:
        return [unit_of[word] for word in words]
    except KeyError as error:
        word = error.args[0]
        last = len(unit_of) - 1
        if word.isascii() and word.lstrip("-").isdigit():
            raise RecordError(
                f"{where}: unit {word} is not one of 0..{last} without leading zeros: "
                "correct it, or import with another number of units by --vocabulary of data_pipelines.import_units"
            ) from None
        raise RecordError(f"{where}: {word!r} is not a unit (a number in 0..{last}): correct the line") from None


def _classes_of(slot: Slot, first: int, labels: str) -> dict[str, int]:
    """Maps every text that a slot's label may have to its class id."""
    ids = range(first, first + len(slot.labels))
    return dict(zip(slot.labels if labels == "names" else map(str, ids), ids, strict=True))


def _classes(text: str, task: Task, class_of: Sequence[Mapping[str, int]], labels: str, where: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split("|")] if labels == "names" else text.split()
    if len(words) != len(class_of) or not all(words):
        form = "labels separated by |" if labels == "names" else "class ids separated by spaces"
        raise RecordError(
            f"{where}: {_short(text.strip())} should be {len(class_of)} {form}, "
            f"for {', '.join(slot.name for slot in task.slots)}: correct the line"
        )
    for word, slot, known in zip(words, task.slots, class_of, strict=True):
        if word not in known:
            others = [other.name for other, its in zip(task.slots, class_of, strict=True) if word in its]
            also = f" (it is one of slot {others[0]!r})" if others else ""
            raise RecordError(
                f"{where}: {word!r} is not a label of slot {slot.name!r} of {task.name}{also}: "
                f"correct it to one of {_short(', '.join(known), 200)}"
            )
    return tuple(known[word] for word, known in zip(words, class_of, strict=True))


def _unique(name: str, times: Counter[str]) -> str:
    """Makes a name unique: resampled sets repeat a file, whose second occurrence is named `name#2`."""
    times[name] += 1
    return name if times[name] == 1 else f"{name}#{times[name]}"


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
