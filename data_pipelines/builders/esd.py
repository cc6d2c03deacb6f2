"""ESD, the Emotional Speech Database, as unit text: five emotions, or ten speakers.

Source `esd` of data_pipelines/frames.py: `esd.PART.frames.txt` and tables `esd.PART.labels.tsv` with the columns id,
speaker, emotion and sentence. Ten English speakers read 50 sentences in each emotion: 2,500 utterances. PART is not
used for our splits: the published parts share all speakers, and their train list is not among the files.

esd_emotion, paper and honest protocol: no speaker and no sentence is in two splits. Speakers are split 5/2/3 and
sentences 24/12/14 (seed 0), and an utterance is kept if its speaker and its sentence are in the same split:
600/120/210; the other 1,570 are left out. Protocol `speakers`: no speaker in two splits, every sentence in all three
(1,250/500/750). The words do not reveal the emotion there, since every sentence is read in each; but train has the test
sentences read by other speakers.

esd_speaker, any protocol: no sentence is in two splits, split 30/10/10 (seed 0), in all emotions: 1,500/500/500.
Speakers are in every split, as the task requires.
"""

from __future__ import annotations

from collections.abc import Sequence

from etils import epath

from data_pipelines.clips import Clip
from data_pipelines.frames import UnitSplits, read_labels, read_source
from data_pipelines.splits import PROTOCOLS, SPLITS, BuildError, check_protocol, checked, shuffled
from spjax.tasks import TASKS, Task

SPEAKERS = (5, 2, 3)  # shares of train, valid and test
SENTENCES = (24, 12, 14)
SENTENCES_OF_SPEAKERS = (30, 10, 10)


def emotion(raw: epath.PathLike, protocol: str = "paper") -> UnitSplits:
    """Lists the emotion task; see the module for the splits.

    Raises:
      BuildError: invalid unit text or table, or fewer speakers or sentences than splits.
    """
    check_protocol(protocol, (*PROTOCOLS, "speakers"))
    strict = protocol != "speakers"
    every, tables = _clips(raw, "emotion", source=strict)
    of_speaker = _assign({clip.speaker for clip in every}, SPEAKERS, "speakers")
    of_sentence = _assign({clip.source for clip in every}, SENTENCES, "sentences") if strict else {}
    return _splits(
        TASKS["esd_emotion"],
        tables,
        [(of_speaker[clip.speaker], of_sentence.get(clip.source, of_speaker[clip.speaker]), clip) for clip in every],
    )


def speaker(raw: epath.PathLike, protocol: str = "paper") -> UnitSplits:
    """Lists the speaker task; see the module for the splits.

    Raises:
      BuildError: invalid unit text or table, or fewer sentences than splits.
    """
    check_protocol(protocol)
    every, tables = _clips(raw, "speaker", source=True)
    of_sentence = _assign({clip.source for clip in every}, SENTENCES_OF_SPEAKERS, "sentences")
    return _splits(
        TASKS["esd_speaker"], tables, [(of_sentence[clip.source], of_sentence[clip.source], clip) for clip in every]
    )


def _clips(raw: epath.PathLike, label: str, source: bool) -> tuple[list[Clip], tuple[str, ...]]:
    lines = read_source(raw, "esd")
    tables, rows = read_labels(raw, "esd", lines, ("speaker", "emotion", "sentence"))
    return [
        Clip(line.id, line.path, (row[label],), line.speaker, f"sentence {row['sentence']}" if source else "")
        for line, row in zip(lines, rows, strict=True)
    ], tables


def _assign(names: set[str], shares: Sequence[int], what: str) -> dict[str, str]:
    """Assigns sorted names to splits at random, at least one a split."""
    if len(names) < len(SPLITS):
        raise BuildError(f"esd has {len(names)} {what}, too few for {len(SPLITS)} splits: take all of its files")
    assigned: dict[str, str] = {}
    first, total = 0, sum(shares)
    for number, split in enumerate(SPLITS):
        rest = len(SPLITS) - number - 1
        last = max(first + 1, min(len(names) - rest, round(len(names) * sum(shares[: number + 1]) / total)))
        assigned |= dict.fromkeys(shuffled(sorted(names), 0)[first:last], split)
        first = last
    return assigned


def _splits(task: Task, tables: tuple[str, ...], placed: Sequence[tuple[str, str, Clip]]) -> UnitSplits:
    splits = {split: [clip for one, other, clip in placed if one == other == split] for split in SPLITS}
    left = len(placed) - sum(map(len, splits.values()))
    notes = [
        f"{left:,} of {len(placed):,} utterances are left out: their speaker and their sentence are in different splits"
    ]
    return UnitSplits(task, checked(splits, task), tables, tuple(notes if left else ()))
