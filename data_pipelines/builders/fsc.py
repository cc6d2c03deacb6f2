"""Fluent Speech Commands: English smart-home commands, three slots (action, object, location), 31 intents, 97 speakers.

Raw layout, under the root: `data/{train,valid,test}_data.csv` (columns path, speakerId, transcription, action, object,
location; `path` is relative to the root) and `wavs/speakers/<speaker>/*.wav`.

Both protocols use the published split, 23,132 / 3,118 / 3,793, whose speakers are disjoint.

Traps: `none` is a label of both object and location, two classes; `change language` has a space; two speakers of valid
are much harder than those of test, so valid scores are lower.
"""

from __future__ import annotations

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import check_protocol, checked, composed, find
from data_pipelines.tables import read_table
from spjax.tasks import TASKS


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists the data set; see the module for layout and splits.

    Raises:
      BuildError: the layout differs from the published one.
    """
    check_protocol(protocol)
    slots = [slot.name for slot in TASKS["fsc"].slots]
    files = audio_files(raw, "wavs")
    splits: Splits = {}
    for split in ("train", "valid", "test"):
        table = epath.Path(raw) / "data" / f"{split}_data.csv"
        splits[split] = []
        for where, row in read_table(table, ("path", *slots)):
            name = composed(row["path"])
            speaker = row.get("speakerId") or name.split("/")[-2]
            labels = tuple(row[slot] for slot in slots)
            splits[split].append(Clip(name, find(files, name, where), labels, speaker=speaker))
    return checked(splits, TASKS["fsc"])
