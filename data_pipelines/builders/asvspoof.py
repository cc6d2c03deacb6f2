"""ASVspoof 2019 LA: bona fide speech (bonafide) or synthesised or converted speech (spoof).

Raw tree, as unpacked, with or without the folder LA::

    LA/ASVspoof2019_LA_{train,dev,eval}/flac/*.flac
    LA/ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.{train.trn,dev.trl,eval.trl}.txt

A line of a protocol is `SPEAKER FILE - SYSTEM LABEL`; SYSTEM is the attack (A01 to A19), `-` for bonafide. The
official splits (25,380 / 24,844 / 71,237) share no speaker, and eval has attacks that are not in train: paper and
honest protocol are the same.

Traps: nine of ten utterances are spoofs, so accuracy is uninformative: the metric is the equal error rate. Leading and
trailing silence reveals many spoofs (a known weakness of this set), which no split can correct.
"""

from __future__ import annotations

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import BuildError, check_protocol, checked, find, read_text
from spjax.tasks import TASKS

_PARTS = {"train": ("train", "train.trn"), "valid": ("dev", "dev.trl"), "test": ("eval", "eval.trl")}


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists the official splits; see the module.

    Raises:
      BuildError: a protocol or a listed file is missing, a line does not have five columns, or a label is unknown.
    """
    check_protocol(protocol)
    raw = epath.Path(raw)
    base = "LA/" if (raw / "LA").is_dir() else ""
    splits: Splits = {}
    for split, (part, table) in _PARTS.items():
        path = raw / f"{base}ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.{table}.txt"
        text = read_text(path)
        folder = f"{base}ASVspoof2019_LA_{part}/flac"
        files = audio_files(raw, folder, suffixes=(".flac",))
        splits[split] = []
        for number, line in enumerate(text.splitlines(), 1):
            where, columns = f"{path}, line {number}", line.split()
            if not columns:
                continue
            if len(columns) != 5:
                raise BuildError(f"{where} is {line!r}, not SPEAKER FILE - SYSTEM LABEL: take it from its archive")
            speaker, name, _, _, label = columns
            name = f"{folder}/{name}.flac"
            splits[split].append(Clip(name, find(files, name, where), (label,), speaker))
    return checked(splits, TASKS["asvspoof"])
