"""Read Hugging Face encoders: config.json beside model.safetensors (also in shards) or pytorch_model.bin."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from spjax.convert import ConvertError, why
from spjax.convert.checkpoint import read_tensor
from spjax.convert.safe_pickle import shown
from spjax.convert.torch_file import Tensor, read_torch_file
from spjax.io import kinds, places
from spjax.io.encoders import EncoderConfig
from spjax.types import Params

INDEX = "model.safetensors.index.json"
_FILES = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclasses.dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
      config: the architecture.
      params: float32 tree (docs/design.md), weight norm folded in.
      source: the file with the tensors.
      title: name of the library that wrote it.
      read: number of parameters read; weight norm has two for each direction of ours.
      unused: names of the tensors that features do not depend on, which were left out.
      kind: such as "HuBERT".
      name: name of the model; None if only a cache's hash is known.
      provenance: of the file, with the options that were given or assumed.
      left_out: number of parameters of the unused tensors.
    """

    config: EncoderConfig
    params: Params
    source: Path
    title: str
    read: int
    unused: tuple[str, ...]
    kind: str
    name: str | None
    provenance: dict[str, Any]
    left_out: int = 0


class Array:
    """An array with the interface of `Tensor`; the array is None if only the shape was read."""

    def __init__(self, array: np.ndarray | None, shape: tuple[int, ...]) -> None:
        self.array, self.shape = array, shape

    @property
    def dtype(self) -> Any:
        """Type of the elements."""
        return self.numpy().dtype

    def numpy(self) -> np.ndarray:
        """The array."""
        assert self.array is not None, "a tensor that was skipped"
        return self.array


Tensors = Mapping[str, Tensor | Array]
_LAYER = ("query", "key", "value", "out", "ffn_in", "ffn_out", "attn_norm", "ffn_norm")


class Reader:
    """Reads tensors by name and records which were used. `model` describes the file in messages."""

    def __init__(self, path: Path, tensors: Tensors, model: str) -> None:
        self.path, self.tensors, self.model = path, tensors, model
        self.used: set[str] = set()

    def __call__(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Read a tensor as float32.

        Raises:
          ConvertError: see `read_tensor`.
        """
        self.used.add(name)
        return read_tensor(self.path, name, self.tensors, shape, self.model)

    def dense(self, name: str, rows: int, columns: int, bias: bool = True) -> Params:
        """A dense layer: kernel [rows, columns], which torch stores transposed, and bias."""
        kernel = {"kernel": np.ascontiguousarray(self(f"{name}.weight", (columns, rows)).T)}
        return kernel | ({"bias": self(f"{name}.bias", (columns,))} if bias else {})

    def conv(self, name: str, width: int, inputs: int, outputs: int, bias: bool = True) -> Params:
        """A convolution over time: kernel [width, inputs, outputs] and bias."""
        kernel = self(f"{name}.weight", (outputs, inputs, width)).transpose(2, 1, 0)
        return {"kernel": np.ascontiguousarray(kernel)} | ({"bias": self(f"{name}.bias", (outputs,))} if bias else {})

    def norm(self, name: str, width: int) -> Params:
        """A norm: scale and bias [width]."""
        return {"scale": self(f"{name}.weight", (width,)), "bias": self(f"{name}.bias", (width,))}

    def layer(self, names: Mapping[str, str], number: int, dim: int, ffn_dim: int, key_bias: bool = True) -> Params:
        """A layer of a transformer encoder. `names`: our name → theirs, with `{}` for the number."""
        theirs = {name: names[name].format(number) for name in _LAYER}
        tree = {name: self.dense(theirs[name], dim, dim, key_bias or name != "key") for name in _LAYER[:4]}
        tree |= {"ffn_in": self.dense(theirs["ffn_in"], dim, ffn_dim)}
        tree |= {"ffn_out": self.dense(theirs["ffn_out"], ffn_dim, dim)}
        return tree | {name: self.norm(theirs[name], dim) for name in ("attn_norm", "ffn_norm")}

    def leftover(self, unused: str, only: str) -> tuple[tuple[str, ...], int]:
        """Names of the tensors that were not read, and their number of parameters.

        Args:
          unused: pattern of the names that may be left.
          only: the models that are supported, for the message.

        Raises:
          ConvertError: other tensors are left.
        """
        left = tuple(sorted(self.tensors.keys() - self.used))
        unknown = [name for name in left if not re.fullmatch(unused, name)]
        if unknown:
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            raise ConvertError(
                f"{self.path} has unknown tensors: {', '.join(unknown[:8])}{more}. Only {only} are imported."
            )
        return left, self.count(left)

    def count(self, names: Any) -> int:
        """Number of parameters of tensors."""
        return sum(math.prod(self.tensors[name].shape) for name in names)


_HASH = r"[0-9a-f]{40,64}"  # of revisions, blobs and URLs in caches


def model_name(path: Path, origin: Any) -> str | None:
    """Name of a model: its repository, the name in its config, or its file or directory."""
    path = Path(os.path.abspath(path))  # not resolved: caches hold links to files that are named by their hash
    for part in path.parts:
        if part.startswith("models--"):  # the hub's cache: models--ORGANISATION--NAME/snapshots/HASH/FILE
            return part.rpartition("--")[2].replace("-", "_")
    if path.name in _FILES:  # a file name that all models share
        path = path.parent
    name = re.sub(rf"^{_HASH}\.(?=.)", "", path.name if path.is_dir() else path.stem)  # s3prl's cache: HASH.NAME.pt
    if re.fullmatch(_HASH, name):
        name = origin.rstrip("/").rpartition("/")[2] if isinstance(origin, str) else ""
    return None if not name or re.fullmatch(_HASH, name) else name.replace("-", "_")


def weights_of(directory: Path) -> Path:
    """The file in a directory that holds the weights or their index.

    Raises:
      ConvertError: there is none.
    """
    for name in _FILES:
        if (directory / name).is_file():
            return directory / name
    held = ", ".join(sorted(entry.name for entry in directory.iterdir())[:8]) or "nothing"
    raise ConvertError(
        f"{directory} holds neither {', '.join(_FILES[:-1])} nor {_FILES[-1]} (it has {held}). Give the directory of a "
        "Hugging Face model."
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json or another JSON object beside the weights.

    Raises:
      ConvertError: it is absent or unreadable.
    """
    try:
        options = kinds.load_json(path)
    except (OSError, ValueError) as error:
        raise ConvertError(f"{path} cannot be read ({why(error)}). It must be beside the model's weights.") from error
    if not isinstance(options, dict):
        raise ConvertError(f"{path} is not a JSON object. Take it from the model's source again.")
    if kinds.ours(path.parent):
        raise ConvertError(f"{path.parent} is {kinds.describe(path.parent)[0]}. It needs no import.")
    return options


def read_front_end(path: Path, needed: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a model's preprocessor_config.json; {} if it is absent.

    Args:
      path: the file.
      needed: options that the features depend on, with the only value that spjax computes.

    Raises:
      ConvertError: it is unreadable, or has another value.
    """
    stated = read_config(path) if path.exists() else {}
    for name, value in needed.items():
        if stated.get(name, value) not in (value, None):
            raise ConvertError(
                f"{path} has {name}={shown(stated[name])}; spjax computes its input with {name}={value!r}. "
                "Such a model cannot be imported."
            )
    return stated


def read_tensors(path: Path, skip: str = "") -> Tensors:
    """Read tensors by name.

    Args:
      path: a model.safetensors, a pytorch_model.bin, or the index of the shards of one.
      skip: pattern of names in safetensors files of which only the shape is read.

    Raises:
      ConvertError: a file is absent, truncated, damaged or of another kind.
    """
    if path.suffix != ".json":
        return _read_file(path, skip)
    stated = read_config(path).get("weight_map")
    files = stated if isinstance(stated, dict) and set(map(type, stated.values())) == {str} else {}
    shards = sorted(set(files.values()))
    if not shards or any(
        Path(shard).name != shard or shard in ("", "..") for shard in shards
    ):  # nothing outside the directory may be read
        raise ConvertError(f"{path} has no weight_map of tensors to files beside it. Take it from its source again.")
    tensors: dict[str, Tensor | Array] = {}
    for shard in shards:
        if not path.with_name(shard).is_file():
            raise ConvertError(f"{path.with_name(shard)} is missing, but {path.name} lists it. Copy it there.")
        more = _read_file(path.with_name(shard), skip)
        if twice := sorted(more.keys() & tensors.keys()):
            raise ConvertError(f"{path.with_name(shard)} holds {twice[0]}, which another shard has too.")
        tensors |= more
    if other := sorted(files.keys() ^ tensors.keys()):
        raise ConvertError(f"{path} and its files differ in {other[0]}. Take both from their source again.")
    return tensors


def _read_file(path: Path, skip: str) -> Tensors:
    if path.suffix != ".bin":
        return _read_safetensors(path, skip)
    state = read_torch_file(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConvertError(f"{path} is not a dict of tensors. Give a pytorch_model.bin.")
    return state


def _read_safetensors(path: Path, skip: str) -> dict[str, Array]:
    found: dict[str, Array] = {}
    try:
        with places.open_regular(path):
            pass
        with safetensors.safe_open(path, framework="flax") as file:  # framework "numpy" does not support bfloat16
            for name in file.keys():  # noqa: SIM118 - not a dict
                skipped = bool(re.fullmatch(skip, name))
                array = None if skipped else np.asarray(file.get_tensor(name))
                found[name] = Array(array, tuple(file.get_slice(name).get_shape()))
    except (safetensors.SafetensorError, OSError) as error:
        raise ConvertError(f"{path} is truncated or damaged ({why(error)}). Copy or download it again.") from error
    return found
