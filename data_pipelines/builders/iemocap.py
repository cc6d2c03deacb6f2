"""IEMOCAP: four emotions, acted by ten speakers in five sessions.

Raw tree, as the archive (IEMOCAP_full_release) unpacks::

    Session{1..5}/sentences/wav/<dialog>/<utterance>.wav
    Session{1..5}/dialog/EmoEvaluation/<dialog>.txt

A label line is `[start - end]<TAB>utterance<TAB>emotion<TAB>[v, a, d]`. Kept are neu, hap with exc merged in, ang and
sad: 5,531 utterances of the published set; fru, sur, fea, dis, oth and xxx (no agreement) are left out, as in the
literature. The speaker is session and sex; the sex precedes the turn in the utterance's name (Ses01F_impro01_M003 is
Ses01M; the F after Ses01 is the wearer of the sensors). The source is the dialog.

- paper: test is Session1, valid 20 % of the other sessions by utterance (seed 0): train and valid share speakers and
  dialogs.
- honest, honest-0 to honest-4 (honest is honest-0): test is session K + 1, valid the next one (cyclically), train the
  other three: no speaker in two splits. Report the mean over the five.

Traps: copies made on a Mac have hidden `._*.txt` files next to the labels (ignored); sub-folders of EmoEvaluation hold
the labels of single raters (ignored); one session has about 1,100 utterances, so a single fold varies by ±3 points.
"""

from __future__ import annotations

import re

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import BuildError, check_protocol, checked, find, read_text, stratified
from spjax.tasks import TASKS

SESSIONS = 5
PROTOCOLS = ("paper", "honest", *(f"honest-{fold}" for fold in range(SESSIONS)))

_LINE = re.compile(r"\[[\d.]+ - [\d.]+\]\t(?P<utterance>\S+)\t(?P<emotion>\S+)")
_UTTERANCE = re.compile(r"(?P<dialog>(?P<session>Ses\d\d)[FM]_.+)_(?P<sex>[FM])\w*")
_KEPT = {"neu": "neu", "hap": "hap", "exc": "hap", "ang": "ang", "sad": "sad"}
_LEFT_OUT = ("fru", "sur", "fea", "dis", "oth", "xxx")


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists the utterances of four emotions; see the module for the protocols.

    Raises:
      BuildError: a session, its labels or a labelled recording is missing; an unknown emotion or utterance name.
    """
    check_protocol(protocol, PROTOCOLS)
    raw = epath.Path(raw)
    sessions = [_session(raw, f"Session{number}") for number in range(1, SESSIONS + 1)]
    if protocol == "paper":
        rest = [clip for session in sessions[1:] for clip in session]
        splits = {**stratified(rest, {"train": 0.8, "valid": 0.2}, seed=0), "test": sessions[0]}
    else:
        test = int(protocol.partition("-")[2] or 0)
        valid = (test + 1) % SESSIONS
        train = [clip for number, part in enumerate(sessions) if number not in (test, valid) for clip in part]
        splits = {"train": train, "valid": sessions[valid], "test": sessions[test]}
    return checked(splits, TASKS["iemocap"])


def _session(raw: epath.Path, session: str) -> list[Clip]:
    files = audio_files(raw, f"{session}/sentences/wav", suffixes=(".wav",))
    folder = raw / session / "dialog" / "EmoEvaluation"
    tables = [path for path in folder.iterdir() if _is_table(path)] if folder.is_dir() else []
    if not tables:
        raise BuildError(f"{folder} holds no label files (<dialog>.txt): unpack the whole of IEMOCAP_full_release")
    found = []
    for table in sorted(tables):
        for number, line in enumerate(read_text(table).splitlines(), 1):
            match = _LINE.match(line)
            if not match:
                continue  # headers and single raters' labels
            where, emotion, utterance = f"{table}, line {number}", match["emotion"], match["utterance"]
            if emotion in _LEFT_OUT:
                continue
            if emotion not in _KEPT:
                known = ", ".join((*_KEPT, *_LEFT_OUT))
                raise BuildError(f"{where} has the emotion {emotion!r}, known are {known}: correct the line")
            name = _UTTERANCE.fullmatch(utterance)
            if not name:
                raise BuildError(
                    f"{where} has the utterance {utterance!r}, not one like Ses01F_impro01_F000: correct the line"
                )
            path = f"{session}/sentences/wav/{name['dialog']}/{utterance}.wav"
            speaker = name["session"] + name["sex"]
            found.append(Clip(path, find(files, path, where), (_KEPT[emotion],), speaker, name["dialog"]))
    return found


def _is_table(path: epath.Path) -> bool:
    return path.suffix == ".txt" and not path.name.startswith(".")
