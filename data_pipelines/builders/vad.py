"""Voice activity: speech (Google Speech Commands v2) or background (Freesound), in segments of 0.63 s.

Raw tree: the six manifests that NeMo's `process_vad_data.py` writes, at the root, and the recordings anywhere under
it::

    balanced_{speech,background}_{training,validation,testing}_manifest.json

A line of a manifest is {"audio_filepath", "offset", "duration", "label", ...}, in seconds. Its paths are from the
machine that wrote it, mostly absolute: a recording is found by the longest suffix of that path that exists under the
root (`/home/user/google_v2/bed/x.wav` as `google_v2/bed/x.wav` or `bed/x.wav`), so keep the folder structure.

The manifests define the splits: those of Speech Commands (by speaker), Freesound by recording. Paper and honest
protocol are the same. A clip's source is its recording, its speaker that of Speech Commands' file names.

Traps: balancing may list a segment twice in a manifest; duplicates are dropped. Words are one second long, so many
segments of "speech" are mostly silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import BuildError, check_protocol, checked, composed, read_text
from spjax.tasks import TASKS

_PARTS = {"train": "training", "valid": "validation", "test": "testing"}


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists the segments of the six manifests; see the module.

    Raises:
      BuildError: a manifest or a recording is missing, a line is not such JSON, an invalid offset or duration, or an
        unknown label.
    """
    check_protocol(protocol)
    raw = epath.Path(raw)
    manifests = {
        split: [raw / f"balanced_{label}_{part}_manifest.json" for label in TASKS["vad"].slots[0].labels]
        for split, part in _PARTS.items()
    }
    lines = {
        split: [
            (f"{path}, line {number}", line)
            for path in paths
            for number, line in enumerate(read_text(path).splitlines(), 1)
            if line.strip()
        ]
        for split, paths in manifests.items()
    }
    files = audio_files(raw)
    splits: Splits = {}
    for split, named in lines.items():
        segments = (_segment(files, where, line) for where, line in named)
        splits[split] = list({clip.id: clip for clip in segments}.values())
    return checked(splits, TASKS["vad"])


def _segment(files: Mapping[str, str], where: str, line: str) -> Clip:
    try:
        row = json.loads(line)
        named, label = str(row["audio_filepath"]), str(row["label"])
        start, duration = float(row["offset"]), float(row["duration"])
    except (ValueError, TypeError, KeyError) as error:
        raise BuildError(
            f"{where} is not {{audio_filepath, offset, duration, label}} in JSON ({error!r}): write the manifest again"
        ) from error
    if not (0 <= start < float("inf") and 0 < duration < float("inf")):
        raise BuildError(f"{where}: {duration:g} s from {start:g} s cannot be cut: correct the line")
    name = _found(files, named)
    if name is None:
        raise BuildError(
            f"{where} names {named}, and no suffix of that path exists under the root: put the recordings there, in "
            "their original folders"
        )
    stem = name.rsplit("/", 1)[-1]
    speaker = stem.split("_nohash_")[0] if "_nohash_" in stem else ""
    return Clip(f"{name}@{start:g}+{duration:g}", files[name], (label,), speaker, name, start, duration)


def _found(files: Mapping[str, str], named: str) -> str | None:
    """Returns the longest suffix of a path that is one of `files`."""
    parts = [part for part in composed(named).replace("\\", "/").split("/") if part not in ("", ".")]
    suffixes = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((suffix for suffix in suffixes if suffix in files), None)
