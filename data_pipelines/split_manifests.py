"""Splits written down, so that they can be used again elsewhere: a manifest a split, with the hash of everything.

A directory of `train.jsonl`, `valid.jsonl` and so on, a clip a line:

    {"id": ..., "path": ..., "labels": [one a slot], "speaker": ..., "source": ..., "start": 0.0, "duration": null,
     "sha256": ..., "bytes": ..., "rate": 16000, "seconds": 1.2}

and `splits.json`, which is written last: the task, the protocol, counts, the sha256 of every manifest. Hash, size, rate
and length are those of the whole file at `path`; rate and length are null where libsndfile does not know the format.
Of unit text (data_pipelines/frames.py), `path` is `FILE:LINE`, and hash and size are those of the line's units.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from etils import epath
from tqdm import tqdm

from data_pipelines import frames
from data_pipelines.clips import Clip, Splits
from data_pipelines.splits import BuildError, checked, is_file, read_text
from spjax.tasks import Slot, Task

CARD = "splits.json"
FORMAT = "spjax-splits"
VERSION = 1


class FileFacts(NamedTuple):
    """What a file is: sha256 and size of all of it; samples a second and length in seconds, None where unknown."""

    sha256: str
    bytes: int
    rate: int | None
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Splits as they were written down.

    Attributes:
      task: what the labels mean.
      protocol: how the splits were made.
      splits: the clips, each split sorted by id.
      files: path of every file → what it was.
      notes: as they were written.
    """

    task: Task
    protocol: str
    splits: Splits
    files: dict[str, FileFacts]
    notes: tuple[str, ...] = ()


def inspect_files(raw: epath.PathLike, paths: Iterable[str]) -> dict[str, FileFacts]:
    """Reads every file once, under a progress bar; of unit text, the lines.

    Args:
      raw: root of the data set; local or gs://.
      paths: relative to it; repeats are read once.

    Raises:
      BuildError: a file is missing or cannot be read.
    """
    wanted = sorted(set(paths))
    lines = frames.read_paths(raw, [path for path in wanted if frames.line_of(path)])
    found = {path: FileFacts(frames.digest(line), 4 * len(line.frames), None, None) for path, line in lines.items()}
    wanted = [path for path in wanted if path not in found]
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        facts = pool.map(lambda path: _inspect(epath.Path(raw) / path), wanted)
        progress = tqdm(facts, total=len(wanted), desc="hash", unit=" files", disable=not wanted)
        return found | dict(zip(wanted, progress, strict=True))


def write_splits(
    out: epath.PathLike,
    task: Task,
    splits: Mapping[str, list[Clip]],
    files: Mapping[str, FileFacts],
    protocol: str,
    notes: Sequence[str] = (),
) -> None:
    """Writes the directory; `files` as of `inspect_files`. What it held before under these names is replaced.

    `notes` were made when the data were listed; the card of records made of them has them too.

    Raises:
      BuildError: `files` lacks a clip's file.
    """
    folder = epath.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    digests = {}
    for split, clips in splits.items():
        lacking = [clip.path for clip in clips if clip.path not in files]
        if lacking:
            raise BuildError(f"{folder}: nothing is known of {lacking[0]}: inspect every file of the splits first")
        lines = [json.dumps(clip._asdict() | files[clip.path]._asdict(), ensure_ascii=False) for clip in clips]
        content = "".join(line + "\n" for line in lines).encode()
        _write(folder / f"{split}.jsonl", content)
        digests[split] = hashlib.sha256(content).hexdigest()
    card = {
        "format": FORMAT,
        "version": VERSION,
        "task": dataclasses.asdict(task),
        "protocol": protocol,
        "notes": list(notes),
        "counts": {split: len(clips) for split, clips in splits.items()},
        "sha256": digests,
    }
    _write(folder / CARD, (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())


def read_splits(directory: epath.PathLike) -> Manifest:
    """Reads what `write_splits` wrote, after comparing every manifest with its hash.

    Raises:
      BuildError: something is missing, damaged or of a newer version.
    """
    folder = epath.Path(directory)
    path = folder / CARD
    if not is_file(path):
        raise BuildError(f"{path} is missing: {folder} is no directory of splits, or it was not written to its end")
    try:
        card = json.loads(read_text(path))
        if card["format"] != FORMAT or card["version"] > VERSION:
            raise BuildError(f"{path} is {card['format']!r} version {card['version']}, known is {FORMAT!r} {VERSION}")
        slots = tuple(Slot(slot["name"], tuple(slot["labels"])) for slot in card["task"]["slots"])
        task = Task(card["task"]["name"], slots, card["task"]["metric"])
        protocol, digests = str(card["protocol"]), dict(card["sha256"])
        notes = tuple(map(str, card.get("notes", ())))  # those of earlier versions have none
    except BuildError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{path} is damaged ({error!r}): write the splits again") from error
    if not digests:
        raise BuildError(f"{path} is damaged (it lists no split): write the splits again")
    splits: Splits = {}
    files: dict[str, FileFacts] = {}
    for split, digest in digests.items():
        manifest = folder / f"{split}.jsonl"
        content = manifest.read_bytes() if is_file(manifest) else b""
        if hashlib.sha256(content).hexdigest() != digest:
            raise BuildError(f"{manifest} is not the file that {CARD} describes (sha256 differs): write it again")
        splits[split] = []
        for number, line in enumerate(content.decode().removesuffix("\n").split("\n"), 1):
            try:
                row: dict[str, Any] = json.loads(line)
                files[row["path"]] = FileFacts(**{name: row.pop(name) for name in FileFacts._fields})
                splits[split].append(Clip(**row | {"labels": tuple(row["labels"])}))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BuildError(f"{manifest}, line {number} is no clip ({error!r}): write the splits again") from error
    return Manifest(task, protocol, checked(splits, task), files, notes)


def verify_files(raw: epath.PathLike, files: Mapping[str, FileFacts]) -> None:
    """Reads every file under `raw` again and compares it with what is written down.

    Raises:
      BuildError: files that are missing or differ, the first of them by name.
    """
    found = inspect_files(raw, files)
    other = [path for path, facts in files.items() if found[path].sha256 != facts.sha256]
    if other:
        raise BuildError(
            f"{epath.Path(raw) / other[0]} is not the file that was split (sha256 differs; {len(other)} such of "
            f"{len(files)}): take the data set from the same source"
        )


def _inspect(path: epath.Path) -> FileFacts:
    import soundfile

    if path.exists() and not is_file(path):
        raise BuildError(f"{path} is a folder, pipe or device: put the recording there")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BuildError(f"{path} cannot be read ({error.strerror or error}): unpack the whole data set") from error
    try:
        info = soundfile.info(io.BytesIO(content))
        known: tuple[int, float] | tuple[None, None] = (int(info.samplerate), float(info.duration))
    except (soundfile.SoundFileError, TypeError):
        known = (None, None)
    return FileFacts(hashlib.sha256(content).hexdigest(), len(content), *known)


def _write(path: epath.Path, content: bytes) -> None:
    fresh = path.parent / f".{path.name}.tmp"
    fresh.write_bytes(content)
    fresh.replace(path)
