"""Voice activity: speech (Google Speech Commands v2) or background (Freesound), in segments of 0.63 s.

Raw tree: the six manifests that NeMo's `process_vad_data.py` writes, at the root, and the recordings anywhere below
it::

    balanced_{speech,background}_{training,validation,testing}_manifest.json

A line of a manifest is {"audio_filepath", "offset", "duration", "label", ...}, seconds. Its paths are those of
whoever made it, mostly absolute: a recording is found by the longest end of that path which exists below the root
(`/somebody/google_v2/bed/x.wav` as `google_v2/bed/x.wav` or `bed/x.wav`), so keep the folders as they were.

The manifests make the splits: Speech Commands' own (by speaker), Freesound by recording. Paper and honest protocol
are the same. The source of a clip is its recording, its speaker that of Speech Commands' file names.

Traps: balancing may name a segment twice in a manifest; it counts once here. Words are one second long, so many
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
    """The segments that the six manifests name; see the module.

    Raises:
      BuildError: a manifest or a recording is missing, a line is no such JSON, an offset or duration that cannot be,
        or an unknown label.
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
            f"{where} names {named}, of which no end is below the root: put the recordings there, in the folders "
            "that they were in"
        )
    stem = name.rsplit("/", 1)[-1]
    speaker = stem.split("_nohash_")[0] if "_nohash_" in stem else ""
    return Clip(f"{name}@{start:g}+{duration:g}", files[name], (label,), speaker, name, start, duration)


def _found(files: Mapping[str, str], named: str) -> str | None:
    """The longest end of a path that is one of `files`."""
    parts = [part for part in composed(named).replace("\\", "/").split("/") if part not in ("", ".")]
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in files), None)
