"""VoxCeleb1, speaker identification: 1,251 celebrities (153,516 utterances cut from YouTube videos).

Raw tree, dev and test parts as unpacked, and the two lists of the data set's site::

    {dev,test}/wav/<speaker>/<video>/<utterance>.wav     or all of them in wav/<speaker>/...
    iden_split.txt                                       `1 id10001/1zcIwhmdeo4/00001.wav`: 1 train, 2 valid, 3 test

The folders dev and test are splits of the verification task; identification needs both. A clip's source is its video.

- paper: the published identification split (138,361 / 6,904 / 8,251). Every speaker is in each split, as the task
  requires.
- honest: the published test; train and valid split again so that they share no video: of every speaker with two or
  more videos outside test, one is valid (drawn by seed 0). In the published split they may share room and microphone.
"""

from __future__ import annotations

from collections import defaultdict

from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.listing import audio_files
from data_pipelines.splits import BuildError, check_protocol, checked, read_text, shuffled
from spjax.tasks import TASKS

_SPLIT_OF_NUMBER = {"1": "train", "2": "valid", "3": "test"}
_SEED = 0


def recordings(raw: epath.Path) -> dict[str, tuple[str, str]]:
    """Lists every utterance: `speaker/video/utterance.wav` → (id, path), both relative to `raw`; sorted.

    Raises:
      BuildError: there are no utterances, or two have the same name.
    """
    found: dict[str, tuple[str, str]] = {}
    for folder in ("dev/wav", "test/wav", "wav"):
        for name, path in audio_files(raw, folder, suffixes=(".wav",), optional=True).items():
            short = name.removeprefix(folder + "/")
            if short in found:
                raise BuildError(f"{raw}: {found[short][1]} and {path} are the same utterance: remove one")
            found[short] = (name, path)
    if not found:
        raise BuildError(f"{raw} has no utterances in dev/wav, test/wav or wav: unpack VoxCeleb1 there")
    return dict(sorted(found.items()))


def clips(raw: epath.Path, protocol: str = "paper") -> Splits:
    """Lists the utterances of iden_split.txt; see the module for the protocols.

    Raises:
      BuildError: the list or an utterance is missing, or a line is not like `1 id10001/1zcIwhmdeo4/00001.wav`.
    """
    check_protocol(protocol)
    raw = epath.Path(raw)
    table = raw / "iden_split.txt"
    text, there = read_text(table), recordings(raw)
    splits: Splits = {split: [] for split in _SPLIT_OF_NUMBER.values()}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{table}, line {number}"
        split, _, short = line.strip().partition(" ")
        if split not in _SPLIT_OF_NUMBER or short.count("/") != 2:
            raise BuildError(f"{where} is {line!r}, not like '1 id10001/1zcIwhmdeo4/00001.wav': correct it")
        if short not in there:
            raise BuildError(
                f"{where} names {short}, which is in none of dev/wav, test/wav and wav under {raw}: unpack dev and test"
            )
        speaker, video, _ = short.split("/")
        splits[_SPLIT_OF_NUMBER[split]].append(Clip(*there[short], (speaker,), speaker, video))
    if protocol == "honest":
        splits.update(_by_video(splits["train"] + splits["valid"]))
    return checked(splits, TASKS["vox1_speaker"])


def _by_video(pool: list[Clip]) -> Splits:
    speakers_of, videos_of = defaultdict(set), defaultdict(set)
    for clip in pool:
        speakers_of[clip.source].add(clip.speaker)
        videos_of[clip.speaker].add(clip.source)
    held: set[str] = set()
    for speaker, videos in sorted(videos_of.items()):
        # A video of two celebrities would move the other's utterances too
        unshared = [video for video in sorted(videos) if speakers_of[video] == {speaker}]
        if len(videos) > 1 and unshared:
            held.add(shuffled(unshared, _SEED)[0])
    return {
        "train": [clip for clip in pool if clip.source not in held],
        "valid": [clip for clip in pool if clip.source in held],
    }
