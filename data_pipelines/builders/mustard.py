"""MUStARD: sarcasm in utterances of sitcoms; 690 utterances, balanced.

Raw tree: `sarcasm_data.json` and, if possible, `split_indices.p` of the MUStARD repository (its folder data) at the
root, and `utterances_final_wav/<id>.wav`, the audio of its videos. The json maps ids to {utterance, speaker, show,
sarcasm, ...}. Speaker ids include the show, since PERSON is someone else in each.

- fold-0 to fold-4: the five published speaker-dependent folds (552/138); 10 % of a fold's train are valid (seed 0).
  Test speakers are in train. split_indices.p holds the folds as positions in the json, in file order; the pickle is
  read without executing code. Without that file five stratified folds are drawn (seed 0), with a warning.
- paper: fold-0.
- honest: MUStARD's speaker-independent setting: FRIENDS (356) is test, the other shows (334) are train and valid,
  90/10, which share no speaker either.

Metric: weighted F1, as in the literature; on 138 utterances it varies by ±8 points.

Traps: the first version of the json has no `show` (refused: take the current one); the audio has canned laughter,
which is a strong cue for jokes.
"""

from __future__ import annotations

import json
import logging

import numpy as np
from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import (
    BuildError,
    by_speaker,
    check_protocol,
    checked,
    find,
    folds,
    read_text,
    stratified,
)
from spjax.convert import ConvertError
from spjax.convert.safe_pickle import PickledArray, read_pickle
from spjax.tasks import TASKS

FOLDS = 5
PROTOCOLS = ("paper", "honest", *(f"fold-{fold}" for fold in range(FOLDS)))

_TRAIN = {"train": 0.9, "valid": 0.1}
_SEED = 0
_LOG = logging.getLogger(__name__)


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists the 690 utterances; see the module for the protocols.

    Raises:
      BuildError: the json or a recording is missing; an entry without speaker, show or boolean sarcasm; folds that are
        not five partitions of the utterances.
    """
    check_protocol(protocol, PROTOCOLS)
    raw = epath.Path(raw)
    listed = _listed(raw)
    if protocol == "honest":
        test = [clip for clip in listed if clip.speaker.startswith("FRIENDS/")]
        rest = [clip for clip in listed if not clip.speaker.startswith("FRIENDS/")]
        return checked({**by_speaker(rest, _TRAIN, _SEED), "test": test}, TASKS["mustard"])
    test = _test_folds(raw / "split_indices.p", listed)[int(protocol.partition("-")[2] or 0)]
    tested = {clip.id for clip in test}
    rest = [clip for clip in listed if clip.id not in tested]
    return checked({**stratified(rest, _TRAIN, _SEED), "test": test}, TASKS["mustard"])


def _listed(raw: epath.Path) -> list[Clip]:
    """Lists clips in the json's order, which the published folds index."""
    table = raw / "sarcasm_data.json"
    try:
        entries = json.loads(read_text(table))
    except json.JSONDecodeError as error:
        raise BuildError(f"{table} is not JSON ({error}): take it from the MUStARD repository again") from error
    if not isinstance(entries, dict) or not entries:
        raise BuildError(f"{table} does not map ids to utterances: take it from the MUStARD repository again")
    files = audio_files(raw, "utterances_final_wav", suffixes=(".wav",))
    listed = []
    for name, entry in entries.items():
        where = f"{table}, {name}"
        lacking = [key for key in ("speaker", "show", "sarcasm") if not isinstance(entry, dict) or key not in entry]
        if lacking:
            raise BuildError(f"{where} lacks {', '.join(lacking)}: take the current file from the MUStARD repository")
        if not isinstance(entry["sarcasm"], bool):
            raise BuildError(f"{where}: sarcasm is {entry['sarcasm']!r}, not true or false: correct it")
        path = f"utterances_final_wav/{name}.wav"
        speaker = f"{entry['show'].upper()}/{entry['speaker'].upper()}"
        listed.append(Clip(path, find(files, path, where), (str(entry["sarcasm"]).lower(),), speaker))
    return listed


def _test_folds(path: epath.Path, listed: list[Clip]) -> list[list[Clip]]:
    if not path.is_file():
        _LOG.warning("%s is missing: five folds are drawn instead of the published ones", path)
        return folds(listed, FOLDS, _SEED)
    wrong = (
        f"{path} does not hold five folds of {len(listed)} utterances: take it from the MUStARD repository again, or "
    )
    wrong += "remove it to have folds drawn"
    try:
        # A list of (train, test), each an array of positions
        pairs = read_pickle(path.read_bytes())
        found = [[_positions(part) for part in pair] for pair in pairs]
    except (ConvertError, TypeError, ValueError) as error:
        raise BuildError(f"{wrong} ({error})") from error
    everything = np.arange(len(listed))
    complete = [len(pair) == 2 and np.array_equal(np.sort(np.concatenate(pair)), everything) for pair in found]
    if len(found) != FOLDS or not all(complete):
        raise BuildError(wrong)
    if not np.array_equal(np.sort(np.concatenate([test for _, test in found])), everything):
        raise BuildError(wrong)
    return [[listed[position] for position in test] for _, test in found]


def _positions(part: PickledArray | list[int]) -> np.ndarray:
    numbers = part.numpy() if isinstance(part, PickledArray) else np.asarray(part)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError("a fold is not a list of positions")
    return numbers
