"""Reads the user's data from a folder with one subfolder a class."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping

from etils import epath

from data_pipelines.clips import Clip
from data_pipelines.listing import list_recordings
from data_pipelines.splits import SPLITS, BuildError
from data_pipelines.user_data import ALIASES, FRACTIONS, LIKE_A_SPLIT, UserData, finish
from spjax.encoders.audio import SUFFIXES
from spjax.io import places


def read_folders(
    folder: epath.PathLike,
    *,
    slot: str = "label",
    name: str | None = None,
    metric: str | None = None,
    fractions: Mapping[str, float] = FRACTIONS,
    seed: int = 0,
) -> UserData:
    """Reads a task and its clips from a folder of folders (see `manifests` for the format). Paths are relative to it.

    Args:
      folder: local or gs://.
      slot: name of the one slot.
      name, metric, fractions, seed: see `manifests.read_manifest`.

    Raises:
      BuildError: names the folder or file and a fix.
    """
    folder = epath.Path(folder)
    found = list_recordings(folder, thorough=True)
    tops = {path for path in found.folders if "/" not in path}
    others = sorted(top for top in tops if top.lower() not in ALIASES)
    with_splits = bool(tops) and not others
    if others and len(others) < len(tops):
        named = ", ".join(sorted(tops.difference(others)))
        raise BuildError(
            f"{folder}: {named} are names of splits, {', '.join(others)} are not: if the former are splits, move the "
            "others away or into them; if all are classes, rename the former, or list the files in a CSV"
        )
    if len(others) > 1 and all(map(LIKE_A_SPLIT.fullmatch, others)):
        raise BuildError(
            f"{folder}: {', '.join(others)} look like splits, but would be read as labels: name splits "
            f"{', '.join(SPLITS)}; if they are classes, rename them, or list the files in a CSV"
        )
    below = {file.split("/")[1].lower() if file.count("/") > 1 else "" for file in found.files}
    if not with_splits and below <= set(ALIASES) and len({ALIASES[name] for name in below}) > 1:
        raise BuildError(
            f"{folder} has the splits {', '.join(sorted(below))} inside the classes: move them up, as "
            f"{folder}/<split>/<class>/, or list the files in a CSV"
        )
    depth = 2 if with_splits else 1
    form = "<split>/<class>/" if with_splits else "<class>/"
    filled = {"/".join(file.split("/")[:level]) for file in found.files for level in range(1, depth + 1)}
    empty = sorted(path for path in found.folders if path.count("/") < depth and path not in filled)
    if empty or not found.files:
        notes = "".join(f" ({note})" for note in found.notes())
        raise BuildError(
            f"{folder / empty[0] if empty else folder} holds no recording{notes}: put recordings there with names that "
            f"end in one of {', '.join(SUFFIXES)}, or move it out of {folder}"
        )
    clips: dict[str, list[Clip]] = defaultdict(list)
    folder_of: dict[str, str] = {}
    for file, path in found.files.items():
        *folders, _ = file.split("/")
        if len(folders) < depth:
            raise BuildError(f"{folder / path} is not in the folder of a class: move it to {folder}/{form}")
        split = ALIASES[folders[0].lower()] if with_splits else ""
        label = folders[depth - 1].strip()
        if not label:
            raise BuildError(f"{folder}: the folder of {path!r} has a blank name, which would be its label: rename it")
        if folder_of.setdefault(label, folders[depth - 1]) != folders[depth - 1]:
            raise BuildError(
                f"{folder}: the folders {folder_of[label]!r} and {folders[depth - 1]!r} differ only in spaces: merge "
                "them, or rename one"
            )
        clips[split].append(Clip(file, path, (label,)))
    return finish(
        folder,
        folder,
        name or os.path.basename(places.absolute(folder)),
        dict(clips),
        [slot],
        metric,
        fractions,
        seed,
        [*found.notes(), *_same_below(found.files, depth)],
    )


def _same_below(files: Iterable[str], depth: int) -> list[str]:
    """Returns a note if every class has the same subfolders, which may be the labels, as in SPEAKER/LABEL/1.wav."""
    below: dict[str, set[str]] = defaultdict(set)
    for file in files:
        *folders, _ = file.split("/")
        below[folders[depth - 1]] |= set(folders[depth : depth + 1]) or {""}
    first = next(iter(below.values()))
    if len(first) < 2 or any(names != first for names in below.values()):
        return []
    named = ", ".join(sorted(first)[:4]) + (", ..." if len(first) > 4 else "")
    return [f"every class has the same subfolders ({named}): if those are the labels, list the files in a CSV instead"]
