"""VCTK as unit text: is the speaker a woman or a man, which accent of English is spoken, which of 108 speakers speaks?

Sources `vctk` and `vctk_v1` of data_pipelines/frames.py, two releases of the same recordings, put together (either may
be absent), and `vctk_speakers.csv` with the columns Id, Sex and Accent. An id is SPEAKER_NUMBER or SPEAKER_NUMBER_MIC:
4,347 and 4,424 utterances of 109 speakers, of which 410 are in both (other cuts of one recording). They count as one
source, so that both go to the same split. The published parts (val, test) share all speakers; they say nothing here.

Every speaker reads sentences 1 to 24; what stands under higher numbers differs from speaker to speaker. (A few of those
texts recur under other numbers with other speakers, as their units show; no file says which.)

vctk_gender and vctk_accent, any protocol: speakers are dealt out by 60/20/20 % of their utterances, labels as even as
that allows, and the sentences 1 to 24 by 60/20/20 % of theirs (seed 0). An utterance of those sentences is left out
where its speaker is in another split, so that neither a speaker nor, as far as it is known, a sentence is in two.
Accents of fewer than five speakers are left out: SouthAfrican, Indian, Australian, Welsh, NewZealand, and one speaker
whose accent is unknown.

vctk_speaker, any protocol: numbers are dealt out by 60/20/20 % of their utterances, speakers as even as that allows
(seed 0), so that no sentence stands in two splits. Speaker p315, with 14 utterances, is left out.

Trap: `vctk` begins with the room's silence, `vctk_v1` is cut close. Every speaker of the former is in the latter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.frames import UnitSplits, files_of, read_source
from data_pipelines.splits import BuildError, by_source, check_protocol, checked, grouped, read_table
from spjax.tasks import TASKS, Task

SOURCES = ("vctk", "vctk_v1")
TABLE = "vctk_speakers.csv"
COMMON = 24  # sentences that every speaker reads, from 1 on
FRACTIONS = {"train": 0.6, "valid": 0.2, "test": 0.2}
_ID = re.compile(r"(?P<speaker>\w+?)_0*(?P<number>\d+)(_mic\d)?", re.ASCII)


class _Read(NamedTuple):
    """An utterance: its speaker's row of the table, and the number of its sentence."""

    clip: Clip
    row: dict[str, str]
    number: int


def gender(raw: epath.PathLike, protocol: str = "paper") -> UnitSplits:
    """Female or male, as the table says; splits: this module's docstring.

    Raises:
      BuildError: the unit text or the table is not what it must be.
    """
    check_protocol(protocol)
    return _of_new_speakers(raw, TASKS["vctk_gender"], "Sex")


def accent(raw: epath.PathLike, protocol: str = "paper") -> UnitSplits:
    """The accents of enough speakers; splits: this module's docstring.

    Raises:
      BuildError: the unit text or the table is not what it must be.
    """
    check_protocol(protocol)
    return _of_new_speakers(raw, TASKS["vctk_accent"], "Accent")


def speaker(raw: epath.PathLike, protocol: str = "paper") -> UnitSplits:
    """The speakers of enough utterances; splits: this module's docstring.

    Raises:
      BuildError: the unit text or the table is not what it must be.
    """
    check_protocol(protocol)
    task = TASKS["vctk_speaker"]
    read, notes = _known(task, _read(raw), "Id")
    splits = by_source([one.clip._replace(source=f"sentence {one.number}") for one in read], FRACTIONS, seed=0)
    return UnitSplits(task, checked(splits, task), (TABLE,), notes)


def _of_new_speakers(raw: epath.PathLike, task: Task, column: str) -> UnitSplits:
    """Neither a speaker nor a sentence that all speakers read in two splits."""
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
        "their sentence went to another split than their speaker"
    )
    return UnitSplits(task, checked(kept, task), (TABLE,), (*notes, note))


def _known(task: Task, read: Sequence[_Read], column: str) -> tuple[list[_Read], tuple[str, ...]]:
    """Utterances whose label the task has, labelled, and what to say of the others and of double cuts."""
    labels = task.slots[0].labels
    found = [one._replace(clip=one.clip._replace(labels=(one.row[column],))) for one in read]
    known = [one for one in found if one.clip.labels[0] in labels]
    others = Counter(one.clip.labels[0] for one in found if one.clip.labels[0] not in labels)
    notes = [
        f"{count} utterances of {label} are left out, too few to be a class" for label, count in sorted(others.items())
    ]
    cuts = Counter((one.clip.speaker, one.number) for one in known)
    twice = sum(count > 1 for count in cuts.values())
    return known, (*notes, f"{twice} of {len(cuts):,} recordings are there in two cuts, which are in the same split")


def _read(raw: epath.PathLike) -> list[_Read]:
    """Every utterance of both releases; labels are empty."""
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
        name = f"{line.id}#2" if line.id in taken else line.id  # the other release may call its cut alike
        taken.add(name)
        found.append(_Read(Clip(name, line.path, (), line.speaker, sentence), rows[line.speaker], number))
    return found
