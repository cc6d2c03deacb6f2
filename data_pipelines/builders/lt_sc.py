"""Lithuanian Speech Commands: 13 commands, other words, noise; 28 speakers.

Raw layout, under the root: `dataset/<word>/<speaker>_nohash_0.wav`, `dataset/_background_noise_/<n>.wav`, and the
tables `train_limit20.csv`, `dev_full.csv`, `test_full.csv`, `noise_full.csv` (there or in `csv/`; tab-separated;
columns filename, whose last two path parts are used, and label).

Paper split: the tables, 326 / 75 / 88, speakers disjoint; noise rows 0-9 are added to test, 10-19 to valid, the rest to
train: 598 / 85 / 98 in all. Valid has no `į_dešinę`.

Honest split: the same test; the speakers of train and valid are split again (seed 0) so that valid has every class.

Traps: folder names are Unicode, composed or decomposed on disk; nearly half of train is noise, cut from an unknown
number of recordings.
"""

from __future__ import annotations

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import by_speaker, check_protocol, checked, composed, find
from data_pipelines.tables import find_table, read_table
from spjax.tasks import TASKS

TABLES = {"train": "train_limit20.csv", "valid": "dev_full.csv", "test": "test_full.csv"}
NOISE = "noise_full.csv"
NOISE_ROWS = {"train": slice(20, None), "valid": slice(10, 20), "test": slice(0, 10)}


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists the data set; see the module for layout and splits.

    Raises:
      BuildError: the layout differs from the published one.
    """
    check_protocol(protocol)
    files = audio_files(raw, "dataset")
    splits = {split: _table(raw, table, files) for split, table in TABLES.items()}
    noise = _table(raw, NOISE, files)
    if protocol == "honest":
        words = splits["train"] + splits["valid"]
        share = len(splits["valid"]) / len(words)
        splits |= by_speaker(words, {"train": 1 - share, "valid": share}, seed=0)
    return checked({split: splits[split] + noise[rows] for split, rows in NOISE_ROWS.items()}, TASKS["lt_sc"])


def _table(raw: epath.PathLike, table: str, files: dict[str, str]) -> list[Clip]:
    found = []
    for where, row in read_table(find_table(raw, table), ("filename", "label"), delimiter="\t"):
        name = composed("/".join(["dataset", *row["filename"].split("/")[-2:]]))
        speaker, is_word, _ = name.rsplit("/", 1)[1].partition("_nohash_")
        label = composed(row["label"])
        found.append(Clip(name, find(files, name, where), (label,), speaker=speaker if is_word else ""))
    return found
