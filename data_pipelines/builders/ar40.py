"""Arabic Speech Commands, 40 words: command words by 30 speakers, ten takes each.

Raw layout, under the root: `<word>/<speaker>_NO_<take>.<ending>`, words in English (`zoom in` with a space), speakers
and takes in digits.

Split, in both protocols: by a hash of the speaker's name, independent of the other speakers; no speaker is in two
splits. The SHA-256 of `ar40/<speaker>` (eight digits) modulo 6 is 0 for valid, 1 for test, and anything else for train.
Of the speakers 1, 5, 6, 9, 11, 13, 15-20, 22-24, 27, 29 and 30 that gives 19, 29 and 30 for valid, 13, 15, 22 and 27
for test, and eleven for train: 4,400/1,200/1,600 clips, every word 10 times by each speaker.
"""

from __future__ import annotations

import hashlib
import re

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import SPLITS, BuildError, check_protocol, checked
from spjax.tasks import TASKS

_NAME = re.compile(r"(?P<word>[^/]+)/(?P<speaker>\d+)_NO_\d+\.\w+", re.ASCII)


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists the data set; see the module for layout and splits.

    Raises:
      BuildError: the layout differs from the published one.
    """
    check_protocol(protocol)
    splits: Splits = {split: [] for split in SPLITS}
    for name, path in audio_files(raw).items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise BuildError(
                f"{epath.Path(raw) / path} is not at <word>/<speaker>_NO_<take>.<ending>: "
                "unpack the data set as it is published"
            )
        splits[split_of(found["speaker"])].append(Clip(name, path, (found["word"],), found["speaker"]))
    return checked(splits, TASKS["ar40"])


def split_of(speaker: str) -> str:
    """Returns the split of a speaker."""
    number = int(hashlib.sha256(f"ar40/{speaker}".encode()).hexdigest(), 16) % 6
    return {0: "valid", 1: "test"}.get(number, "train")
