"""Dysarthric Mandarin speech commands: 19 words, 3 speakers, 10 times each.

Raw layout, under the root: `D_SPK{1,2,3}/<01..19>/*.wav`, and the tables `train_full.csv` (399 rows) and
`test_full.csv` (171), there or in `csv/`, tab-separated (columns filename, whose last three path parts are used, and
label). The folder is the label: 01-19 are one to nine, close, up, down, previous, next, in, out, left, right, home.

Two tasks: `dm_sc` is the paper's, without 10, 13, 14, 15, 16 and 19 (13 classes), `dm_sc19` has all 19.

Paper split: the tables, with a fifth of train for valid (seed 1): 224 / 49 / 117 of 13 classes, 319 / 80 / 171 of 19.
The reference took that fifth before it dropped classes; here the sizes are the same and every class is in valid.

Honest split: D_SPK3 is test, the other two are train and valid (80/20, seed 1). With three speakers, valid can only
have speakers of train; test does not.

Traps: all three speakers are in every split of the paper; clips must be resampled.
"""

from __future__ import annotations

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import BuildError, check_protocol, checked, composed, find, stratified
from data_pipelines.tables import find_table, read_table
from spjax.tasks import TASKS, Task

TABLES = {"train": "train_full.csv", "test": "test_full.csv"}
LEFT_OUT = "D_SPK3"  # test speaker of the honest protocol
VALID = {"dm_sc": 49 / 273, "dm_sc19": 80 / 399}  # fraction of the train table


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists the paper's 13 classes (task `dm_sc`); see the module for layout and splits.

    Raises:
      BuildError: the layout differs from the published one.
    """
    return _clips(raw, protocol, TASKS["dm_sc"])


def clips19(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists all 19 classes (task `dm_sc19`); see the module for layout and splits.

    Raises:
      BuildError: the layout differs from the published one.
    """
    return _clips(raw, protocol, TASKS["dm_sc19"])


def _clips(raw: epath.PathLike, protocol: str, task: Task) -> Splits:
    check_protocol(protocol)
    words = TASKS["dm_sc19"].slots[0].labels
    used = task.slots[0].labels
    files = audio_files(raw)
    listed: Splits = {}
    for split, table in TABLES.items():
        listed[split] = []
        for where, row in read_table(find_table(raw, table), ("filename", "label"), delimiter="\t"):
            name = composed("/".join(row["filename"].split("/")[-3:]))
            number = row["label"].strip()
            if not number.isdecimal() or not 1 <= int(number) <= len(words):
                raise BuildError(f"{where} has the label {number!r}, must be 01 to {len(words)}: correct it")
            label = words[int(number) - 1]
            if label in used:
                listed[split].append(Clip(name, find(files, name, where), (label,), speaker=name.split("/")[0]))
    if protocol == "honest":
        every = listed["train"] + listed["test"]
        listed = {
            "train": [clip for clip in every if clip.speaker != LEFT_OUT],
            "test": [clip for clip in every if clip.speaker == LEFT_OUT],
        }
    share = 0.2 if protocol == "honest" else VALID[task.name]
    parts = stratified(listed["train"], {"train": 1 - share, "valid": share}, seed=1)
    return checked({**parts, "test": listed["test"]}, task)
