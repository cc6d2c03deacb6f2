"""ESC-50: environmental sounds, 50 classes of 40 clips of 5 s, cut from Freesound recordings; no speech.

Raw tree, as the repository or its archive unpacks::

    audio/<fold>-<clip>-<take>-<target>.wav     44.1 kHz
    meta/esc50.csv                              filename, fold, target, category, esc10, src_file, take

The 2,000 clips are in five folds, each balanced over classes; all takes of one Freesound recording (`src_file`, the
clip's source) are in one fold. Labels are the categories, in the order of the data set's targets 0 to 49.

- paper: test is fold 1; folds 2 to 5 are split 80/20 into train and valid (seed 1), so these two share recordings.
- honest, honest-0 to honest-4 (honest is honest-0): test is fold K + 1, valid the next one (cyclically), train the
  other three: no recording in two splits. Report the mean over the five, as the literature does.

Traps: forks of the repository rename files and write matching lists; the csv is authoritative. Many clips end in
digital silence.
"""

from __future__ import annotations

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import BuildError, check_protocol, checked, find, stratified
from data_pipelines.tables import read_table
from spjax.tasks import TASKS

FOLDS = 5
PROTOCOLS = ("paper", "honest", *(f"honest-{fold}" for fold in range(FOLDS)))


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists the clips of meta/esc50.csv; see the module for the protocols.

    Raises:
      BuildError: the csv or a clip is missing, an unknown fold, target or category, or a fold without clips.
    """
    check_protocol(protocol, PROTOCOLS)
    raw = epath.Path(raw)
    labels = TASKS["esc50"].slots[0].labels
    folds: dict[str, list[Clip]] = {str(number): [] for number in range(1, FOLDS + 1)}
    rows = read_table(raw / "meta" / "esc50.csv", ("filename", "fold", "target", "category", "src_file"))
    files = audio_files(raw, "audio", suffixes=(".wav",))
    for where, row in rows:
        target, category = row["target"], row["category"]
        if not target.isdigit() or int(target) >= len(labels) or labels[int(target)] != category:
            raise BuildError(f"{where}: target {target} is not {category!r} in ESC-50: take its meta/esc50.csv again")
        if row["fold"] not in folds:
            raise BuildError(f"{where}: fold {row['fold']!r} is not 1 to {FOLDS}: take ESC-50's meta/esc50.csv again")
        path = f"audio/{row['filename']}"
        folds[row["fold"]].append(Clip(path, find(files, path, where), (category,), source=row["src_file"]))
    parts = list(folds.values())
    if protocol == "paper":
        rest = [clip for part in parts[1:] for clip in part]
        return checked({**stratified(rest, {"train": 0.8, "valid": 0.2}, seed=1), "test": parts[0]}, TASKS["esc50"])
    test = int(protocol.partition("-")[2] or 0)
    valid = (test + 1) % FOLDS
    train = [clip for number, part in enumerate(parts) if number not in (test, valid) for clip in part]
    return checked({"train": train, "valid": parts[valid], "test": parts[test]}, TASKS["esc50"])
