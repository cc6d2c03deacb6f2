"""VCTK as unit text: sex of the speaker, accent of English, or which of 108 speakers.

Sources `vctk` and `vctk_v1` of data_pipelines/frames.py, two releases of the same recordings, combined (either may be
absent), and `vctk_speakers.csv` with the columns Id, Sex and Accent. An id is SPEAKER_NUMBER or SPEAKER_NUMBER_MIC:
4,347 and 4,424 utterances of 109 speakers, of which 410 are in both (other cuts of one recording). The two cuts have
the same source, so both go to the same split. The published parts (val, test) share all speakers and are not used.

Every speaker reads sentences 1 to 24; higher numbers are other texts for each speaker. (A few of those texts recur
under other numbers with other speakers, as their units show; no file lists which.)

vctk_gender and vctk_accent, any protocol: speakers are split 60/20/20 by utterances, with labels as balanced as that
allows, and sentences 1 to 24 are split 60/20/20 by utterances too (seed 0). An utterance of those sentences is left out
if its speaker is in another split, so that no speaker and no known sentence is in two. Accents of fewer than five
speakers are left out: SouthAfrican, Indian, Australian, Welsh, NewZealand, and one speaker of unknown accent.

vctk_speaker, any protocol: sentence numbers are split 60/20/20 by utterances, with speakers as balanced as that allows
(seed 0), so that no sentence is in two splits. Speaker p315, with 14 utterances, is left out.

Trap: recordings in `vctk` begin with silence, those in `vctk_v1` are trimmed. Every speaker of the former is in the
latter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.frames import UnitSplits, files_of, read_source
from data_pipelines.splits import BuildError, by_source, check_protocol, checked, grouped
from data_pipelines.tables import read_table
from spjax.tasks import TASKS, Task

SOURCES = ("vctk", "vctk_v1")
TABLE = "vctk_speakers.csv"
COMMON = 24  # sentences 1 to 24 are read by every speaker
FRACTIONS = {"train": 0.6, "valid": 0.2, "test": 0.2}
_ID = re.compile(r"(?P<speaker>\w+?)_0*(?P<number>\d+)(_mic\d)?", re.ASCII)


class _Read(NamedTuple):
    """An utterance, its speaker's row of the table, and the number of its sentence."""

    clip: Clip
    row: dict[str, str]
    number: int


def gender(raw: epath.PathLike, protocol: str = "paper") -> UnitSplits:
    """Lists the gender task (F or M); see the module for the splits.

    Raises:
      BuildError: invalid unit text or table.
    """
    check_protocol(protocol)
    return _of_new_speakers(raw, TASKS["vctk_gender"], "Sex")


def accent(raw: epath.PathLike, protocol: str = "paper") -> UnitSplits:
    """Lists the accent task; see the module for the splits.

    Raises:
      BuildError: invalid unit text or table.
    """
    check_protocol(protocol)
    return _of_new_speakers(raw, TASKS["vctk_accent"], "Accent")


def speaker(raw: epath.PathLike, protocol: str = "paper") -> UnitSplits:
    """Lists the speaker task; see the module for the splits.

    Raises:
      BuildError: invalid unit text or table.
    """
    check_protocol(protocol)
    task = TASKS["vctk_speaker"]
    read, notes = _known(task, _read(raw), "Id")
    splits = by_source([one.clip._replace(source=f"sentence {one.number}") for one in read], FRACTIONS, seed=0)
    return UnitSplits(task, checked(splits, task), (TABLE,), notes)


def _of_new_speakers(raw: epath.PathLike, task: Task, column: str) -> UnitSplits:
    """Makes splits that share neither a speaker nor a common sentence."""
    read, notes = _known(task, _read(raw), column)
    splits = grouped([one.clip for one in read], FRACTIONS, 0, lambda clip: [clip.speaker])
    common = [one.clip._replace(labels=()) for one in read if one.number <= COMMON]
    of_sentence = {}
    if common:
        of_sentence = {clip.source: split for split, part in by_source(common, FRACTIONS, 0).items() for clip in part}
    kept: Splits = {
        split: [clip for clip in part if of_sentence.get(clip.source, split) == split] for split, part in splits.items()
    }
    left = len(read) - sum(map(len, kept.values()))
    note = (
        f"{left:,} of {len(read):,} utterances of the sentences 1 to {COMMON}, which all speakers read, are left out: "
        "their sentence and their speaker are in different splits"
    )
    return UnitSplits(task, checked(kept, task), (TABLE,), (*notes, note))


def _known(task: Task, read: Sequence[_Read], column: str) -> tuple[list[_Read], tuple[str, ...]]:
    """Returns labelled utterances whose label is in the task, and notes about the others and about double cuts."""
    labels = task.slots[0].labels
    found = [one._replace(clip=one.clip._replace(labels=(one.row[column],))) for one in read]
    known = [one for one in found if one.clip.labels[0] in labels]
    others = Counter(one.clip.labels[0] for one in found if one.clip.labels[0] not in labels)
    notes = [
        f"{count} utterances of {label} are left out, too few to be a class" for label, count in sorted(others.items())
    ]
    cuts = Counter((one.clip.speaker, one.number) for one in known)
    twice = sum(count > 1 for count in cuts.values())
    return known, (*notes, f"{twice} of {len(cuts):,} recordings have two cuts, which are in the same split")


def _read(raw: epath.PathLike) -> list[_Read]:
    """Reads every utterance of both releases; labels are empty."""
    there = [source for source in SOURCES if files_of(raw, source)] or SOURCES[:1]
    lines = [line for source in there for line in read_source(raw, source)]
    table = epath.Path(raw) / TABLE
    rows = {
        row["Id"].strip(): {name: text.strip() for name, text in row.items()}
        for _, row in read_table(table, ("Id", "Sex", "Accent"))
    }
    found: list[_Read] = []
    taken: set[str] = set()
    for line in lines:
        where = f"{epath.Path(raw) / line.path} ({line.id})"
        parts = _ID.fullmatch(line.id)
        if parts is None or parts["speaker"] != line.speaker:
            raise BuildError(f"{where} is not of speaker {line.speaker!r}, like `p225_001` of p225: correct the line")
        if line.speaker not in rows:
            raise BuildError(f"{where}: speaker {line.speaker!r} is not in {table}: add a row, or remove the line")
        number = int(parts["number"])
        sentence = f"sentence {number}" if number <= COMMON else f"{line.speaker}, sentence {number}"
        name = f"{line.id}#2" if line.id in taken else line.id  # both releases may use the same id
        taken.add(name)
        found.append(_Read(Clip(name, line.path, (), line.speaker, sentence), rows[line.speaker], number))
    return found
