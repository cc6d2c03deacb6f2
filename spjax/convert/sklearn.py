"""Read km.bin, a joblib pickle of scikit-learn's k-means, without joblib, scikit-learn, or running code from the file.

Only the centroids are used, so that files of any scikit-learn version can be read.
"""

from __future__ import annotations

import bz2
import io
import lzma
import math
import mmap
import zlib
from pathlib import Path
from typing import IO, Any, cast

import ml_dtypes
import numpy as np

from spjax import paths
from spjax.convert import ConvertError
from spjax.convert.checkpoint import provenance
from spjax.convert.safe_pickle import Inert, PickledArray, PickledDtype, read_pickle, shown
from spjax.convert.torch_file import Tensor, read_torch_file
from spjax.io import KMeans, kinds, places

_MODELS = ("MiniBatchKMeans", "KMeans")
_WRAPPER = "joblib.numpy_pickle.NumpyArrayWrapper"  # in sklearn.externals up to scikit-learn 0.22
_OLD_WRAPPERS = ("NDArrayWrapper", "ZNDArrayWrapper")  # joblib before 0.10 stored arrays in separate files
_MAX_UNPACKED = 1 << 30  # bytes; 500 centroids of 768 dimensions take 1.5 MB
_LZMA_MEMORY = 1 << 28  # most bytes of LZMA's dictionary; level 9 uses 64 MiB
_STEP = 1 << 20

# Compressed files by their first bytes, as in joblib.
_ZLIB_WINDOW, _GZIP_WINDOW = 15, 31
_DECOMPRESSORS = {
    b"\x78": lambda: zlib.decompressobj(_ZLIB_WINDOW),
    paths.GZIP: lambda: zlib.decompressobj(_GZIP_WINDOW),
    paths.BZIP2: bz2.BZ2Decompressor,
    b"\x5d\x00": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY),
    paths.XZ: lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY),
}
_UNREADABLE = {b"\x04\x22\x4d\x18": "LZ4", b"ZF": "joblib before 0.10"}


def _unpacked(packed: bytes, decompressor: Any) -> bytes:
    """Decompress a file, up to `_MAX_UNPACKED` bytes."""
    parts, size, rest = [], 0, packed
    while not decompressor.eof:
        part = decompressor.decompress(rest, _STEP)
        # zlib returns unread input; bz2 and lzma keep it, and say whether they need more.
        rest = getattr(decompressor, "unconsumed_tail", b"")
        if not part and not rest and getattr(decompressor, "needs_input", True):
            raise ConvertError("its compressed stream is cut off")
        parts.append(part)
        size += len(part)
        if size > _MAX_UNPACKED:
            raise ConvertError(f"it decompresses to more than {_MAX_UNPACKED >> 20} MiB, too much for a k-means")
    return b"".join(parts)


def _read_wrapped(wrapper: dict[str, Any], stream: IO[bytes]) -> PickledArray:
    """Read an array, whose bytes joblib writes into the stream after its wrapper."""
    shape: Any = wrapper.get("shape")
    order, dtype = wrapper.get("order"), wrapper.get("dtype")
    if not isinstance(dtype, PickledDtype):
        raise ConvertError(f"an array in it is of type {shown(dtype)}, not of numbers")
    counts = (
        isinstance(shape, tuple)
        and len(shape) <= 32
        and all(type(size) is int and 0 <= size < 1 << 48 for size in shape)
    )
    if not counts or order not in ("C", "F"):
        raise ConvertError(f"an array in it has shape {shown(shape)} and order {shown(order)}")
    if wrapper.get("numpy_array_alignment_bytes") is not None:  # joblib >= 1.2 pads; the first byte is the length
        stream.read(stream.read(1)[0])
    size = math.prod(shape) * dtype.dtype.itemsize
    data = stream.read(size) if size < 1 << 48 else b""  # an in-memory stream allocates no more than it has
    if len(data) != size:
        raise ConvertError(f"it is cut off: an array of shape {shown(shape)} has {len(data)} of {size} bytes")
    return PickledArray(np.frombuffer(data, dtype.dtype).reshape(shape, order=cast(Any, order)))


def _read_joblib(stream: IO[bytes]) -> Any:
    def built(value: Inert) -> Any:
        module, _, name = value.name.rpartition(".")
        if value.name.endswith(_WRAPPER) and isinstance(value.state, dict):
            return _read_wrapped(value.state, stream)
        if "joblib" in module and name in _OLD_WRAPPERS:
            raise ConvertError("joblib before 0.10 wrote it, with its arrays in other files; save it with a newer one")
        return value

    return read_pickle(stream, built=built)


def _read(path: Path) -> Any:
    """Read a file: a pickled model, or an array of NumPy or torch."""
    with places.open_regular(path) as file:
        start = file.read(16)
        if not start:
            raise ConvertError("it is empty")
        for magic, kind in _UNREADABLE.items():
            if start.startswith(magic):
                raise ConvertError(f"it is compressed by {kind}; save it again with joblib.dump(model, 'km.bin')")
        if start.startswith(b"\x93NUMPY"):
            return np.load(path, mmap_mode="r", allow_pickle=False)  # a memory map is limited to the file's size
        if start.startswith(paths.ZIP) and path.suffix == ".npz":
            raise ConvertError("it is a .npz archive: save its array of centroids with numpy.save and give that")
        if start.startswith(paths.ZIP) or _LEGACY_TORCH in start:
            return _read_torch(path)
        if start[8:10] == b'{"':
            raise ConvertError("it is a safetensors file: save its centroids with numpy.save and give that")
        for magic, decompressor in _DECOMPRESSORS.items():
            if start.startswith(magic):
                file.seek(0)
                content = _unpacked(file.read(), decompressor())
                try:
                    return _read_joblib(io.BytesIO(content))
                except ConvertError as error:
                    if content.startswith(b"\x80"):
                        raise
                    message = f"{path} is compressed, and holds no pickle: unpack it, and give the file that is in it."
                    raise ConvertError(message) from error
        if packed := kinds.archive(path):
            raise ConvertError(f"{packed}, and give the file that is in it.")
        # Unlike a file, a memory map never allocates more than its size, whatever length a pickle claims.
        return _read_joblib(cast(IO[bytes], mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


_LEGACY_TORCH = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # torch.save before 1.6 pickles this number first


def _read_torch(path: Path) -> Any:
    """The only 2-D tensor in a file of torch.save, by itself or in a dict."""
    found = read_torch_file(path)
    parts = list(found.values()) if isinstance(found, dict) else [found]
    tables = [part for part in parts if isinstance(part, Tensor | PickledArray) and part.numpy().ndim == 2]
    if len(tables) != 1:
        held = f"a dict of {', '.join(map(shown, list(found)[:6]))}" if isinstance(found, dict) else shown(found)
        raise ConvertError(f"it is a file of torch.save that holds {held:.300}, not one array [clusters, dims]")
    return tables[0].numpy()


def _model(path: Path) -> tuple[np.ndarray | PickledArray | None, str]:
    """(Centroids of a file, the library that wrote it)."""
    suggestion = "Give a km.bin, as joblib.dump writes a MiniBatchKMeans, or its cluster_centers_ as numpy.save does."
    try:
        model = _read(path)
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error.strerror or error}") from error
    except ConvertError as error:
        if str(error).startswith(f"{path} "):  # a complete message, from an archive or torch file
            raise
        raise ConvertError(f"{path} cannot be read: {error}. {suggestion}") from error
    except (zlib.error, lzma.LZMAError, EOFError, ValueError, MemoryError) as error:
        raise ConvertError(f"{path} cannot be read: it is damaged ({error}). {suggestion}") from error
    if isinstance(model, np.ndarray):
        return model, "an array"
    known = isinstance(model, Inert) and model.name.startswith("sklearn.cluster.")
    if not known or model.name.rpartition(".")[2] not in _MODELS or not isinstance(model.state, dict):
        raise ConvertError(f"{path} holds {shown(model)}, not a k-means of scikit-learn. {suggestion}")
    version = model.state.get("_sklearn_version")
    made_by = f"scikit-learn {version:.20}" if isinstance(version, str) else "scikit-learn"
    return model.state.get("cluster_centers_"), made_by


def _centroids(path: Path, centers: Any) -> np.ndarray:
    if not isinstance(centers, PickledArray | np.ndarray):
        raise ConvertError(
            f"{path}: the k-means in it has no cluster_centers_: it was never fitted. Give a fitted one."
        )
    array = centers.numpy() if isinstance(centers, PickledArray) else centers
    floats = array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16
    if array.ndim != 2 or 0 in array.shape or not floats:
        raise ConvertError(f"{path}: its centroids are {array.dtype} {list(array.shape)}, must be floats [C, D].")
    with np.errstate(over="ignore"):  # overflow gives infinity, which is refused below
        array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise ConvertError(f"{path}: its centroids hold NaN or infinity. Fit the k-means again.")
    return array


def import_kmeans(source: str | Path, encoder: str, layer: int | None) -> KMeans:
    """Import scikit-learn's MiniBatchKMeans or KMeans from a joblib pickle, or plain centroids.

    Args:
      source: km.bin, plain or compressed with zlib, gzip, bz2, lzma or xz; or centroids [C, D] in .npy or .pt.
      encoder: name of the encoder of the features ("hubert_base_ls960"), which the file lacks.
      layer: its layer; None for encoders without layers.

    Returns:
      The k-means, centroids float32 [C, D].

    Raises:
      ConvertError: no such file, truncated, or not a fitted k-means.
    """
    path = Path(source)
    centers, made_by = _model(path)
    card = {"encoder": encoder, "layer": layer, "fitted_on": {}, "provenance": provenance(path, made_by)}
    return KMeans(_centroids(path, centers), card)
