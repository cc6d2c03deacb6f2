"""MUStARD++: sarcasm in utterances of sitcoms; 1,202 utterances, balanced, including MUStARD's.

Raw tree: `mustard++_text.csv` at the root, and the audio of the utterances' videos, named by their keys, under
`final_utterance_videos` (`final_utterance_videos/*_wav/<KEY>.wav`). Of the csv's 6,041 rows only those with a Sarcasm
value are used (keys that end in `_u`); the others are context. Speaker ids include the show, since PERSON and OTHER are
someone else in each.

The paper's 80/10/10 split has no seed and cannot be reproduced; ours are ten stratified folds (seed 0):

- fold-0 to fold-9: test is fold K, valid the next one (cyclically), train the other eight. Speakers are in all splits.
- paper: fold-0.
- honest: 80/10/10 with no speaker in two splits (seed 0). All utterances of a show's PERSON or OTHER stay together,
  since their speakers are unnamed.

Metric: weighted F1, as in the literature.

Traps: it contains MUStARD, so training on one and testing on the other leaks; neighbouring scenes of an episode
sometimes overlap by a few words; the audio of some shows has canned laughter, of others not.
"""

from __future__ import annotations

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import BuildError, by_speaker, check_protocol, checked, folds
from data_pipelines.tables import read_table
from spjax.tasks import TASKS

FOLDS = 10
PROTOCOLS = ("paper", "honest", *(f"fold-{fold}" for fold in range(FOLDS)))

_LABELS = {"0": "0", "1": "1", "0.0": "0", "1.0": "1"}  # spreadsheets save the values as 0.0 and 1.0
_SEED = 0


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists the labelled utterances; see the module for the protocols.

    Raises:
      BuildError: the csv or a recording is missing, two recordings have one key, no row is labelled, or a Sarcasm is
        neither 0 nor 1.
    """
    check_protocol(protocol, PROTOCOLS)
    raw = epath.Path(raw)
    listed = _listed(raw)
    if protocol == "honest":
        return checked(by_speaker(listed, {"train": 0.8, "valid": 0.1, "test": 0.1}, _SEED), TASKS["mustardpp"])
    parts = folds(listed, FOLDS, _SEED)
    test = int(protocol.partition("-")[2] or 0)
    valid = (test + 1) % FOLDS
    train = [clip for number, part in enumerate(parts) if number not in (test, valid) for clip in part]
    return checked({"train": train, "valid": parts[valid], "test": parts[test]}, TASKS["mustardpp"])


def _listed(raw: epath.Path) -> list[Clip]:
    table = raw / "mustard++_text.csv"
    rows = read_table(table, ("KEY", "SPEAKER", "SHOW", "Sarcasm"))
    recordings: dict[str, tuple[str, str]] = {}  # key → id, path
    for name, path in audio_files(raw, "final_utterance_videos", suffixes=(".wav",)).items():
        key = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        if key in recordings:
            raise BuildError(f"{raw}: {recordings[key][1]} and {path} are recordings of the same key: remove one")
        recordings[key] = (name, path)
    listed = []
    for where, row in rows:
        key, sarcasm = row["KEY"].strip(), row["Sarcasm"].strip()
        if not sarcasm:
            continue
        if sarcasm not in _LABELS:
            raise BuildError(f"{where}: the Sarcasm of {key} is {sarcasm!r}, not 0 or 1: correct it")
        if key not in recordings:
            raise BuildError(
                f"{where} names {key}, but no {key}.wav is under {raw / 'final_utterance_videos'}: extract the audio "
                "of all videos (ffmpeg -i KEY.mp4 KEY.wav), or remove the row"
            )
        speaker = f"{row['SHOW'].strip().upper()}/{row['SPEAKER'].strip().upper()}"
        listed.append(Clip(*recordings[key], (_LABELS[sarcasm],), speaker))
    if not listed:
        raise BuildError(f"{table} has no row with a Sarcasm: take it from the MUStARD++ repository again")
    return listed
