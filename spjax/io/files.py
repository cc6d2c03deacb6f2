"""Atomic writes of files and directories, and trees of float32 arrays in safetensors files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from spjax import paths
from spjax.io import atomic, kinds, places
from spjax.types import Json, Params

SEAL = "card_hash"
_log = logging.getLogger(__name__)
_noted: set[str] = set()  # cards of older versions already warned about

Shape = tuple[int, ...]
Writer = Callable[[Path], object]  # writes the file at the given path

_LONGEST_MESSAGE = 2000  # characters; a card may hold anything


class StorageError(ValueError):
    """A stored file cannot be used; the message names the file, the value and a fix."""

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 4 :]}"
        super().__init__(message)


def flatten(tree: Params, prefix: str = "") -> dict[str, np.ndarray]:
    """Flattens a nested dict to {"a/b/c": array}; arrays are fetched to the host."""
    leaves: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(dict(value), f"{prefix}{name}/")
        else:
            leaves[f"{prefix}{name}"] = np.asarray(value)
    return leaves


def unflatten(leaves: Mapping[str, np.ndarray]) -> Params:
    """Inverts `flatten`."""
    tree: Params = {}
    for path, value in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def tree_hash(tree: Params) -> str:
    """Returns the sha256 (hex) of the sorted paths, dtypes, shapes and little-endian bytes of a tree's arrays."""
    digest = hashlib.sha256()
    for path, array in sorted(flatten(tree).items()):
        digest.update(f"{path}\0{array.dtype.name}\0{list(array.shape)}\0".encode())
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def as_type(tree: Params, dtype: Any) -> Params:
    """Casts every array of a tree."""
    return unflatten({path: array.astype(dtype) for path, array in flatten(tree).items()})


def check_tensors(
    found: Mapping[str, tuple[str, Shape]],
    expected: Mapping[str, Shape],
    where: str | Path,
    fix: str,
    wanted: str = "float32",
) -> None:
    """Compares the names, dtypes and shapes of tensors.

    Args:
      found: (dtype, shape) by name.
      expected: shape by name.
      where: file or object, for the message.
      fix: suggested fix, for the message.
      wanted: dtype of every tensor.

    Raises:
      StorageError: the first difference, by name.
    """
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has unexpected {', '.join(extra)}"] if extra else []
        raise StorageError(f"{where} {' and '.join(parts)}. {fix}")
    for name, (dtype, shape) in found.items():
        if dtype != wanted:
            raise StorageError(f"{where}: {name} is {dtype}, must be {wanted}. {fix}")
        if shape != expected[name]:
            raise StorageError(f"{where}: {name} has shape {list(shape)}, must be {list(expected[name])}. {fix}")


def described(tree: Params) -> dict[str, tuple[str, Shape]]:
    """Returns (dtype, shape) of every leaf by path, for `check_tensors`."""
    return {path: (array.dtype.name, array.shape) for path, array in flatten(tree).items()}


def tensor_writer(tree: Params) -> Writer:
    """Returns a function that writes the tree to a safetensors file, bit for bit.

    Raises:
      StorageError: a NaN or infinite value, which `read_tensors` would refuse.
    """
    leaves = {path: np.ascontiguousarray(array) for path, array in flatten(tree).items()}
    _check_finite(leaves, "to save", "Train with a lower learning rate.")

    def write(path: Path) -> None:
        path.touch()
        mode = path.stat().st_mode  # respects the umask; safetensors makes the file readable by the owner only
        safetensors.numpy.save_file(leaves, path)
        path.chmod(mode)

    return write


def json_bytes(value: Mapping[str, object]) -> bytes:
    """Encodes a JSON object, indented and with a final newline.

    Raises:
      StorageError: a value that JSON cannot hold (NaN included).
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise StorageError(f"cannot be written as JSON: {error}. Use strings, finite numbers and lists.") from error
    return text.encode()


def json_writer(value: Mapping[str, object]) -> Writer:
    """Returns a function that writes `json_bytes(value)`; encoding errors are raised at once."""
    content = json_bytes(value)
    return lambda path: path.write_bytes(content)


@places.translate_bucket_errors()
def read_json(path: Path, kind: str | tuple[str, ...], version: int) -> Json:
    """Reads a JSON object with `"format"` one of `kind` and `"version"` at most `version`.

    Raises:
      StorageError: a missing file, invalid JSON, another format, or a newer version.
    """
    accepted = (kind,) if isinstance(kind, str) else kind
    if not path.is_file():
        raise StorageError(f"{kinds.mixed_up(path, accepted[0])}{atomic.where_aside(path.parent)}")
    try:
        value: Json = kinds.load_json(path)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is not valid JSON ({error}). Take it from its source again.") from error
    found = value.get("format") if isinstance(value, dict) else None
    if found not in accepted:
        raise StorageError(kinds.mixed_up(path, accepted[0]))
    if type(value.get("version")) is not int or value["version"] < 1:
        raise StorageError(f"{path} has the version {value.get('version')!r:.80}, must be a positive number.")
    if value["version"] > version:
        raise StorageError(
            f"{path} has the version {value['version']}, but this spjax reads up to {version}. Update spjax."
        )
    return value


def seal(described: Mapping[str, object], free: Iterable[str]) -> str:
    """Returns the sha256 (hex) of a card: its fields in canonical JSON, without `free` ones, version and seal.

    The tensors' hash is one of the fields, so the seal covers everything that affects predictions.
    """
    left_out = {*free, SEAL, "version"}
    kept = {name: value for name, value in described.items() if name not in left_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_seal(described: Json, free: Iterable[str], since: int, path: str | Path, *, quiet: bool = False) -> str:
    """Compares a card with the hash it contains; a card older than version `since` may lack it (one warning).

    Returns:
      The hash.

    Raises:
      StorageError: the hash is missing or does not match.
    """
    free = tuple(free)
    allowed = f"Only {', '.join(free)} may be edited; undo" if free else "Undo"
    right, found = seal(described, free), described.get(SEAL)
    if found is None and SEAL not in described and described["version"] < since:
        if not quiet and str(path) not in _noted:
            _noted.add(str(path))
            _log.warning(
                "%s was written before cards had a hash, so edits cannot be detected; add the hash with "
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


def check_keys(described: Json, required: Iterable[str], optional: Iterable[str], where: Path, fix: str) -> None:
    """Compares the keys of a card with the expected ones; "format" and "version" are always allowed.

    Raises:
      StorageError: the missing and the unknown keys, by name.
    """
    required = tuple(required)
    missing = [name for name in required if name not in described]
    unknown = sorted(described.keys() - {*required, *optional, "format", "version"})
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has unknown {', '.join(unknown)}"] if unknown else []
        raise StorageError(f"{where} {' and '.join(parts)}. {fix}")


@places.translate_bucket_errors()
def read_tensors(
    path: Path, expected: Callable[[dict[str, tuple[str, Shape]]], Mapping[str, Shape]], dtype: str = "float32"
) -> Params:
    """Reads a safetensors file that must hold exactly the expected tensors.

    Args:
      path: the file.
      expected: maps the (dtype, shape) found under each name to the shape required of each name.
      dtype: of every tensor in the file.

    Returns:
      Tree of numpy float32 arrays, whatever the dtype in the file.

    Raises:
      StorageError: a missing, truncated or damaged file, or other tensors than expected.
    """
    fix = "Take it from its source again."
    if not path.exists():
        raise StorageError(f"{path} does not exist. {fix}")
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
            check_tensors(found, expected(found), path, fix, dtype)
            tensors = {name: file.get_tensor(name).astype(np.float32, copy=False) for name in found}
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}. {fix}") from error
    except safetensors.SafetensorError as error:
        raise StorageError(f"{path} is truncated or damaged ({error}). {fix}") from error
    _check_finite(tensors, path, fix)
    return unflatten(tensors)


def _check_finite(tensors: Mapping[str, np.ndarray], where: str | Path, fix: str) -> None:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise StorageError(f"{where}: {name} holds NaN or infinity. {fix}")


def _name_target_in_errors(write: Callable[..., Any]) -> Any:
    """Wraps a function that writes its first argument, so that errors name that path and not a temporary file."""

    @functools.wraps(write)
    def named(place: epath.PathLike, *arguments: Any) -> Any:
        try:
            return write(place, *arguments)
        except (OSError, safetensors.SafetensorError) as error:  # safetensors raises its error on a full disk
            raise paths.unwritable(place, error) from error

    return named


@_name_target_in_errors
def write_file(path: epath.PathLike, content: bytes) -> None:
    """Writes a file atomically: readers see either the old or the new content.

    Args:
      path: local or gs://; its directory is created.
      content: bytes of the file.

    Raises:
      OSError: the file cannot be written; the message names `path`, not a temporary file.
    """
    final = places.at(path)
    if places.is_remote(path):
        final.write_bytes(content)
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    fresh = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
    try:
        fresh.write_bytes(content)
        atomic.fsync(fresh)
        fresh.replace(final)
    except BaseException:
        with contextlib.suppress(OSError):  # keep the error of the write
            fresh.unlink()
        raise


def check_replaceable(final: Path, names: Collection[str]) -> None:
    """Raises StorageError if a directory holds files other than `names`, which a replacement would delete."""
    if final.exists():
        foreign = sorted(p.name for p in final.iterdir() if p.name not in names) if final.is_dir() else [final.name]
        if foreign:
            raise StorageError(
                f"{final} holds {', '.join(foreign[:5])}, which saving there would delete. Choose another directory."
            )


@_name_target_in_errors
def write_directory(directory: str | Path, writers: Mapping[str, Writer], marker: str) -> Path:
    """Writes a directory of files as a whole (`atomic.replaced_directory`).

    Args:
      directory: final path, local or gs://; parents are created.
      writers: file name → function that writes that file, called in this order.
      marker: file without which readers treat the directory as incomplete (`atomic.replaced_directory`).

    Returns:
      Absolute path of the directory.

    Raises:
      StorageError: the directory exists and holds other files.
      OSError: it cannot be written; the message names `directory`, not a temporary one.
    """
    final = places.at(directory) if places.is_remote(directory) else Path(directory).resolve()
    check_replaceable(final, writers)
    with atomic.replaced_directory(directory, last=marker) as folder:
        for name, write in writers.items():
            write(folder / name)
    return final
