"""Grabo: 36 Dutch commands to a robot, 11 speakers, about 15 times each.

Raw layout, under the root: `speakers/<speaker>/spchdatadir/recording{1..36}/*.wav`. Label: the folder `recordingN`.

Paper split: of every speaker and command, its files sorted by name, the first 2 train, the next 4 validate, the rest
test (792 / 1,584 / 3,631). The reference took them as the directory listed them. It is a speaker-dependent task: every
speaker is in every split.

Honest split: speakers left out, 7 / 2 / 2 of 11 (seed 0). Each speaker words the commands in a way of their own, so
this is far harder than the paper's.

Traps: clips have to be resampled; few train clips a class (22) make single runs swing.
"""

from __future__ import annotations

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import BuildError, by_speaker, check_protocol, checked
from spjax.tasks import TASKS

TRAIN, VALID = 2, 4  # files of a speaker's command, in order
FRACTIONS = {"train": 7 / 11, "valid": 2 / 11, "test": 2 / 11}


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists the data set; layout and splits: this module's docstring.

    Raises:
      BuildError: the tree is not what it must be.
    """
    check_protocol(protocol)
    places: dict[tuple[str, str], list[Clip]] = {}
    for name, path in audio_files(raw, "speakers").items():
        parts = name.split("/")
        if len(parts) != 5 or parts[2] != "spchdatadir":
            raise BuildError(
                f"{epath.Path(raw) / path} is not where it should be, speakers/<speaker>/spchdatadir/recordingN/*.wav: "
                "unpack the data set as it is published"
            )
        _, speaker, _, label, _ = parts
        places.setdefault((speaker, label), []).append(Clip(name, path, (label,), speaker=speaker))
    every = [clip for group in places.values() for clip in group]
    if protocol == "honest":
        return checked(by_speaker(every, FRACTIONS, seed=0), TASKS["grabo"])
    groups = list(places.values())  # each sorted by name
    splits = {
        "train": [clip for group in groups for clip in group[:TRAIN]],
        "valid": [clip for group in groups for clip in group[TRAIN : TRAIN + VALID]],
        "test": [clip for group in groups for clip in group[TRAIN + VALID :]],
    }
    return checked(splits, TASKS["grabo"])
