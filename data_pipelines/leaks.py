"""Reports leaks of a split: speakers, recordings or files in two splits, and labels that follow from other facts.

    python -m data_pipelines.leaks --task=lt_sc --raw=RAW/lt_sc
    python -m data_pipelines.leaks --task=lt_sc --raw=RAW/lt_sc --protocol=honest --out=SPLITS/lt_sc
    python -m data_pipelines.leaks --manifest=my.csv

The report is printed as Markdown. With `--out` it is saved there as `leaks.md` and `leaks.json`, with the manifests of
the splits (data_pipelines/split_manifests.py), which other commands read by `--splits`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from spjax import process

    process.run("data_pipelines.leaks")

import dataclasses
import itertools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from etils import epath

from data_pipelines import data_flags
from data_pipelines.clips import Clip
from data_pipelines.split_manifests import FileFacts, inspect_files, write_splits
from data_pipelines.splits import BuildError
from spjax.command_line import Parser, output
from spjax.tasks import Task

EXAMPLES = 5  # shared values listed in a report
PREDICTABLE = 0.99  # fraction of clips from which a label that follows from another fact is reported


@dataclasses.dataclass(frozen=True)
class Shared:
    """Values that occur in two splits.

    Attributes:
      what: "speaker", "source", "id", "path" or "content" (files equal byte for byte, whatever their names).
      splits: the two splits, in order.
      count: number of distinct values in both.
      clips: number of clips with these values in each split.
      examples: a few of the values; for content, a file of each split.
    """

    what: str
    splits: tuple[str, str]
    count: int
    clips: tuple[int, int]
    examples: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LabelCue:
    """A fact that predicts a label without the audio and occurs in two splits.

    Attributes:
      slot: of the label.
      by: "speaker" or "sampling rate".
      right: fraction of clips with the most frequent label of their speaker or rate.
      chance: fraction of clips with the most frequent label of all.
      parts: each label occurs with one value only, so that the value separates groups of labels.
    """

    slot: str
    by: str
    right: float
    chance: float
    parts: bool


@dataclasses.dataclass(frozen=True)
class LeakReport:
    """Leaks of a split; all counts are of clips.

    Attributes:
      task, protocol: the task, and how the splits were made.
      counts: split → clips.
      speakers: split → known speakers. They are not counted as shared if the speaker is a label.
      speakerless: split → clips without a speaker.
      labels: slot → label → split → clips.
      missing: (slot, label, split) of labels that a split lacks.
      shared: values that occur in two splits.
      told: labels that follow from a speaker or a sampling rate.
      rates: sampling rate → clips; empty if files were not read.
    """

    task: str
    protocol: str
    counts: dict[str, int]
    speakers: dict[str, int]
    speakerless: dict[str, int]
    labels: dict[str, dict[str, dict[str, int]]]
    missing: tuple[tuple[str, str, str], ...]
    shared: tuple[Shared, ...]
    told: tuple[LabelCue, ...]  # a key of leaks.json
    rates: dict[int, int]

    @property
    def clean(self) -> bool:
        """Whether nothing is shared, missing or predictable."""
        return not (self.shared or self.missing or self.told)

    def json(self) -> str:
        """Returns the report as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    def markdown(self) -> str:
        """Returns the report as Markdown."""
        splits = list(self.counts)
        lines = [f"# Leaks of {self.task}, protocol {self.protocol}", ""]
        lines += _table(
            ["", *splits],
            [
                ["clips", *(f"{self.counts[split]:,}" for split in splits)],
                ["speakers", *(f"{self.speakers[split]:,}" for split in splits)],
                ["clips without speaker", *(f"{self.speakerless[split]:,}" for split in splits)],
            ],
        )
        lines += ["", "## In two splits", ""]
        lines += [_shared_line(one) for one in self.shared] or ["None found."]
        if not any(self.speakers.values()):
            lines.append("Speakers are unknown.")
        if not self.rates:
            lines.append("Contents of files were not compared.")
        lines += ["", "## Labels predictable without the audio", ""]
        lines += [
            f"- **{one.slot}** from the {one.by}: right for {one.right:.1%} of the clips (most frequent label: "
            f"{one.chance:.1%})" + ("; each label occurs with one value only" if one.parts else "")
            for one in self.told
        ] or ["None found."]
        if len(self.rates) > 1:
            rates = ", ".join(f"{rate:,} Hz {count:,}" for rate, count in sorted(self.rates.items()))
            lines += ["", f"Sampling rates, in clips: {rates}."]
        lines += ["", "## Labels", ""]
        for slot, of_label in self.labels.items():
            rows = [[label, *(f"{number[split]:,}" for split in splits)] for label, number in of_label.items()]
            lines += [*_table([slot, *splits], rows), ""]
        if self.missing:
            lines += [f"- {split} lacks **{label}** ({slot})" for slot, label, split in self.missing] + [""]
        return "\n".join(lines)


def leak_report(
    task: Task, splits: Mapping[str, Sequence[Clip]], protocol: str, files: Mapping[str, FileFacts] | None = None
) -> LeakReport:
    """Analyses splits for leaks.

    Args:
      task: the task of the labels.
      splits: clips by split.
      protocol: how the splits were made, for the report.
      files: the result of `inspect_files`; None skips the comparison of contents and sampling rates.
    """
    every = [clip for clips in splits.values() for clip in clips]
    labels = {}
    for column, slot in enumerate(task.slots):
        number = {split: Counter(clip.labels[column] for clip in clips) for split, clips in splits.items()}
        labels[slot.name] = {label: {split: number[split][label] for split in splits} for label in slot.labels}
    keys: dict[str, Callable[[Clip], str]] = {
        "speaker": lambda clip: clip.speaker,
        "source": lambda clip: clip.source,
        "id": lambda clip: clip.id,
        "path": lambda clip: clip.path,
    }
    if any(all(clip.labels[column] == clip.speaker for clip in every) for column in range(len(task.slots))):
        del keys["speaker"]  # the speaker is a label, so every split must have all speakers
    cues = []
    if "speaker" in keys:
        # A speaker of one split alone predicts nothing about the others
        times = Counter(speaker for clips in splits.values() for speaker in {clip.speaker for clip in clips} - {""})
        cues = _cues(task, every, "speaker", {clip: clip.speaker for clip in every if times[clip.speaker] > 1})
    if files is not None:
        # Equal contents under the same path are reported as `path` already
        keys["content"] = lambda clip: files[clip.path].sha256
        cues += _cues(task, every, "sampling rate", {clip: str(files[clip.path].rate) for clip in every})
    return LeakReport(
        task=task.name,
        protocol=protocol,
        counts={split: len(clips) for split, clips in splits.items()},
        speakers={split: len({clip.speaker for clip in clips} - {""}) for split, clips in splits.items()},
        speakerless={split: sum(not clip.speaker for clip in clips) for split, clips in splits.items()},
        labels=labels,
        missing=tuple(
            (slot, label, split)
            for slot, of_label in labels.items()
            for label, number in of_label.items()
            for split in splits
            if not number[split]
        ),
        shared=tuple(
            found
            for what, key in keys.items()
            for one, other in itertools.combinations(splits, 2)
            if (found := _shared(what, key, (one, other), splits))
        ),
        told=tuple(cues),
        rates=dict(Counter(files[clip.path].rate or 0 for clip in every)) if files is not None else {},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line (`--help`)."""
    parser = Parser(prog="python -m data_pipelines.leaks", description=__doc__)
    data_flags.add_data_flags(parser)
    parser.add_argument("--no-files", action="store_true", help="do not read the audio: no hashes, no rates")
    parser.add_argument("--out", metavar="DIR", type=output, help="directory for report and splits (local or gs://)")
    args = parser.parse_args(argv)
    try:
        if args.out and args.no_files:
            raise BuildError("--out writes the hashes of files too: leave --no-files out")
        data = data_flags.chosen(args, unit_text=True)
        place = epath.Path(args.splits or args.manifest or args.folders or "")
        protocol = (args.protocol or "paper") if args.task else f"as given by {place.name}, seed {args.split_seed or 0}"
        paths = [clip.path for clips in data.splits.values() for clip in clips]
        files = None if args.no_files else inspect_files(data.raw, paths)
        report = leak_report(data.task, data.splits, protocol, files)
        if args.out and files is not None:
            notes = () if args.task or args.splits else data.notes  # for the former two, the only note is the protocol
            write_splits(args.out, data.task, data.splits, files, protocol, notes)
            (epath.Path(args.out) / "leaks.md").write_text(report.markdown())
            (epath.Path(args.out) / "leaks.json").write_text(report.json())
    except (BuildError, OSError) as error:
        sys.exit(f"error: {error}")
    print(report.markdown())


def _shared(
    what: str, key: Callable[[Clip], str], pair: tuple[str, str], splits: Mapping[str, Sequence[Clip]]
) -> Shared | None:
    sides: list[dict[str, list[Clip]]] = []
    for split in pair:
        of_value = defaultdict(list)
        for clip in splits[split]:
            if key(clip):
                of_value[key(clip)].append(clip)
        sides.append(of_value)
    both = sorted(sides[0].keys() & sides[1].keys())
    if what == "content":
        both = [value for value in both if len({clip.path for side in sides for clip in side[value]}) > 1]
    if not both:
        return None
    examples = both[:EXAMPLES]
    if what == "content":
        examples = [" = ".join(side[value][0].path for side in sides) for value in examples]
    taken = tuple(sum(len(side[value]) for value in both) for side in sides)
    return Shared(what, pair, len(both), (taken[0], taken[1]), tuple(examples))


def _cues(task: Task, every: Sequence[Clip], by: str, values: Mapping[Clip, str]) -> list[LabelCue]:
    """Finds slots whose label follows from a value; needs two or more values with two clips each on average."""
    found = []
    known = [clip for clip in every if clip in values]
    number = len(set(values.values()))
    if not 2 <= number <= len(known) / 2:
        return []
    for column, slot in enumerate(task.slots):
        of_value: dict[str, Counter[str]] = defaultdict(Counter)
        for clip in known:
            of_value[values[clip]][clip.labels[column]] += 1
        right = sum(max(labels.values()) for labels in of_value.values()) / len(known)
        chance = max(Counter(clip.labels[column] for clip in known).values()) / len(known)
        values_of = Counter(label for labels in of_value.values() for label in labels)
        parts = max(values_of.values()) == 1
        if chance < PREDICTABLE and (right >= PREDICTABLE or parts):
            found.append(LabelCue(slot.name, by, right, chance, parts))
    return found


def _shared_line(one: Shared) -> str:
    first, second = one.splits
    names = ", ".join(f"`{example}`" for example in one.examples) + (", ..." if one.count > len(one.examples) else "")
    return (
        f"- **{one.what}**, {first} and {second}: {one.count:,} ({one.clips[0]:,} clips of {first}, "
        f"{one.clips[1]:,} of {second}): {names}"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
