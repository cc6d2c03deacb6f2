"""A unit LM on disk: `config.json` and `model.safetensors` (docs/design.md, Files)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from spjax.io import assets, files, places
from spjax.io.files import Shape, StorageError
from spjax.models.config import SIZES, ProsodyConfig, UnitLMConfig
from spjax.types import Params

FORMAT = "spjax-unit-lm"
VERSION = 4  # 1: a unit LM; 2: a multi-stream LM; 3: either, and config.json has a hash; 4: bfloat16 weights
SEALED = 3
FREE = ("provenance",)  # fields of config.json that do not affect the output and are not hashed
CONFIG_FILE = "config.json"
TENSOR_FILE = "model.safetensors"

_PROSODY = {field.name for field in dataclasses.fields(ProsodyConfig)}
_DEFAULTS = ProsodyConfig()  # fields with these values are not hashed


def unit_lm_shapes(config: UnitLMConfig) -> dict[str, Shape]:
    """Returns the shape of every tensor of a unit LM by path, as docs/design.md lists them."""
    stack, d, f = config.layers, config.dim, config.ffn_dim
    shapes: dict[str, Shape] = {"embed": (config.vocab_size, d)}
    for name, (rows, columns) in {
        **dict.fromkeys(("query", "key", "value", "out"), (d, d)),
        "ffn_in": (d, f),
        "ffn_out": (f, d),
    }.items():
        shapes[f"layers/{name}/kernel"] = (stack, rows, columns)
        shapes[f"layers/{name}/bias"] = (stack, columns)
    for part in ("scale", "bias"):
        shapes[f"layers/attn_norm/{part}"] = shapes[f"layers/ffn_norm/{part}"] = (stack, d)
        shapes[f"final_norm/{part}"] = (d,)
    if config.prosody is None:
        return shapes
    shapes["heads/unit"] = (config.vocab_size, d)
    for name, symbols in zip(("duration", "f0"), config.prosody.symbols, strict=True):
        shapes[f"heads/{name}"] = (symbols, d)
        if config.prosody.discrete:
            shapes[f"streams/{name}/embed"] = (symbols, d)
        else:
            shapes[f"streams/{name}/kernel"], shapes[f"streams/{name}/bias"] = (1, d), (d,)
    return shapes


def unit_lm_hash(params: Params, prosody: ProsodyConfig | None = None) -> str:
    """Returns the identity of a unit LM, to which prompt packs are bound: sha256 (hex) over its float32 tensors.

    Args:
      params: the `lm` tree of docs/design.md; numpy or JAX arrays.
      prosody: of a multi-stream LM; hashed as one more tensor, because other bin edges or inputs make another LM.
        Fields with default values are left out, so that fields added by later releases do not change the hash.

    Raises:
      StorageError: a tensor that is not float32 (a rounded copy would have another hash).
    """
    for path, (dtype, _) in files.described(params).items():
        if dtype != "float32":
            raise StorageError(f"unit LM: {path} is {dtype}, but the hash is that of the float32 weights. Give those.")
    if prosody is None:
        return files.tree_hash(params)
    changed = {name: value for name, value in dataclasses.asdict(prosody).items() if value != getattr(_DEFAULTS, name)}
    text = json.dumps(changed, sort_keys=True, separators=(",", ":"))
    return files.tree_hash({**params, "prosody": np.frombuffer(text.encode(), np.uint8)})


def save_unit_lm(
    directory: str | Path,
    config: UnitLMConfig,
    params: Params,
    card: Mapping[str, Any] | None = None,
    *,
    bfloat16: bool = False,
) -> str:
    """Writes a unit LM, atomically; an existing one is replaced.

    Args:
      directory: target; parents are created.
      config: architecture.
      params: the `lm` tree of docs/design.md, float32.
      card: any JSON ("source", "trained_on", "valid_perplexity"); stored as "provenance".
      bfloat16: store rounded weights, which halves the file. The result is another LM, with another hash.

    Returns:
      Its hash: that of the float32 tensors that `read_unit_lm` returns.

    Raises:
      StorageError: tensors that do not match the config, a card that is not JSON, or a directory that holds other
        files.
    """
    files.check_tensors(files.described(params), unit_lm_shapes(config), "unit LM to save", "Give the whole lm tree.")
    if bfloat16:
        stored = files.as_type(params, ml_dtypes.bfloat16)
        identity = unit_lm_hash(files.as_type(stored, np.float32), config.prosody)
    else:
        stored, identity = params, unit_lm_hash(params, config.prosody)
    described = {
        "format": FORMAT,
        "version": VERSION if bfloat16 else SEALED,  # earlier releases read version 3
        **{name: getattr(config, name) for name in SIZES},
        **({} if config.prosody is None else {"prosody": dataclasses.asdict(config.prosody)}),
        **({"dtype": "bfloat16"} if bfloat16 else {}),
        "hash": identity,
        "parameters": config.num_params,
        "provenance": dict(card or {}),
    }
    described[files.SEAL] = files.seal(described, FREE)
    files.write_directory(
        directory, {CONFIG_FILE: files.json_writer(described), TENSOR_FILE: files.tensor_writer(stored)}
    )
    return identity


def _prosody(value: Any) -> ProsodyConfig | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not value.keys() <= _PROSODY or not isinstance(value.get("f0_edges", []), list):
        raise ValueError(f"prosody is {value!r:.200}, may have {', '.join(sorted(_PROSODY))}, f0_edges as a list")
    return ProsodyConfig(**value)


def read_unit_lm(directory: str | Path) -> tuple[UnitLMConfig, Params, dict[str, Any]]:
    """Reads a unit LM and checks its tensors against the config and the hash in config.json.

    Args:
      directory: written by `save_unit_lm`; or "tiny", the bundled unit LM.

    Returns:
      Config; the `lm` tree of numpy float32 arrays; info: "hash", "parameters" and "provenance".

    Raises:
      StorageError: missing, truncated, altered or newer files, or tensors that do not match the config.
    """
    directory = places.at(assets.find(directory, "lm"))
    path = directory / CONFIG_FILE
    described = files.read_json(path, FORMAT, VERSION)
    fix = "Take it from its source again."
    more = {1: (), 2: ("prosody",)}.get(described["version"], (files.SEAL,))
    optional = ("parameters", "provenance", *(("prosody",) if described["version"] >= SEALED else ()))
    rounded = described["version"] >= VERSION
    more = (*more, "dtype") if rounded else more
    files.check_keys(described, (*SIZES, *more, "hash"), optional, path, fix)
    if rounded and described["dtype"] != "bfloat16":
        raise StorageError(f"{path}: dtype is {described['dtype']!r:.80}, must be bfloat16. {fix}")
    sizes = {name: described[name] for name in SIZES}
    try:
        if any(type(value) is not int for value in sizes.values()):  # a bool is an instance of int
            raise ValueError(f"{sizes} are not all whole numbers")
        config = UnitLMConfig(**sizes, prosody=_prosody(described.get("prosody")))
    except ValueError as error:
        raise StorageError(f"{path}: {error}. {fix}") from error
    params = files.read_tensors(
        directory / TENSOR_FILE, lambda _: unit_lm_shapes(config), "bfloat16" if rounded else "float32"
    )
    identity = unit_lm_hash(params, config.prosody)
    if identity != described["hash"]:
        raise StorageError(
            f"{directory / TENSOR_FILE} has the hash {identity}, but {path} says {described['hash']}: "
            "one of the two was altered. Take both from their source again."
        )
    files.check_seal(described, FREE, SEALED, path)
    info = {
        "hash": identity,
        "parameters": config.num_params,
        "provenance": described.get("provenance") or {},
    }
    return config, params, info
