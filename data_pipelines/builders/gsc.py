"""Google Speech Commands v1: ten English commands, 20 other words, background noise.

Raw layout, under the root: `speech_commands_v0.01/<word>/<speaker>_nohash_<k>.wav`,
`speech_commands_v0.01/_background_noise_/*.wav` (six recordings of about a minute) and
`speech_commands_test_set_v0.01/<class>/*.wav` (3,081 clips of 12 classes).

A speaker of the first archive is in valid if the SHA-1 of the name is below 10 % of its range, in no split below 20 %
(the speakers of the test archive), else in train. Test is the second archive, unchanged.

Paper split: train and valid are resampled with replacement, uniformly over classes, to their number of clips (51,094
and 6,804). A repeated clip is named `name#2`. `_silence_` is a random crop of one second of a noise recording, so train
and valid share all six recordings. Seeds are ours (the reference had none).

Honest split: every clip once; as many of `_unknown_` and of `_silence_` as of a command on average, as in test; one
noise recording is used for valid, the others for train.

Traps: most words are `_unknown_`; the sources of the test archive's silences are not published; noise recordings are
not one second long. TFDS has `speech_commands` as v0.02 only, with other clips and another test archive.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import BuildError, check_protocol, checked, shuffled, uniform
from spjax.tasks import TASKS

WORDS, TEST = "speech_commands_v0.01", "speech_commands_test_set_v0.01"
NOISE = f"{WORDS}/_background_noise_/"
UNKNOWN, SILENCE = "_unknown_", "_silence_"
COMMANDS = tuple(label for label in TASKS["gsc"].slots[0].labels if label not in (UNKNOWN, SILENCE))
CROP = 1.0  # seconds of a silence
SEEDS = {"train": 1, "valid": 2}


class Noise(NamedTuple):
    """A background noise recording: id, path and length in seconds."""

    id: str
    path: str
    seconds: float


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists the data set; see the module for layout and splits.

    Raises:
      BuildError: the layout differs from the published one.
    """
    check_protocol(protocol)
    words: Splits = {"train": [], "valid": []}
    noises = []
    for name, path in audio_files(raw, WORDS).items():
        if name.startswith(NOISE):
            noises.append(Noise(name, path, _seconds(epath.Path(raw) / path)))
            continue
        word, speaker = name.split("/")[1], _speaker(name)
        if not speaker:
            raise BuildError(f"{epath.Path(raw) / path} is not named <speaker>_nohash_<k>.wav: remove or rename it")
        clip = Clip(name, path, (word if word in COMMANDS else UNKNOWN,), speaker=speaker)
        if split := split_of(clip.speaker):
            words[split].append(clip)
    if not noises or (protocol == "honest" and len(noises) < 2):
        raise BuildError(f"{epath.Path(raw) / NOISE} has {len(noises)} recordings: unpack the whole archive")
    test = [
        Clip(name, path, (name.split("/")[1],), speaker=_speaker(name)) for name, path in audio_files(raw, TEST).items()
    ]
    if protocol == "paper":
        drawn = {split: _resampled(part, noises, SEEDS[split]) for split, part in words.items()}
    else:
        first, *others = shuffled(noises, seed=0)
        drawn = {
            split: _thinned(words[split], sorted(its), SEEDS[split])
            for split, its in (("train", others), ("valid", [first]))
        }
    return checked({**drawn, "test": test}, TASKS["gsc"])


def split_of(speaker: str) -> str | None:
    """Returns the split of a speaker by the data set's rule; None for speakers that are left out."""
    largest = 2**27 - 1
    percent = int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % (largest + 1) * (100 / largest)
    if percent < 10:
        return "valid"
    return None if percent < 20 else "train"


def _resampled(words: Sequence[Clip], noises: Sequence[Noise], seed: int) -> list[Clip]:
    """Draws len(words) + len(noises) clips with replacement: a uniform class, then a uniform clip of it."""
    of_class: dict[str, list[Clip]] = {label: [] for label in (*COMMANDS, UNKNOWN)}
    for clip in words:
        of_class[clip.labels[0]].append(clip)
    groups = [group for group in of_class.values() if group]
    count = len(words) + len(noises)
    draws = uniform(3 * count, seed).reshape(3, count)
    drawn, times = [], Counter[str]()
    for which, one, place in draws.T:
        number = int(which * (len(groups) + 1))
        if number == len(groups):
            clip = _silence(noises[int(one * len(noises))], place)
        else:
            clip = groups[number][int(one * len(groups[number]))]
        times[clip.id] += 1
        drawn.append(clip._replace(id=f"{clip.id}#{times[clip.id]}") if times[clip.id] > 1 else clip)
    return drawn


def _thinned(words: Sequence[Clip], noises: Sequence[Noise], seed: int) -> list[Clip]:
    """Takes every command once, and as many unknown words and distinct silences as of a command on average."""
    commands = [clip for clip in words if clip.labels != (UNKNOWN,)]
    others = [clip for clip in words if clip.labels == (UNKNOWN,)]
    count = max(1, round(len(commands) / len(COMMANDS)))
    silences = {
        clip.id: clip
        for number, place in enumerate(uniform(4 * count, seed))  # spare draws, in case a start is drawn twice
        for clip in [_silence(noises[number % len(noises)], place)]
    }
    return commands + shuffled(others, seed)[:count] + list(silences.values())[:count]


def _silence(noise: Noise, place: float) -> Clip:
    """Makes a crop of one second that starts at fraction `place` in [0, 1) of a recording, to the millisecond."""
    start = math.floor(place * max(0.0, noise.seconds - CROP) * 1000) / 1000
    duration = CROP if noise.seconds > CROP else None
    return Clip(f"{noise.id}@{start:.3f}", noise.path, (SILENCE,), source=noise.id, start=start, duration=duration)


def _speaker(name: str) -> str:
    found = re.search(r"([^/_]+)_nohash_", name)
    return found[1] if found else ""


def _seconds(path: epath.Path) -> float:
    import soundfile

    try:
        with path.open("rb") as file:
            return soundfile.info(file).duration
    except (soundfile.SoundFileError, OSError) as error:
        raise BuildError(f"{path} is not a readable recording ({error}): take it from its source again") from error
