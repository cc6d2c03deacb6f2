"""A unit LM on disk: `config.json` beside `model.safetensors` (docs/design.md, Files)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from spjax.models.config import SIZES, ProsodyConfig, UnitLMConfig
from spjax.storage import assets, files, places
from spjax.storage.files import Shape, StorageError
from spjax.types import Params

FORMAT = "spjax-unit-lm"
VERSION = 4  # 1: a unit LM, 2: a multi-stream LM; since 3 either, and config.json carries a hash; 4: in bfloat16
SEALED = 3
FREE = ("provenance",)  # fields of config.json that decide no answer
CONFIG_FILE = "config.json"
TENSOR_FILE = "model.safetensors"

_PROSODY = {field.name for field in dataclasses.fields(ProsodyConfig)}
_PLAIN = ProsodyConfig()  # what the hash says nothing of


def unit_lm_shapes(config: UnitLMConfig) -> dict[str, Shape]:
    """Shape of every tensor of a unit LM by its path, as docs/design.md lists them."""
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
    """Identity of a unit LM, which prompt packs are bound to: sha256 (hex) over its float32 tensors.

    Args:
      params: the `lm` tree of docs/design.md; numpy or JAX arrays.
      prosody: of a multi-stream LM, hashed as one more tensor: other bin edges or inputs make another LM. Fields that
        have their default are left out, so that one which a later release adds changes no hash.

    Raises:
      StorageError: a tensor that is not float32 (a rounded copy would have another identity).
    """
    for path, (dtype, _) in files.described(params).items():
        if dtype != "float32":
            raise StorageError(f"unit LM: {path} is {dtype}; its hash is that of the float32 weights. Give those.")
    if prosody is None:
        return files.tree_hash(params)
    said = {name: value for name, value in dataclasses.asdict(prosody).items() if value != getattr(_PLAIN, name)}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return files.tree_hash({**params, "prosody": np.frombuffer(text.encode(), np.uint8)})


def save_unit_lm(
    directory: str | Path,
    config: UnitLMConfig,
    params: Params,
    card: Mapping[str, Any] | None = None,
    *,
    bfloat16: bool = False,
) -> str:
    """Writes a unit LM, atomically; one that is already there is replaced.

    Args:
      directory: where to; parents are made.
      config: its architecture.
      params: the `lm` tree of docs/design.md, float32.
      card: where it comes from, any JSON ("source", "trained_on", "valid_perplexity"); kept as "provenance".
      bfloat16: round its weights, for a file of half the size. It is another LM then, with another hash.

    Returns:
      Its hash: that of the float32 tensors that `read_unit_lm` returns.

    Raises:
      StorageError: tensors that do not fit the config, a card that is no JSON, or a directory with other files in it.
    """
    files.check_tensors(files.described(params), unit_lm_shapes(config), "unit LM to save", "Give the whole lm tree.")
    if bfloat16:
        stored = files.as_type(params, ml_dtypes.bfloat16)
        identity = unit_lm_hash(files.as_type(stored, np.float32), config.prosody)
    else:
        stored, identity = params, unit_lm_hash(params, config.prosody)
    described = {
        "format": FORMAT,
        "version": VERSION if bfloat16 else SEALED,  # so that earlier releases read what they can
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
    """Reads a unit LM and checks every tensor, and all of them against the hash in config.json.

    Args:
      directory: as written by `save_unit_lm`; or "tiny", the unit LM that goes with spjax.

    Returns:
      Config; the `lm` tree of numpy float32 arrays; info: "hash", "parameters" and "provenance".

    Raises:
      StorageError: files absent, truncated, altered, of a newer format, or tensors that do not fit the config.
    """
    directory = places.at(assets.find(directory, "lm"))
    path = directory / CONFIG_FILE
    described = files.read_json(path, FORMAT, VERSION)
    way_out = "Take it from its source again."
    more = {1: (), 2: ("prosody",)}.get(described["version"], (files.SEAL,))
    optional = ("parameters", "provenance", *(("prosody",) if described["version"] >= SEALED else ()))
    rounded = described["version"] >= VERSION
    more = (*more, "dtype") if rounded else more
    files.check_keys(described, (*SIZES, *more, "hash"), optional, path, way_out)
    if rounded and described["dtype"] != "bfloat16":
        raise StorageError(f"{path}: dtype is {described['dtype']!r:.80}, must be bfloat16. {way_out}")
    sizes = {name: described[name] for name in SIZES}
    try:
        if any(type(value) is not int for value in sizes.values()):  # true would pass for 1
            raise ValueError(f"{sizes} are not all whole numbers")
        config = UnitLMConfig(**sizes, prosody=_prosody(described.get("prosody")))
    except ValueError as error:
        raise StorageError(f"{path}: {error}. {way_out}") from error
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
