"""Read files of torch.save (.pt, .th) without torch, and without running code from the file.

Both formats are supported: the zip archive of torch >= 1.6, and the older stream of pickles followed by raw storages.
Tensors are read on demand, so that a checkpoint's optimizer state costs nothing.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from spjax import paths
from spjax.convert import ConvertError
from spjax.convert.safe_pickle import Global, Maker, read_pickle, shown
from spjax.io import kinds, places

_STORAGES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_DIMS = 32
_MAX_SIZE = 1 << 48


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of numbers in the file, which tensors are views of.

    Attributes:
      dtype: of the numbers.
      size: how many numbers.
      read: returns the bytes; raises ConvertError if the file holds more or fewer than `size` says.
    """

    dtype: np.dtype
    size: int
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file. Strides and offset count elements; both are checked against the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """Type of the elements; bfloat16 is ml_dtypes'."""
        return self.storage.dtype

    def numpy(self) -> np.ndarray:
        """Read the tensor: a contiguous array of `shape`.

        Raises:
          ConvertError: the storage in the file is incomplete.
        """
        flat = np.frombuffer(self.storage.read(), self.dtype)
        steps = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, steps, writeable=False).copy()


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_SIZE


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """Replaces torch._utils._rebuild_tensor_v2; refuses views that leave their storage or overlap themselves."""
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ConvertError("a tensor in it has an unknown form")
    counts = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > _MAX_DIMS or not all(map(_is_count, counts)):
        raise ConvertError(f"a tensor in it has shape {shown(shape)}, strides {shown(strides)}, offset {shown(offset)}")
    end = offset
    reach = 0  # elements between the first and last of a view of the dims so far; the next stride must exceed it
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= reach:
            raise ConvertError(f"a tensor in it overlaps itself: shape {shape}, strides {strides}")
        reach += stride * (size - 1)
    if 0 in shape:
        return Tensor(dataclasses.replace(storage, size=0, read=bytes), 0, shape, (0,) * len(shape))
    end += reach + 1
    if end > storage.size:
        raise ConvertError(
            f"a tensor in it of shape {shape}, strides {strides}, offset {offset} "
            f"exceeds its storage of {storage.size} numbers"
        )
    return Tensor(storage, offset, shape, strides)


_MAKERS: dict[str, Maker] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.Size": lambda sizes=(), *_: tuple(sizes),
}


def _storage_type(kind: Any, size: Any) -> np.dtype:
    name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else None
    if name not in _STORAGES or kind.name not in (f"torch.{name}", f"torch.cuda.{name}"):
        raise ConvertError(f"a storage in it is of type {shown(kind)}")
    if not _is_count(size):
        raise ConvertError(f"a storage in it has size {shown(size)}")
    return np.dtype(_STORAGES[name])


def _read_zip(path: Path) -> Any:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ConvertError("it is a zip file that is damaged or cut off") from error
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise ConvertError("its archive names a file twice")
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if not pickles:
        raise ConvertError(f"{kinds.archive(path)}, and give the file that is in it.")
    if len(pickles) > 1:
        raise ConvertError("its archive holds several data.pkl; torch.save writes one")
    # torch never compresses. Refusing compression and entries larger than the file rules out zip bombs.
    packed = [name for name, entry in entries.items() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ConvertError(f"{packed[0]!r} in its archive is compressed, which torch never does")
    if sum(entry.file_size for entry in entries.values()) > path.stat().st_size:
        raise ConvertError("its archive claims more bytes than the file has")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
        raise ConvertError("it was written on a big-endian machine; save it again on a little-endian one")

    def persistent(value: Any) -> Storage:
        if not isinstance(value, tuple) or len(value) != 5 or value[0] != "storage":
            raise ConvertError(f"its pickle refers to something that is not a storage ({type(value).__name__})")
        _, kind, key, _, size = value
        dtype = _storage_type(kind, size)
        entry = entries.get(f"{root}data/{key}") if isinstance(key, str) else None
        if entry is None or entry.file_size != size * dtype.itemsize:
            held = "is missing" if entry is None else f"holds {entry.file_size} bytes"
            raise ConvertError(f"storage {shown(key)} should hold {size * dtype.itemsize} bytes, but {held}")

        def read() -> bytes:
            try:
                return archive.read(entry)
            except Exception as error:  # zipfile has many exceptions for damaged entries
                raise ConvertError(f"{path}: storage {key} is damaged ({error}). Copy or download it again.") from error

        return Storage(dtype, size, read)

    return read_pickle(archive.read(pickles[0]), _MAKERS, persistent)


def _read_legacy(path: Path) -> Any:
    with path.open("rb") as file:
        contents = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if read_pickle(contents) != _LEGACY_MAGIC:
        raise ConvertError("it is a pickle, but not from torch.save")
    protocol = read_pickle(contents)
    if protocol != _LEGACY_PROTOCOL:
        raise ConvertError(f"it has protocol {shown(protocol)}, supported is {_LEGACY_PROTOCOL}")
    system = read_pickle(contents)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ConvertError("it was written on a big-endian machine; save it again on a little-endian one")
    sizes: dict[str, int] = {}  # bytes of every storage
    starts: dict[str, int] = {}  # positions of the storages, known after the main pickle

    def persistent(value: Any) -> Any:
        if isinstance(value, tuple) and len(value) == 4 and value[0] == "module":
            return value[1]
        if not isinstance(value, tuple) or len(value) not in (5, 6) or value[0] != "storage":
            raise ConvertError(f"its pickle refers to something that is not a storage ({type(value).__name__})")
        _, kind, key, _, size, *view = value
        dtype = _storage_type(kind, size)
        if not isinstance(key, str) or sizes.setdefault(key, size * dtype.itemsize) != size * dtype.itemsize:
            raise ConvertError(f"storage {shown(key)} has two sizes")
        offset, count = 0, size
        if view and view[0] is not None:
            _, offset, count = view[0]
            if not _is_count(offset) or not _is_count(count) or offset + count > size:
                raise ConvertError(f"a view of storage {key!r} exceeds it")

        def read() -> bytes:
            start = starts[key] + offset * dtype.itemsize
            return contents[start : start + count * dtype.itemsize]

        return Storage(dtype, count, read)

    tree = read_pickle(contents, _MAKERS, persistent)
    keys = read_pickle(contents)
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys) or sorted(keys) != sorted(sizes):
        raise ConvertError("its list of storages does not match its tensors")
    position = contents.tell()
    for key in keys:
        header = contents[position : position + 8]
        starts[key] = position + 8
        position = starts[key] + sizes[key]
        if len(header) < 8 or position > len(contents):
            raise ConvertError(f"storage {key!r} is cut off at {len(contents)} bytes")
        count = struct.unpack("<q", header)[0]
        if count < 0 or (count and sizes[key] % count) or (count == 0) != (sizes[key] == 0):
            raise ConvertError(f"storage {key!r} claims {count} numbers in {sizes[key]} bytes")
    return tree


def read_torch_file(path: str | Path) -> Any:
    """Read a file of torch.save.

    Nothing that the file names is imported or called. `OrderedDict` becomes a dict, tensors become `Tensor`, numpy
    arrays `PickledArray` (both have `.numpy()`), other classes and functions `Inert` records.

    Args:
      path: zip or legacy file; it must stay in place until the last tensor is read.

    Returns:
      The saved object, usually a dict.

    Raises:
      ConvertError: no such file, not torch's, truncated, or a tensor that exceeds its storage.
    """
    path = Path(path)
    fix = "Copy or download it again, and make sure that it is a file of torch.save."
    try:
        with places.open_regular(path) as file:
            start = file.read(256) or b""  # read may return None, for files such as those of /proc
        if b"sklearn." in start:
            raise ConvertError("it is a pickle of scikit-learn, which `spjax.convert kmeans` imports")
        if not start:
            raise ConvertError("it is empty")
        if start.startswith(paths.ZIP):
            return _read_zip(path)
        if start[:1] == b"\x80":
            return _read_legacy(path)
        packed = kinds.archive(path)
        if packed:
            raise ConvertError(f"{packed}, and give the file that is in it.")
        if start[8:10] == b'{"':
            raise ConvertError("it is a safetensors file; rename it so that it ends in .safetensors")
        raise ConvertError(f"it starts with {start[:4]!r}: neither torch's zip nor its legacy format")
    except ConvertError as error:
        if str(error).startswith(f"{path} "):  # a complete message, from an archive
            raise
        raise ConvertError(f"{path} cannot be read: {error}. {fix}") from error
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zipfile and struct on hostile bytes
        raise ConvertError(f"{path} cannot be read: {type(error).__name__}: {error}. {fix}") from error
