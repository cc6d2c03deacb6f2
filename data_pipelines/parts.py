"""One part of an extraction job, made by a worker: audio files → one file of units.

A job (data and settings) is a JSON file in its own folder, split into parts of `CLIPS_PER_PART` clips. Any worker of
any runner can make any part, in batches that depend on the part only, and writes it atomically next to the job, as
`part-NUMBER.npz`; so an existing part is complete and does not depend on its worker. A file that cannot be used is not
an error here: the part records the reason, and the launcher decides. A part also records size and time of its files,
so that a later launch can detect changes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import tempfile
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from data_pipelines.clips import Clip
from spjax.encoders.audio import SAMPLE_RATE, AudioError, read_audio
from spjax.encoders.encoder import Segments, encode_waves
from spjax.io import KMeans, load_kmeans
from spjax.io.files import write_file

CLIPS_PER_PART = 64
LAYOUT = 4  # version of the part files; parts of other versions are not reused
STATS_AT_ONCE = 16  # parallel requests, which are slow in a bucket
SECONDS_HELD = 600  # seconds of speech in memory at a time, to bound the memory of parts with long recordings

# One worker a core uses a machine fully, and results do not depend on the number of workers: a convolution on two
# threads sums in another order than on one. NPROC and PJRT_NPROC are JAX's.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "NPROC", "PJRT_NPROC")
ONE_THREAD = dict.fromkeys(THREADS, "1")

_loading = threading.Lock()  # a worker may run bundles in several threads, which share one encoder


@dataclasses.dataclass(frozen=True)
class Job:
    """An extraction job.

    Attributes:
      raw: root of the data set, local or gs://.
      encoder: name, or directory (local or gs://) of a HuBERT, wav2vec2, WavLM or Whisper.
      kmeans: directory of the centroids.
      identity: hashes of encoder and k-means; jobs at different paths are equal if these are.
      clips: path under `raw`, start and duration (seconds, None: to the end) of every clip.
      layer: of an encoder with weights.
      plain_chunks: cut long audio as the reference does.
      lowpass: cut-off frequency in Hz; None for no filter.
      merge: merge runs of equal units.
      f0: measure f0.
      stop: file that is created when a recording is refused, and that stops the making of parts; "" for none.
    """

    raw: str
    encoder: str
    kmeans: str
    identity: dict[str, Any]
    clips: tuple[tuple[str, float, float | None], ...]
    layer: int
    plain_chunks: bool = False
    lowpass: float | None = None
    merge: bool = True
    f0: bool = False
    stop: str = ""

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-len(self.clips) // CLIPS_PER_PART)

    @property
    def hash(self) -> str:
        """sha256 (hex) of everything that the parts depend on, except the audio (see `unchanged`)."""
        fields = {
            name: getattr(self, name)
            for name in ("identity", "clips", "layer", "plain_chunks", "lowpass", "merge", "f0")
        }
        fields["sizes"] = [CLIPS_PER_PART, SECONDS_HELD, LAYOUT]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class Part(NamedTuple):
    """The clips of a part as units: n clips, with U segments in all.

    Attributes:
      counts: int32 [n], segments of each clip; 0 if it was refused.
      units: int32 [U]
      durations: int32 [U], frames.
      f0: float32 [U], mean log f0 of each segment's voiced frames; 0 if it has none, or f0 is not measured.
      voiced: int32 [U], number of voiced frames of each segment.
      rates: int32 [n], sample rate of each file in Hz; 0 if it was refused.
      seconds: float64 [n], duration of each clip.
      refused: str [n], why the clip cannot be used; "" if it can.
      repaired: str [n], repairs by `read_audio`; "" for none.
      files: int64 [n, 2], `file_stats` of each clip's file, taken before it was read.
    """

    counts: np.ndarray
    units: np.ndarray
    durations: np.ndarray
    f0: np.ndarray
    voiced: np.ndarray
    rates: np.ndarray
    seconds: np.ndarray
    refused: np.ndarray
    repaired: np.ndarray
    files: np.ndarray


def save_job(folder: epath.Path, job: Job) -> str:
    """Writes a job into its folder under a unique name and returns the file's path."""
    path = folder / f"job-{uuid.uuid4().hex}.json"
    write_file(path, json.dumps(dataclasses.asdict(job)).encode())
    return os.fspath(path)


@functools.lru_cache(maxsize=8)
def load_job(path: str) -> Job:
    """Reads a job that `save_job` wrote; cached."""
    fields = json.loads(epath.Path(path).read_text())
    return Job(**{**fields, "clips": tuple((clip, start, duration) for clip, start, duration in fields["clips"])})


def part_path(folder: epath.PathLike, number: int) -> epath.Path:
    """Returns the file of a part."""
    return epath.Path(folder) / f"part-{number:06d}.npz"


def parts_there(folder: epath.Path) -> set[int]:
    """Returns the numbers of the finished parts."""
    names = (path.name for path in folder.iterdir())
    return {int(name[5:-4]) for name in names if name.startswith("part-") and name.endswith(".npz")}


def read_part(path: epath.Path) -> Part:
    """Reads a part.

    Raises:
      ValueError, KeyError: the file was not written by `make_part`.
    """
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
        return Part(**{name: arrays[name] for name in Part._fields})


def file_stats(raw: epath.PathLike, paths: Sequence[str]) -> np.ndarray:
    """Returns size and modification time of files, to detect changes: int64 [n, 2].

    Times are in ns since the epoch, on gs:// in s; both numbers are -1 for a file that cannot be accessed.
    """

    def stat(path: str) -> tuple[int, int]:
        place = epath.Path(raw) / path
        try:
            if "://" in os.fspath(place):
                found = place.stat()
                return found.length, int(found.mtime or 0)
            here = os.stat(place)  # epath's stat has whole seconds only
            return here.st_size, here.st_mtime_ns
        except (OSError, ValueError):
            return -1, -1

    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(STATS_AT_ONCE) as pool:
        known = dict(zip(distinct, pool.map(stat, distinct), strict=True))
    return np.asarray([known[path] for path in paths], np.int64).reshape(-1, 2)


def unchanged(job: Job, made: Sequence[tuple[int, Part]]) -> list[bool]:
    """Returns whether each part, given with its number, was made from the current files."""
    of = [[clip[0] for clip in _clips_of(job, number)] for number, _ in made]
    now = file_stats(job.raw, [path for paths in of for path in paths])
    ends = np.cumsum([len(paths) for paths in of], dtype=int)
    return [
        np.array_equal(part.files, now[end - len(paths) : end])
        for (_, part), paths, end in zip(made, of, ends, strict=True)
    ]


def _clips_of(job: Job, number: int) -> tuple[tuple[str, float, float | None], ...]:
    return job.clips[number * CLIPS_PER_PART : (number + 1) * CLIPS_PER_PART]


def make_part(element: tuple[str, int]) -> None:
    """Makes a part of a job, unless it exists or the job was stopped; the work of a worker.

    Args:
      element: the job's file, from `save_job`, next to which the part is written; and the part's number.

    Raises:
      ValueError: the encoder cannot be loaded, or does not match its k-means.
    """
    from threadpoolctl import threadpool_limits

    job_file, number = element
    path = part_path(epath.Path(job_file).parent, number)
    with _loading:
        job = load_job(job_file)
    if path.exists() or (job.stop and epath.Path(job.stop).exists()):
        return
    with _loading:
        if not load_encoder.cache_info().currsize:  # the first part of this worker
            os.environ.update(ONE_THREAD)  # JAX reads this at its first use
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers may share a GPU
        encoder = load_encoder(job.encoder, job.kmeans, job.layer, job.plain_chunks, job.lowpass)
    with threadpool_limits(1):  # for numpy, which is imported already
        part = encode_part(job, encoder, number)
    content = io.BytesIO()
    np.savez(content, **part._asdict())
    write_file(path, content.getvalue())
    if job.stop and any(part.refused):
        write_file(epath.Path(job.stop), b"")


@functools.lru_cache(maxsize=1)
def load_encoder(
    encoder: str, kmeans: str | None, layer: int, plain_chunks: bool = False, lowpass: float | None = None
) -> Any:
    """Loads an `Encoder` (spjax.encoders.encoder), once a process. Directories may be on gs://.

    Raises:
      ValueError: no such encoder, or a k-means that does not match its features.
    """
    from spjax.encoders import encoder as encoders

    with tempfile.TemporaryDirectory() as folder:
        local = None if kmeans is None else _local(kmeans, Path(folder) / "kmeans")
        name = _local(encoder, Path(folder) / "encoder")
        return encoders.load_encoder(name, local, layer=layer, plain_chunks=plain_chunks, lowpass=lowpass)


def load_centroids(directory: str) -> KMeans:
    """Loads a k-means from a directory, local or gs://.

    Raises:
      StorageError: the directory holds no valid k-means.
    """
    with tempfile.TemporaryDirectory() as folder:
        return load_kmeans(_local(directory, Path(folder) / "kmeans"))


def _local(directory: str, copy: Path) -> str:
    """Returns a local directory unchanged, and a local copy of a remote one."""
    if "://" not in directory:
        return directory
    copy.mkdir()
    for path in epath.Path(directory).iterdir():
        path.copy(copy / path.name)
    return str(copy)


def encode_part(job: Job, encoder: Any, number: int) -> Part:
    """Encodes part `number`."""
    clips = _clips_of(job, number)
    files = file_stats(job.raw, [path for path, _, _ in clips])
    rates, seconds, refused = np.zeros(len(clips), np.int32), np.zeros(len(clips)), [""] * len(clips)
    repaired = [""] * len(clips)
    none = np.zeros(0, np.int32)
    streams = [Segments(none, none, none.astype(np.float32), none)] * len(clips)
    held: dict[int, np.ndarray] = {}

    def encode() -> None:
        if held:  # the encoder makes batches by length
            found = encode_waves(list(held.values()), encoder, merge=job.merge, f0=job.f0)
            for row, one in zip(held, found, strict=True):
                streams[row] = one
        held.clear()

    for row, (path, start, duration) in enumerate(clips):
        try:
            audio = read_audio(epath.Path(job.raw) / path, start, duration, encoder.least)
        except AudioError as error:
            refused[row] = str(error)
            continue
        repaired[row] = "; ".join(audio.repairs)
        held[row], rates[row], seconds[row] = audio.wave, audio.source_rate, len(audio.wave) / SAMPLE_RATE
        if sum(map(len, held.values())) > SECONDS_HELD * SAMPLE_RATE:
            encode()
    encode()
    units, durations, f0, voiced = (np.concatenate(stream) for stream in zip(*streams, strict=True))
    counts = np.asarray([len(stream[0]) for stream in streams], np.int32)
    messages = np.asarray(refused), np.asarray(repaired)
    return Part(counts, units, durations, f0, voiced, rates, seconds, *messages, files)


def clips_hash(clips: Sequence[Clip]) -> str:
    """Returns the sha256 (hex) of all fields of a list of clips, in order."""
    lines = (json.dumps(clip, ensure_ascii=False) for clip in clips)
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
