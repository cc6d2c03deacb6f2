"""EasyCall: severity of a speaker's dysarthria (Italian phone commands, about 30 patients and 24 controls).

Raw tree, as unpacked: `<speaker>/**/*.wav`, with speakers f01, m01, ... for patients and fc01, mc01, ... for controls.
The label is 0 for a control, else the speaker's Therapy Outcome Measure (TOM), 1 mild to 5 severe. Clips shorter than
1,000 samples at 16 kHz are left out, as in the paper's recipe; this reads only their headers. A file with an unreadable
header stays in the list, for extraction to report.

- paper: utterances 80/10/10 by seed (the recipe has no seed). The label is a function of the speaker and speakers are
  in all splits, so a model can score by recognising voices.
- honest: by speaker, about 80/10/10, with severities balanced as well as that allows. A severity with one speaker is in
  train only: in the published set TOM 2 (f11), so accuracy on valid and test is over five classes. TOM 4 and 5 have
  three speakers each, one a split.

Traps: the recipe has no score of f04 (a folder of that name is refused); classes are unbalanced, and a class of three
speakers is little evidence about a severity.
"""

from __future__ import annotations

import re
from collections import defaultdict

import soundfile
from etils import epath
from tqdm import tqdm

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import BuildError, by_speaker, check_protocol, checked, stratified
from spjax.tasks import TASKS

SHORTEST = 1000  # samples at 16 kHz
TOM = {
    speaker: str(score)
    for score, speakers in {
        1: "f01 f03 f05 f06 f07 f08 f09 m02 m04 m09 m12 m13 m15 m17 m18 m20",
        2: "f11",
        3: "f02 m01 m03 m08 m10 m16 m19",
        4: "m05 m06 m07",
        5: "f10 m11 m14",
    }.items()
    for speaker in speakers.split()
}

_CONTROL = re.compile(r"[fm]c\d\d")
_FRACTIONS = {"train": 0.8, "valid": 0.1, "test": 0.1}


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists every recording of at least `SHORTEST` samples; see the module for the protocols.

    Raises:
      BuildError: no recordings, a folder that is not a speaker's, or a file outside the speakers' folders.
    """
    check_protocol(protocol)
    raw = epath.Path(raw)
    listed = []
    for name, path in tqdm(
        audio_files(raw, suffixes=(".wav",)).items(), desc="easycall: headers", unit=" files", leave=False
    ):
        speaker, _, rest = name.partition("/")
        label = "0" if _CONTROL.fullmatch(speaker) else TOM.get(speaker)
        if label is None or not rest:
            raise BuildError(
                f"{raw / path}: {speaker!r} is not a speaker of EasyCall (f01, m01, ..., controls fc01, mc01, ...): "
                "point --raw to the folder of the speakers' folders, and move everything else out of it"
            )
        if _samples(raw / path) >= SHORTEST:
            listed.append(Clip(name, path, (label,), speaker))
    if protocol == "paper":
        return checked(stratified(listed, _FRACTIONS, seed=0), TASKS["easycall"])
    speakers = defaultdict(set)
    for clip in listed:
        speakers[clip.labels].add(clip.speaker)
    alone = [clip for clip in listed if len(speakers[clip.labels]) == 1]
    splits = by_speaker([clip for clip in listed if len(speakers[clip.labels]) > 1], _FRACTIONS, seed=0)
    return checked({**splits, "train": splits["train"] + alone}, TASKS["easycall"])


def _samples(path: epath.Path) -> float:
    """Returns the length in samples after resampling to 16 kHz; infinity if the header cannot be read."""
    try:
        with path.open("rb") as file:
            info = soundfile.info(file)
    except soundfile.LibsndfileError:
        return float("inf")
    return info.frames * 16_000 / info.samplerate
