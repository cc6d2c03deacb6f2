"""Small raw directories in the published layouts, and checks that every listing must pass."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
import soundfile
from etils import epath

from data_pipelines.clips import Clip, Splits
from data_pipelines.splits import shuffled

Plant = Callable[[Path, int], None]  # (root, seed of the order of file creation)


@functools.cache
def sound(frames: int = 32, rate: int = 16_000, kind: str = "WAV") -> bytes:
    """Makes a file of noise."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, frames)
    soundfile.write(file, noise, rate, format=kind, subtype="PCM_16")
    return file.getvalue()


def record(root: Path, names: Iterable[str], order: int = 0, contents: bytes | None = None) -> None:
    """Writes audio files of these names, in an order drawn by `order`."""
    for name in shuffled(sorted(names), order):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents or sound(kind="FLAC" if name.endswith(".flac") else "WAV"))


def distinct(root: Path, names: Iterable[str]) -> None:
    """Writes audio files of these names, all with different content."""
    for name in names:
        record(root, [name], contents=sound() + name.encode())


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def listed(
    clips: Callable[[epath.Path, str], Splits], plant: Plant, folder: Path, protocols: Iterable[str]
) -> dict[str, Splits]:
    """Lists the splits by protocol, with checks that hold for every builder.

    Splits do not depend on the order of file creation; ids are unique over all splits; files exist.
    """
    one, other = folder / "one", folder / "other"
    plant(one, 1)
    plant(other, 2)
    found = {}
    for protocol in protocols:
        splits = clips(epath.Path(one), protocol)
        assert splits == clips(epath.Path(other), protocol)
        assert set(splits) == {"train", "valid", "test"}
        ids = [clip.id for part in splits.values() for clip in part]
        assert len(set(ids)) == len(ids)
        assert all((one / clip.path).is_file() for part in splits.values() for clip in part)
        found[protocol] = splits
    return found


def counts(splits: Splits) -> tuple[int, int, int]:
    """Number of clips in train, valid and test."""
    return len(splits["train"]), len(splits["valid"]), len(splits["test"])


def everything(splits: Splits) -> list[Clip]:
    return [clip for part in splits.values() for clip in part]


def shared(splits: Splits, what: str) -> set[tuple[str, str]]:
    """Pairs of splits that share a `what` ("speaker", "source")."""
    names = {split: {getattr(clip, what) for clip in part} - {""} for split, part in splits.items()}
    return {(a, b) for a, b in combinations(("train", "valid", "test"), 2) if names[a] & names[b]}


def labels(clips: Iterable[Clip]) -> set[str]:
    return {clip.labels[0] for clip in clips}
