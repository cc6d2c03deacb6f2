"""Grabo: 36 Dutch commands to a robot, 11 speakers, about 15 times each.

Raw layout, under the root: `speakers/<speaker>/spchdatadir/recording{1..36}/*.wav`. Label: the folder `recordingN`.

Paper split: of every speaker and command, files sorted by name: the first 2 for train, the next 4 for valid, the rest
for test (792 / 1,584 / 3,631). The reference took them in directory order. The task is speaker-dependent: every speaker
is in every split.

Honest split: by speaker, 7 / 2 / 2 of 11 (seed 0). Each speaker words the commands differently, so this is far harder
than the paper's.

Traps: clips must be resampled; with few train clips a class (22), single runs vary a lot.
"""

from __future__ import annotations

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import BuildError, by_speaker, check_protocol, checked
from spjax.tasks import TASKS

TRAIN, VALID = 2, 4  # number of files of each speaker's command
FRACTIONS = {"train": 7 / 11, "valid": 2 / 11, "test": 2 / 11}


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists the data set; see the module for layout and splits.

    Raises:
      BuildError: the layout differs from the published one.
    """
    check_protocol(protocol)
    by_folder: dict[tuple[str, str], list[Clip]] = {}
    for name, path in audio_files(raw, "speakers").items():
        parts = name.split("/")
        if len(parts) != 5 or parts[2] != "spchdatadir":
            raise BuildError(
                f"{epath.Path(raw) / path} is not at speakers/<speaker>/spchdatadir/recordingN/*.wav: "
                "unpack the data set as it is published"
            )
        _, speaker, _, label, _ = parts
        by_folder.setdefault((speaker, label), []).append(Clip(name, path, (label,), speaker=speaker))
    every = [clip for group in by_folder.values() for clip in group]
    if protocol == "honest":
        return checked(by_speaker(every, FRACTIONS, seed=0), TASKS["grabo"])
    groups = list(by_folder.values())  # each sorted by name
    splits = {
        "train": [clip for group in groups for clip in group[:TRAIN]],
        "valid": [clip for group in groups for clip in group[TRAIN : TRAIN + VALID]],
        "test": [clip for group in groups for clip in group[TRAIN + VALID :]],
    }
    return checked(splits, TASKS["grabo"])
