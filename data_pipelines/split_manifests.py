"""Split manifests: one file a split with hashes of all recordings, so that splits can be reused elsewhere.

A directory of `train.jsonl`, `valid.jsonl` and so on, one clip a line:

    {"id": ..., "path": ..., "labels": [one a slot], "speaker": ..., "source": ..., "start": 0.0, "duration": null,
     "sha256": ..., "bytes": ..., "rate": 16000, "seconds": 1.2}

and `splits.json`, which is written last: the task, the protocol, counts, the sha256 of every manifest. Hash, size, rate
and length are of the file at `path`, not of the crop; rate and length are null for formats that libsndfile cannot read.
For unit text (data_pipelines/frames.py), `path` is `FILE:LINE`, and hash and size are of the line's units.
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
from spjax.io.files import write_file
from spjax.tasks import Slot, Task

CARD = "splits.json"
FORMAT = "spjax-splits"
VERSION = 1


class FileFacts(NamedTuple):
    """sha256 and size in bytes of a file; sample rate in Hz and length in seconds, None if unknown."""

    sha256: str
    bytes: int
    rate: int | None
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Splits read from a directory.

    Attributes:
      task: the task of the labels.
      protocol: how the splits were made.
      splits: the clips, each split sorted by id.
      files: path → facts of every file when it was split.
      notes: as written.
    """

    task: Task
    protocol: str
    splits: Splits
    files: dict[str, FileFacts]
    notes: tuple[str, ...] = ()


def inspect_files(raw: epath.PathLike, paths: Iterable[str]) -> dict[str, FileFacts]:
    """Hashes every file once, with a progress bar; for unit text, the lines.

    Args:
      raw: root of the data set; local or gs://.
      paths: relative to the root; duplicates are read once.

    Raises:
      BuildError: a file is missing or cannot be read.
    """
    wanted = sorted(set(paths))
    lines = frames.read_paths(raw, [path for path in wanted if frames.line_of(path)])
    found = {path: FileFacts(frames.digest(line), 4 * len(line.frames), None, None) for path, line in lines.items()}
    wanted = [path for path in wanted if path not in found]
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        facts = pool.map(lambda path: _inspect(epath.Path(raw) / path), wanted)
        progress = tqdm(facts, total=len(wanted), desc="hash", unit=" files", disable=not wanted, leave=False)
        return found | dict(zip(wanted, progress, strict=True))


def write_splits(
    out: epath.PathLike,
    task: Task,
    splits: Mapping[str, list[Clip]],
    files: Mapping[str, FileFacts],
    protocol: str,
    notes: Sequence[str] = (),
) -> None:
    """Writes a directory of splits; files of the same names are replaced.

    Args:
      out: the directory; local or gs://.
      task: the task of the labels.
      splits: the clips.
      files: the result of `inspect_files`.
      protocol: how the splits were made.
      notes: about the listing, for the cards of records made from the splits.

    Raises:
      BuildError: a clip's file is missing in `files`.
    """
    folder = epath.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    digests = {}
    for split, clips in splits.items():
        lacking = [clip.path for clip in clips if clip.path not in files]
        if lacking:
            raise BuildError(f"{folder}: {lacking[0]} was not inspected: inspect every file of the splits first")
        lines = [json.dumps(clip._asdict() | files[clip.path]._asdict(), ensure_ascii=False) for clip in clips]
        content = "".join(line + "\n" for line in lines).encode()
        write_file(folder / f"{split}.jsonl", content)
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
    write_file(folder / CARD, (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())


def read_splits(directory: epath.PathLike) -> Manifest:
    """Reads splits that `write_splits` wrote and checks every manifest against its hash.

    Raises:
      BuildError: a missing, damaged or newer file.
    """
    folder = epath.Path(directory)
    path = folder / CARD
    if not is_file(path):
        raise BuildError(f"{path} is missing: {folder} is not a directory of splits, or it is incomplete")
    try:
        card = json.loads(read_text(path))
        if card["format"] != FORMAT or card["version"] > VERSION:
            raise BuildError(
                f"{path} is {card['format']!r} version {card['version']}, but must be {FORMAT!r} version {VERSION}"
            )
        slots = tuple(Slot(slot["name"], tuple(slot["labels"])) for slot in card["task"]["slots"])
        task = Task(card["task"]["name"], slots, card["task"]["metric"])
        protocol, digests = str(card["protocol"]), dict(card["sha256"])
        notes = tuple(map(str, card.get("notes", ())))  # absent in files of earlier releases
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
                raise BuildError(
                    f"{manifest}, line {number} is not a clip ({error!r}): write the splits again"
                ) from error
    return Manifest(task, protocol, checked(splits, task), files, notes)


def _inspect(path: epath.Path) -> FileFacts:
    import soundfile

    if path.exists() and not is_file(path):
        raise BuildError(f"{path} is a folder, pipe or device: replace it by the recording")
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
