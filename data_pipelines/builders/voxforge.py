"""VoxForge: language identification, six languages (read speech contributed by users of voxforge.org).

Raw tree, the archives of all languages unpacked in place, under the root or under its folder `downloads`::

    <language>/Trunk/Audio/Main/16kHz_16bit/<speaker>-<date>-<id>/wav/*.wav

The speaker is the folder's name before its first `-`; the name `anonymous` is shared by many people, so each anonymous
folder counts as one speaker.

- paper: of each language the first 1,800 files by name, shuffled (seed 1) into 1,200/300/300. Speakers are in all
  splits. The recipe takes the first folders in directory order until it has 1,800 files; ours are sorted.
- honest: speakers (over all languages, since user names are shared by them) split 4/1/1, then of each language at most
  1,200/300/300 files drawn from them (seed 1): as large as the paper's, with many more speakers.

A language of fewer files is split in the same proportions. TFDS has a speaker-disjoint `voxforge` too (70/10/20 of all
files), which cannot replace this: it reads the 100 GB of original .tgz archives by a list that it downloads, not an
unpacked tree, does not balance languages, and counts all anonymous users of all languages as one speaker, so that a
large share of the data is in one split.

Traps: recordings of a user share microphone and room, so with the paper split a model can learn these instead of the
language.
"""

from __future__ import annotations

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import BuildError, by_speaker, check_protocol, checked, shuffled
from spjax.tasks import TASKS

_SIZES = {"train": 1200, "valid": 300, "test": 300}  # of a language
_SEED = 1


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists at most 1,800 recordings of each language; see the module for the protocols.

    Raises:
      BuildError: a language is missing or has fewer than 6 recordings (paper), or too few speakers to split (honest).
    """
    check_protocol(protocol)
    raw = epath.Path(raw)
    base = "downloads/" if (raw / "downloads").is_dir() else ""
    listed = {language: _language(raw, base + language, language) for language in TASKS["voxforge"].slots[0].labels}
    total = sum(_SIZES.values())
    splits: Splits = {split: [] for split in _SIZES}
    if protocol == "paper":
        for language, found in listed.items():
            if len(found) < len(_SIZES) * 2:
                raise BuildError(f"{raw / (base + language)} has {len(found)} recordings: unpack all of its archives")
            found = shuffled(found[:total], _SEED)
            start = 0
            for split in ("valid", "test", "train"):
                end = len(found) if split == "train" else start + len(found) * _SIZES[split] // total
                splits[split] += found[start:end]
                start = end
    else:
        fractions = {split: size / total for split, size in _SIZES.items()}
        by_split = by_speaker((clip for found in listed.values() for clip in found), fractions, _SEED)
        for split, size in _SIZES.items():
            for language in listed:
                of_language = [clip for clip in by_split[split] if clip.labels == (language,)]
                splits[split] += shuffled(of_language, _SEED)[:size]
    return checked(splits, TASKS["voxforge"])


def _language(raw: epath.Path, folder: str, language: str) -> list[Clip]:
    found = []
    for name, path in audio_files(raw, f"{folder}/Trunk/Audio/Main/16kHz_16bit", suffixes=(".wav",)).items():
        session = name.removeprefix(f"{folder}/Trunk/Audio/Main/16kHz_16bit/").partition("/")[0]
        speaker = session.partition("-")[0]
        found.append(Clip(name, path, (language,), session if speaker.lower() == "anonymous" else speaker))
    return found
