"""AccentDB (extended): nine accents of English.

Raw tree, as unpacked, with or without the folder `data`: `data/<accent>/<speaker>/*.wav`, 44.1 kHz. bangla, malayalam,
odiya and telugu are recordings of people, the other five are synthetic voices; all read the same texts.

- paper: 64/16/20 by utterance (seed 0). Speakers are in all splits and accents have one to eight of them, so a model
  can score by recognising voices.
- honest: by speaker where there are enough. Accents with three or more speakers: each speaker in one split. With two:
  one speaker for test, the other's utterances 80/20 for train and valid. With one (odiya and welsh in the published
  set): train and valid by utterance, none in test. Test speakers are therefore in no other split, test lacks the
  accents of one voice, and train and valid share speakers of accents with one or two.

TFDS's `accentdb` has the same accents in the same order and the same speaker names, but one split only, and it reads
only an archive that it downloads itself: use it to get the data; the splits are made here.

Traps: with one or two voices an accent, accuracy on new speakers is measured on very few voices, so its interval is
wider than the number of utterances suggests.
"""

from __future__ import annotations

from collections import defaultdict

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import BuildError, by_speaker, check_protocol, checked, shuffled, stratified
from spjax.tasks import TASKS

_FRACTIONS = {"train": 0.64, "valid": 0.16, "test": 0.2}
_SEED = 0


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists every recording; see the module for the protocols.

    Raises:
      BuildError: an accent is missing, a folder is not an accent, or a file is not in <accent>/<speaker>/.
    """
    check_protocol(protocol)
    raw = epath.Path(raw)
    base = "data/" if (raw / "data").is_dir() else ""
    by_accent: dict[str, dict[str, list[Clip]]] = defaultdict(lambda: defaultdict(list))
    for name, path in audio_files(raw, base.rstrip("/"), suffixes=(".wav",)).items():
        accent, _, rest = name.removeprefix(base).partition("/")
        if rest.count("/") != 1:
            raise BuildError(f"{raw / path} is not in {base}<accent>/<speaker>/: move it there, or remove it")
        speaker = f"{accent}/{rest.partition('/')[0]}"
        by_accent[accent][speaker].append(Clip(name, path, (accent,), speaker))
    missing = [accent for accent in TASKS["accentdb"].slots[0].labels if accent not in by_accent]
    if missing:
        raise BuildError(f"{raw / base} lacks the accents {', '.join(missing)}: unpack the whole of AccentDB extended")

    listed = [clip for speakers in by_accent.values() for found in speakers.values() for clip in found]
    if protocol == "paper":
        return checked(stratified(listed, _FRACTIONS, _SEED), TASKS["accentdb"])
    many = [clip for clip in listed if len(by_accent[clip.labels[0]]) > 2]
    splits: Splits = by_speaker(many, _FRACTIONS, _SEED) if many else {split: [] for split in _FRACTIONS}
    few: list[Clip] = []
    for speakers in by_accent.values():
        if len(speakers) > 2:
            continue
        names = shuffled(sorted(speakers), _SEED)
        few += speakers[names[0]]
        for name in names[1:]:
            splits["test"] += speakers[name]
    for split, part in stratified(few, {"train": 0.8, "valid": 0.2}, _SEED).items():
        splits[split] += part
    return checked(splits, TASKS["accentdb"])
