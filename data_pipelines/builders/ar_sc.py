"""Arabic Speech Commands: six words and ten digits, 100 files each.

Raw layout, under the root: `AR_ SpeechCommands_Database/{Words,Numbers}/*.wav` and the tables `train_full.csv`,
`dev_full.csv`, `test_full.csv`, there or in `csv/`, tab-separated (columns filename and label; filenames have
`commands/` for Words and `numbers/` for Numbers). The first character of a file's name is its label: A add, B back,
C cancel, D delete, E confirm, F continue, 0-9.

Paper split: the tables, 1,107 / 123 / 370. **It measures memorisation**: the 1,600 files are copies of 467 recordings.
Digits are repeated byte for byte (1,000 files, 234 recordings), words at other volumes (600 files, 233 recordings), and
337 of the 370 test files have a copy in train. Speakers are not published.

Honest split: each recording once (the first of its copies by name), split again in the paper's proportions, every class
in every split (seed 0). Files of one class and length are copies if their samples correlate above 0.95 in magnitude.
`Clip.source` names the first copy in both protocols.

Traps: words were recorded at 48 kHz, digits at 8 kHz, so the bandwidth alone separates the groups. No split can correct
that: low-pass everything at extraction (`--lowpass=4000`), or report that it was not done.
"""

from __future__ import annotations

import numpy as np
from etils import epath
from tqdm import tqdm

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import BuildError, check_protocol, checked, composed, find, stratified
from data_pipelines.tables import find_table, read_table
from spjax.tasks import TASKS

DATABASE = "AR_ SpeechCommands_Database"
TABLES = {"train": "train_full.csv", "valid": "dev_full.csv", "test": "test_full.csv"}
FOLDERS = {"commands": "Words", "numbers": "Numbers"}  # name in the tables → folder on disk
LABELS = dict(zip("ABCDEF0123456789", TASKS["ar_sc"].slots[0].labels, strict=True))
ALIKE = 0.95  # correlation above which files are copies; other pairs stay below 0.8


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists the data set; see the module for layout and splits. Reads every file to find copies (seconds).

    Raises:
      BuildError: the layout differs from the published one.
    """
    check_protocol(protocol)
    files = audio_files(raw, DATABASE)
    splits: Splits = {}
    for split, table in TABLES.items():
        splits[split] = []
        for where, row in read_table(find_table(raw, table), ("filename", "label"), delimiter="\t"):
            folder, _, file = row["filename"].rpartition("/")
            folder = folder.rpartition("/")[2]
            name = composed(f"{DATABASE}/{FOLDERS.get(folder, folder)}/{file}")
            letter = row["label"].strip()
            if letter not in LABELS or not file.startswith(letter):
                raise BuildError(f"{where} has the label {letter!r}, must be the first character of {file}: correct it")
            splits[split].append(Clip(name, find(files, name, where), (LABELS[letter],)))
    sources = _recordings(raw, [clip for part in splits.values() for clip in part])
    splits = {split: [clip._replace(source=sources[clip.id]) for clip in part] for split, part in splits.items()}
    if protocol == "honest":
        every = [clip for part in splits.values() for clip in part]
        fractions = {split: len(part) / len(every) for split, part in splits.items()}
        splits = stratified([clip for clip in every if clip.source == clip.id], fractions, seed=0)
    return checked(splits, TASKS["ar_sc"])


def _recordings(raw: epath.PathLike, every: list[Clip]) -> dict[str, str]:
    """Maps the id of each clip to the id of the first clip, by name, that is a copy of the same recording."""
    import soundfile

    source: dict[str, str] = {}
    shapes: dict[tuple[str, int], list[tuple[str, np.ndarray]]] = {}
    for clip in tqdm(sorted(every), desc="ar_sc: copies", unit=" files", leave=False):
        source[clip.id] = clip.id
        try:
            with (epath.Path(raw) / clip.path).open("rb") as file:
                wave, _ = soundfile.read(file, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, OSError):
            continue  # extraction reports unreadable files
        wave = wave[:, 0] - wave[:, 0].mean() if len(wave) else wave[:, 0]
        size = np.linalg.norm(wave)
        if not size:
            continue
        wave = wave / size
        alike = shapes.setdefault((clip.labels[0], len(wave)), [])
        for name, other in alike:
            if abs(float(wave @ other)) > ALIKE:
                source[clip.id] = name
                break
        else:
            alike.append((clip.id, wave))
    return source
