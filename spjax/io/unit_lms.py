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
from spjax.io.files import StorageError
from spjax.models.config import BLOCK, SIZES, ProsodyConfig, UnitLMConfig
from spjax.types import Params

FORMAT = "spjax-unit-lm"
# 1: a unit LM; 2: a multi-stream LM; 3: either, and config.json has a hash; 4: bfloat16 weights; 5: another block
VERSION = 5
SEALED, ROUNDED = 3, 4
FREE = ("provenance",)  # fields of config.json that do not affect the output and are not hashed
CONFIG_FILE = "config.json"
TENSOR_FILE = "model.safetensors"

_PROSODY = {field.name for field in dataclasses.fields(ProsodyConfig)}
_DEFAULTS = ProsodyConfig()  # fields with these values are not hashed


def unit_lm_hash(params: Params, prosody: ProsodyConfig | None = None, block: Mapping[str, Any] | None = None) -> str:
    """Returns the identity of a unit LM, to which prompt packs are bound: sha256 (hex) over its float32 tensors.

    Args:
      params: the `lm` tree of docs/design.md; numpy or JAX arrays.
      prosody: of a multi-stream LM; hashed as one more tensor, because other bin edges or inputs make another LM.
        Fields with default values are left out, so that fields added by later releases do not change the hash.
      block: `UnitLMConfig.block`, hashed likewise: other positions or another norm make another LM.

    Raises:
      StorageError: a tensor that is not float32 (a rounded copy would have another hash).
    """
    for path, (dtype, _) in files.described(params).items():
        if dtype != "float32":
            raise StorageError(f"unit LM: {path} is {dtype}, but the hash is that of the float32 weights. Give those.")
    more = {}
    if prosody is not None:
        values = dataclasses.asdict(prosody)
        more["prosody"] = {name: value for name, value in values.items() if value != getattr(_DEFAULTS, name)}
    if block:
        more["block"] = dict(block)
    text = {name: json.dumps(value, sort_keys=True, separators=(",", ":")).encode() for name, value in more.items()}
    return files.tree_hash({**params, **{name: np.frombuffer(value, np.uint8) for name, value in text.items()}})


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
    files.check_tensors(files.described(params), config.shapes, "unit LM to save", "Give the whole lm tree.")
    if bfloat16:
        stored = files.as_type(params, ml_dtypes.bfloat16)
        identity = unit_lm_hash(files.as_type(stored, np.float32), config.prosody, config.block)
    else:
        stored, identity = params, unit_lm_hash(params, config.prosody, config.block)
    described = {
        "format": FORMAT,
        "version": VERSION if config.block else ROUNDED if bfloat16 else SEALED,  # the oldest that can hold it
        **{name: getattr(config, name) for name in SIZES},
        **({} if config.prosody is None else {"prosody": dataclasses.asdict(config.prosody)}),
        **({"block": config.block} if config.block else {}),
        **({"dtype": "bfloat16"} if bfloat16 else {}),
        "hash": identity,
        "parameters": config.num_params,
        "provenance": dict(card or {}),
    }
    described[files.SEAL] = files.seal(described, FREE)
    files.write_directory(
        directory, {CONFIG_FILE: files.json_writer(described), TENSOR_FILE: files.tensor_writer(stored)}, CONFIG_FILE
    )
    return identity


def _prosody(value: Any) -> ProsodyConfig | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not value.keys() <= _PROSODY or not isinstance(value.get("f0_edges", []), list):
        raise ValueError(f"prosody is {value!r:.200}, may have {', '.join(sorted(_PROSODY))}, f0_edges as a list")
    return ProsodyConfig(**value)


def block_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of UnitLMConfig under "block", which may be absent.

    Raises:
      ValueError: unknown fields, or no object.
    """
    block = described.get("block", {})
    if not isinstance(block, dict) or not block.keys() <= set(BLOCK):
        raise ValueError(f"block is {block!r:.200}, may have {', '.join(BLOCK)}")
    scaling = block.get("rope_scaling")
    if not isinstance(scaling, dict | None):
        raise ValueError(f"rope_scaling is {scaling!r:.200}, must be an object")
    if not isinstance(block.get("absent", []), list):
        raise ValueError(f"absent is {block['absent']!r:.80}, must be a list")
    return block


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
    version = described["version"]
    more = {1: (), 2: ("prosody",), 3: (files.SEAL,), 4: (files.SEAL, "dtype")}.get(version, (files.SEAL, "block"))
    optional = ("parameters", "provenance", *(("prosody",) if version >= SEALED else ()))
    files.check_keys(
        described, (*SIZES, *more, "hash"), (*optional, *(("dtype",) if version == VERSION else ())), path, fix
    )
    rounded = "dtype" in described
    if rounded and described["dtype"] != "bfloat16":
        raise StorageError(f"{path}: dtype is {described['dtype']!r:.80}, must be bfloat16. {fix}")
    sizes = {name: described[name] for name in SIZES}
    try:
        if any(type(value) is not int for value in sizes.values()):  # a bool is an instance of int
            raise ValueError(f"{sizes} are not all whole numbers")
        config = UnitLMConfig(**sizes, prosody=_prosody(described.get("prosody")), **block_of(described))
    except ValueError as error:
        raise StorageError(f"{path}: {error}. {fix}") from error
    params = files.read_tensors(directory / TENSOR_FILE, lambda _: config.shapes, "bfloat16" if rounded else "float32")
    identity = unit_lm_hash(params, config.prosody, config.block)
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
