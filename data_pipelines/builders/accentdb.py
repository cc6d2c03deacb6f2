"""AccentDB (extended): which of nine accents of English is spoken.

Raw tree, as its archive unpacks, the folder `data` itself included or not: `data/<accent>/<speaker>/*.wav`, 44.1 kHz.
bangla, malayalam, odiya and telugu are people's recordings, the other five are synthetic voices; all read the same
texts.

- paper: 64/16/20 by utterance (seed 0). Speakers are in all splits, and accents have one to eight of them: the model
  may name voices.
- honest: by speaker where there are enough. Accents of three speakers and more: each speaker in one split. Of two:
  one speaker is the test, the other's utterances are train and valid, 80/20. A single speaker (odiya and welsh of the
  real set): train and valid by utterance, none in test, for a known voice would say nothing there. So nobody heard in
  test is heard anywhere else, test lacks the accents of one voice, and train and valid share speakers of accents that
  have one or two.

TFDS's `accentdb` has the same accents in the same order and names speakers alike, but makes one split, and only from
an archive that it downloads itself: use it to get the data; the splits are made here.

Traps: with one or two voices an accent, accuracy on new speakers comes from very few voices: its interval is wider
than the number of utterances says.
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
    """Every recording; see the module for the protocols.

    Raises:
      BuildError: an accent is missing, a folder is named for none, or a file lies outside <accent>/<speaker>/.
    """
    check_protocol(protocol)
    raw = epath.Path(raw)
    base = "data/" if (raw / "data").is_dir() else ""
    by_accent: dict[str, dict[str, list[Clip]]] = defaultdict(lambda: defaultdict(list))
    for name, path in audio_files(raw, base.rstrip("/"), suffixes=(".wav",)).items():
        accent, _, rest = name.removeprefix(base).partition("/")
        if rest.count("/") != 1:
            raise BuildError(f"{raw / path} does not lie in {base}<accent>/<speaker>/: move it there, or away")
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
