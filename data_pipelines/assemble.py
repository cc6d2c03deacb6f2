"""From parts to unit records: every clip's own segments, its speaker's mean f0, its labels, where it came from."""

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
from spjax.data.records import Utterance
from spjax.speech2unit import prosody
from spjax.tasks import Task


def refused(made: Mapping[int, Part]) -> dict[int, str]:
    """Why a clip was refused, by its number over all splits."""
    return {
        number * parts.CLIPS_PER_PART + row: str(why)
        for number, part in made.items()
        for row, why in enumerate(part.refused)
        if why
    }


def write_report(out: epath.Path, splits: Splits, refused: Mapping[int, str]) -> list[str]:
    """Lists refused clips, by number, in `OUT-refused.jsonl`, prints them, and returns notes for the card."""
    report = out.parent / f"{out.name}-refused.jsonl"
    report.unlink(missing_ok=True)
    if not refused:
        return []
    every = [(split, clip) for split, clips in splits.items() for clip in clips]
    rows = [{"split": every[i][0], "id": every[i][1].id, "path": every[i][1].path, "why": refused[i]} for i in refused]
    report.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for why in dict.fromkeys(refused.values()):  # a file may hold many clips
        tqdm.write(f"refused: {why}", file=sys.stderr)
    counts = Counter(row["split"] for row in rows)
    return [
        f"{split}: {counts[split]} of {len(clips)} clips were refused"
        for split, clips in splits.items()
        if counts[split]
    ]


def utterances(task: Task, splits: Splits, made: Sequence[Part], f0: bool) -> dict[str, list[Utterance]]:
    """The records of every split, without what was refused.

    Args:
      task: what the labels mean.
      splits: the clips.
      made: all parts of them, in order.
      f0: normalise it, by speaker; else the records have none.
    """
    counts, units, durations, pitch, voiced, rates, _, _, _ = (
        np.concatenate(arrays) for arrays in zip(*made, strict=True)
    )
    ends = np.cumsum(counts)
    every = [(split, clip) for split, clips in splits.items() for clip in clips]
    segments = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    said: dict[str, list[slice]] = defaultdict(list)
    for (_, clip), where in zip(every, segments, strict=True):
        said[clip.speaker].append(where)
    mean_of = {
        speaker: prosody.voiced_mean(*(np.concatenate([stream[where] for where in its]) for stream in (pitch, voiced)))
        for speaker, its in said.items()
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
                classes=_classes(clip, task),
                durations=durations[where],
                f0=prosody.normalise(pitch[where], voiced[where], mean_of.get(clip.speaker)) if f0 else None,
                provenance=f"{clip.path}{crop}, {rates[row]} Hz",
            )
        )
    return found


def _classes(clip: Clip, task: Task) -> list[int]:
    """Class ids over all slots."""
    labels = zip(clip.labels, task.slots, task.slot_offsets[:-1], strict=True)
    return [first + slot.labels.index(label) for label, slot, first in labels]


def _seconds(number: float) -> str:
    """All digits that it takes to tell it from any other number."""
    return repr(float(number)).removesuffix(".0")
