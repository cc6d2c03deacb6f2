"""Files and directories that are written whole or not at all, and trees of float32 arrays in safetensors files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from spjax import paths
from spjax.storage import kinds, places
from spjax.types import Params

SEAL = "card_hash"
_log = logging.getLogger(__name__)
_noted: set[str] = set()  # cards of older versions that were reported

Shape = tuple[int, ...]
Writer = Callable[[Path], object]  # writes a file at the path it is given


_LONGEST_MESSAGE = 2000  # characters; a card may hold anything


class StorageError(ValueError):
    """A stored file cannot be used; the message names the file, the value and what to do."""

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 4 :]}"
        super().__init__(message)


def flatten(tree: Params, prefix: str = "") -> dict[str, np.ndarray]:
    """Leaves of a nested dict by path, path parts joined by "/"; arrays are fetched to the host."""
    leaves: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(dict(value), f"{prefix}{name}/")
        else:
            leaves[f"{prefix}{name}"] = np.asarray(value)
    return leaves


def unflatten(leaves: Mapping[str, np.ndarray]) -> Params:
    """Inverse of `flatten`."""
    tree: Params = {}
    for path, value in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def tree_hash(tree: Params) -> str:
    """sha256 (hex) over the sorted paths, dtypes, shapes and little-endian bytes of a tree's arrays."""
    digest = hashlib.sha256()
    for path, array in sorted(flatten(tree).items()):
        digest.update(f"{path}\0{array.dtype.name}\0{list(array.shape)}\0".encode())
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def as_type(tree: Params, dtype: Any) -> Params:
    """A tree whose arrays are of another type."""
    return unflatten({path: array.astype(dtype) for path, array in flatten(tree).items()})


def check_tensors(
    found: Mapping[str, tuple[str, Shape]],
    expected: Mapping[str, Shape],
    where: str | Path,
    way_out: str,
    wanted: str = "float32",
) -> None:
    """Compares tensors by name, type and shape.

    Raises:
      StorageError: the first difference, by name.
    """
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has {', '.join(extra)}, which do not belong"] if extra else []
        raise StorageError(f"{where} {' and '.join(parts)}. {way_out}")
    for name, (dtype, shape) in found.items():
        if dtype != wanted:
            raise StorageError(f"{where}: {name} is {dtype}, must be {wanted}. {way_out}")
        if shape != expected[name]:
            raise StorageError(f"{where}: {name} has shape {list(shape)}, must be {list(expected[name])}. {way_out}")


def described(tree: Params) -> dict[str, tuple[str, Shape]]:
    """(dtype, shape) of every leaf by path, as `check_tensors` takes them."""
    return {path: (array.dtype.name, array.shape) for path, array in flatten(tree).items()}


def tensor_writer(tree: Params) -> Writer:
    """A function that writes the tree to a safetensors file, bit for bit.

    Raises:
      StorageError: a number that is not finite, which could not be read back.
    """
    leaves = {path: np.ascontiguousarray(array) for path, array in flatten(tree).items()}
    _check_finite(leaves, "to save", "Train with a lower learning rate.")

    def write(path: Path) -> None:
        path.touch()
        mode = path.stat().st_mode  # as the umask has it; safetensors lets nobody but the owner read
        safetensors.numpy.save_file(leaves, path)
        path.chmod(mode)

    return write


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """A JSON object, readable and with a newline at its end.

    Raises:
      StorageError: a value that JSON cannot hold (NaN included).
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise StorageError(f"not to be written as JSON: {error}. Keep to strings, finite numbers and lists.") from error
    return text.encode()


def json_writer(value: Mapping[str, Any]) -> Writer:
    """A function that writes `json_bytes`; raises what they raise, at once."""
    content = json_bytes(value)
    return lambda path: path.write_bytes(content)


@places.plainly()
def read_json(path: Path, kind: str | tuple[str, ...], version: int) -> dict[str, Any]:
    """Reads a JSON object that carries `"format": kind`, or one of several kinds, and `"version"` up to `version`.

    Raises:
      StorageError: absent, no JSON, another format, or a newer version.
    """
    accepted = (kind,) if isinstance(kind, str) else kind
    if not path.is_file():
        aside = path.parent.parent / _aside_name(path.parent)
        saved = f" An interrupted save left the earlier one in {aside}: move it back." if aside.is_dir() else ""
        raise StorageError(f"{kinds.mixed_up(path, accepted[0])}{saved}")
    try:
        value = kinds.load_json(path)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is no readable JSON ({error}). Take it from its source again.") from error
    found = value.get("format") if isinstance(value, dict) else None
    if found not in accepted:
        raise StorageError(kinds.mixed_up(path, accepted[0]))
    if type(value.get("version")) is not int or value["version"] < 1:
        raise StorageError(f"{path} has the version {value.get('version')!r:.80}, must be a positive number.")
    if value["version"] > version:
        raise StorageError(
            f"{path} has the version {value['version']}, known up to {version}: a newer spjax wrote it. Update spjax."
        )
    return value


def seal(described: Mapping[str, Any], free: Iterable[str]) -> str:
    """sha256 (hex) of what a card says: its fields in canonical JSON, without `free` ones, version and seal.

    Together with the hash of the tensors, which is such a field, it covers everything that decides an answer.
    """
    left_out = {*free, SEAL, "version"}
    kept = {name: value for name, value in described.items() if name not in left_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_seal(
    described: Mapping[str, Any], free: Iterable[str], since: int, path: str | Path, *, quiet: bool = False
) -> str:
    """Compares a card with the hash that it carries; one of a version before `since` may lack it, which is logged once.

    Returns:
      The hash.

    Raises:
      StorageError: it lacks the hash, or was edited.
    """
    free = tuple(free)
    allowed = f"Only {', '.join(free)} may be edited; undo" if free else "Undo"
    right, found = seal(described, free), described.get(SEAL)
    if found is None and SEAL not in described and described["version"] < since:
        if not quiet and str(path) not in _noted:
            _noted.add(str(path))
            _log.warning(
                "%s was written before cards carried a hash, so an edit of it would not be noticed; add the hash with "
                "`python -m spjax.packs refresh %s`.",
                path,
                Path(path).parent,
            )
        return right
    if found != right:
        raise StorageError(
            f"{path} was altered: its fields have the hash {right}, but its {SEAL} is {found!r:.80}. "
            f"{allowed} the edit, or take it from its source again."
        )
    return right


def check_keys(
    described: Mapping[str, Any], required: Iterable[str], optional: Iterable[str], where: Path, way_out: str
) -> None:
    """Compares the keys of what `read_json` read; "format" and "version" are known.

    Raises:
      StorageError: what is missing and what is unknown, by name.
    """
    required = tuple(required)
    missing = [name for name in required if name not in described]
    unknown = sorted(described.keys() - {*required, *optional, "format", "version"})
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has unknown {', '.join(unknown)}"] if unknown else []
        raise StorageError(f"{where} {' and '.join(parts)}. {way_out}")


@places.plainly()
def read_tensors(
    path: Path, expected: Callable[[dict[str, tuple[str, Shape]]], Mapping[str, Shape]], dtype: str = "float32"
) -> Params:
    """Reads a safetensors file whose tensors are exactly the expected ones.

    Args:
      path: the file.
      expected: from the (dtype, shape) found under each name to the shape that each name must have.
      dtype: of all of them in the file.

    Returns:
      Tree of numpy arrays, float32 whatever they are in the file.

    Raises:
      StorageError: absent, truncated, damaged, or other tensors than expected.
    """
    way_out = "Take it from its source again."
    if not path.exists():
        raise StorageError(f"{path} does not exist. {way_out}")
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    try:
        with places.open_regular(path):
            pass
        with places.local(path) as here, safetensors.safe_open(here, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            found = {
                name: (names.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
                for name, part in slices.items()
            }
            check_tensors(found, expected(found), path, way_out, dtype)
            tensors = {name: file.get_tensor(name).astype(np.float32, copy=False) for name in found}
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}. {way_out}") from error
    except safetensors.SafetensorError as error:
        raise StorageError(f"{path} is truncated or damaged ({error}). {way_out}") from error
    _check_finite(tensors, path, way_out)
    return unflatten(tensors)


def _check_finite(tensors: Mapping[str, np.ndarray], where: str | Path, way_out: str) -> None:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise StorageError(f"{where}: {name} holds NaN or infinity. {way_out}")


def _aside_name(directory: Path) -> str:
    return f".{directory.name}.replaced"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _naming_the_place(write: Callable[..., Any]) -> Any:
    """A function that writes its first argument: an error of a temporary file beside that is raised of the place."""

    @functools.wraps(write)
    def named(place: epath.PathLike, *arguments: Any) -> Any:
        try:
            return write(place, *arguments)
        except (OSError, safetensors.SafetensorError) as error:  # the latter where the disk is full, say
            raise paths.unwritable(place, error) from error

    return named


@_naming_the_place
def write_file(path: epath.PathLike, content: bytes) -> None:
    """Write a file whole or not at all: whoever reads it sees the old one or the new one.

    Args:
      path: here or in a bucket; its directory is made.
      content: of the file.

    Raises:
      OSError: it cannot be written; the message names `path`, not a temporary file.
    """
    final = places.at(path)
    if places.is_remote(path):
        final.write_bytes(content)
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    fresh = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
    try:
        fresh.write_bytes(content)
        _fsync(fresh)
        fresh.replace(final)
    except BaseException:
        with contextlib.suppress(OSError):  # that of the write is the one to raise
            fresh.unlink()
        raise


def check_replaceable(final: Path, names: Collection[str]) -> None:
    """Raises StorageError if a directory holds files of other names, which replacing it would delete."""
    if final.exists():
        foreign = sorted(p.name for p in final.iterdir() if p.name not in names) if final.is_dir() else [final.name]
        if foreign:
            raise StorageError(
                f"{final} holds {', '.join(foreign[:5])}, which saving there would delete. Choose another directory."
            )


@_naming_the_place
def write_directory(directory: str | Path, writers: Mapping[str, Writer]) -> Path:
    """Writes a directory of files so that its name never shows a half-written one.

    The files go to a hidden sibling first and reach the disk before that is renamed. An earlier directory of the same
    files is set aside, replaced and removed; a process killed between those renames leaves it as `.NAME.replaced`.

    Args:
      directory: final name; parents are made.
      writers: file name → function that writes that file at the path it is given. The first is the one by which readers
        know the directory.

    Returns:
      The directory, absolute.

    Raises:
      StorageError: the directory is there and holds other files, which replacing it would delete.
      OSError: it cannot be written; the message names `directory`, not a temporary one.
    """
    final = places.at(directory) if places.is_remote(directory) else Path(directory).resolve()
    check_replaceable(final, writers)
    if places.is_remote(directory):
        _write_remote(final, writers)
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    fresh, aside = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp"), final.with_name(_aside_name(final))
    try:
        fresh.mkdir()
        for name, write in writers.items():
            write(fresh / name)
            _fsync(fresh / name)
        _fsync(fresh)
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
        try:
            fresh.rename(final)
        except OSError:
            if aside.exists():
                aside.rename(final)
            raise
        _fsync(final.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return final


def _write_remote(final: Path, writers: Mapping[str, Writer]) -> None:
    """Nothing is renamed in one step there: the first file is missing for as long as the others are not all new."""
    known_by, *_ = writers
    with tempfile.TemporaryDirectory(prefix="spjax-") as folder:
        for name, write in writers.items():
            write(Path(folder) / name)
        (final / known_by).unlink(missing_ok=True)
        for name in reversed(list(writers)):
            places.copy(Path(folder) / name, final / name)
