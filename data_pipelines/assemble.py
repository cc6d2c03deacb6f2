"""Assembles unit records from extracted parts: segments, speaker-normalised f0, labels and provenance of each clip."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from tqdm import tqdm

from data_pipelines import parts
from data_pipelines.clips import Clip, Splits
from data_pipelines.parts import Part
from spjax.data.write_records import Utterance
from spjax.encoders import prosody
from spjax.tasks import Task


def refused(made: Mapping[int, Part]) -> dict[int, str]:
    """Returns the reason for each refused clip, by clip number over all splits."""
    return _messages({number: part.refused for number, part in made.items()})


def repaired(made: Mapping[int, Part]) -> dict[int, str]:
    """Returns the repairs of each repaired clip, by clip number over all splits."""
    return _messages({number: part.repaired for number, part in made.items()})


def _messages(made: Mapping[int, np.ndarray]) -> dict[int, str]:
    return {
        number * parts.CLIPS_PER_PART + row: str(message)
        for number, rows in made.items()
        for row, message in enumerate(rows)
        if message
    }


def write_report(
    out: epath.Path, splits: Splits, refused: Mapping[int, str], repaired: Mapping[int, str] | None = None
) -> list[str]:
    """Writes refused and repaired clips to `OUT-refused.jsonl` and `OUT-repaired.jsonl`, and prints them.

    Args:
      out: directory of the records.
      splits: the clips.
      refused, repaired: message by clip number over all splits.

    Returns:
      Notes for the card: counts for each split.
    """
    every = [(split, clip) for split, clips in splits.items() for clip in clips]
    notes = []
    for kind, messages in (("refused", refused), ("repaired", repaired or {})):
        report = out.parent / f"{out.name}-{kind}.jsonl"
        report.unlink(missing_ok=True)
        if not messages:
            continue
        rows = [
            {"split": every[i][0], "id": every[i][1].id, "path": every[i][1].path, "why": messages[i]} for i in messages
        ]
        report.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        # A refusal contains the file name already. One file may hold many clips, so repeats are printed once.
        lines = messages.values() if kind == "refused" else (f"{row['path']}: {row['why']}" for row in rows)
        for line in dict.fromkeys(lines):
            tqdm.write(f"{kind}: {line}", file=sys.stderr)
        counts = Counter(row["split"] for row in rows)
        notes += [
            f"{split}: {counts[split]} of {len(clips)} clips were {kind}"
            for split, clips in splits.items()
            if counts[split]
        ]
    return notes


def utterances(task: Task, splits: Splits, made: Sequence[Part], f0: bool) -> dict[str, list[Utterance]]:
    """Makes the records of every split, without refused clips.

    Args:
      task: the task of the labels.
      splits: the clips.
      made: all parts, in order.
      f0: add f0, normalised by speaker.
    """
    counts, units, durations, pitch, voiced, rates, *_ = (np.concatenate(arrays) for arrays in zip(*made, strict=True))
    ends = np.cumsum(counts)
    every = [(split, clip) for split, clips in splits.items() for clip in clips]
    segments = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    of_speaker: dict[str, list[slice]] = defaultdict(list)
    for (_, clip), where in zip(every, segments, strict=True):
        of_speaker[clip.speaker].append(where)
    mean_of = {
        speaker: prosody.voiced_mean(*(np.concatenate([stream[where] for where in its]) for stream in (pitch, voiced)))
        for speaker, its in of_speaker.items()
        if speaker
    }
    found: dict[str, list[Utterance]] = {split: [] for split in splits}
    for row, (split, clip) in enumerate(every):
        if not counts[row]:
            continue
        where = segments[row]
        crop = f" from {_seconds(clip.start)} s" if clip.start or clip.duration else ""
        crop += f" for {_seconds(clip.duration)} s" if clip.duration else ""
        found[split].append(
            Utterance(
                id=clip.id,
                units=units[where],
                classes=classes(clip, task),
                durations=durations[where],
                f0=prosody.normalise(pitch[where], voiced[where], mean_of.get(clip.speaker)) if f0 else None,
                provenance=f"{clip.path}{crop}, {rates[row]} Hz",
            )
        )
    return found


def classes(clip: Clip, task: Task) -> list[int]:
    """Returns the class ids of a clip's labels, numbered over all slots."""
    labels = zip(clip.labels, task.slots, task.slot_offsets[:-1], strict=True)
    return [first + slot.labels.index(label) for label, slot, first in labels]


def _seconds(number: float) -> str:
    """Formats seconds without loss of precision."""
    return repr(float(number)).removesuffix(".0")
