"""A unit LM on disk: `config.json` beside `model.safetensors` (docs/design.md, Files)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spjax.models.config import UnitLMConfig
from spjax.storage import files
from spjax.storage.files import Shape, StorageError
from spjax.types import Params

FORMAT = "spjax-unit-lm"
VERSION = 1
CONFIG_FILE = "config.json"
TENSOR_FILE = "model.safetensors"

_FIELDS = tuple(field.name for field in dataclasses.fields(UnitLMConfig))


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
    return shapes


def unit_lm_hash(params: Params) -> str:
    """Identity of a unit LM, which prompt packs are bound to: sha256 (hex) over its float32 tensors.

    Args:
      params: the `lm` tree of docs/design.md; numpy or JAX arrays.

    Raises:
      StorageError: a tensor that is not float32 (a rounded copy would have another identity).
    """
    for path, (dtype, _) in files.described(params).items():
        if dtype != "float32":
            raise StorageError(f"unit LM: {path} is {dtype}; its hash is that of the float32 weights. Give those.")
    return files.tree_hash(params)


def save_unit_lm(
    directory: str | Path, config: UnitLMConfig, params: Params, card: Mapping[str, Any] | None = None
) -> str:
    """Writes a unit LM, atomically; one that is already there is replaced.

    Args:
      directory: where to; parents are made.
      config: its architecture.
      params: the `lm` tree of docs/design.md, float32.
      card: where it comes from, any JSON ("source", "trained_on", "valid_perplexity"); kept as "provenance".

    Returns:
      Its hash.

    Raises:
      StorageError: tensors that do not fit the config, a card that is no JSON, or a directory with other files in it.
    """
    files.check_tensors(files.described(params), unit_lm_shapes(config), "unit LM to save", "Give the whole lm tree.")
    identity = unit_lm_hash(params)
    described = {
        "format": FORMAT,
        "version": VERSION,
        **dataclasses.asdict(config),
        "hash": identity,
        "parameters": config.num_params,
        "provenance": dict(card or {}),
    }
    files.write_directory(
        directory, {CONFIG_FILE: files.json_writer(described), TENSOR_FILE: files.tensor_writer(params)}
    )
    return identity


def read_unit_lm(directory: str | Path) -> tuple[UnitLMConfig, Params, dict[str, Any]]:
    """Reads a unit LM and checks every tensor, and all of them against the hash in config.json.

    Args:
      directory: as written by `save_unit_lm`.

    Returns:
      Config; the `lm` tree of numpy float32 arrays; info: "hash", "parameters" and "provenance".

    Raises:
      StorageError: files absent, truncated, altered, of a newer format, or tensors that do not fit the config.
    """
    directory = Path(directory)
    path = directory / CONFIG_FILE
    described = files.read_json(path, FORMAT, VERSION)
    way_out = "Take it from its source again."
    files.check_keys(described, (*_FIELDS, "hash"), ("parameters", "provenance"), path, way_out)
    sizes = {name: described[name] for name in _FIELDS}
    try:
        if any(type(value) is not int for value in sizes.values()):  # true would pass for 1
            raise ValueError(f"{sizes} are not all whole numbers")
        config = UnitLMConfig(**sizes)
    except ValueError as error:
        raise StorageError(f"{path}: {error}. {way_out}") from error
    params = files.read_tensors(directory / TENSOR_FILE, lambda _: unit_lm_shapes(config))
    identity = unit_lm_hash(params)
    if identity != described["hash"]:
        raise StorageError(
            f"{directory / TENSOR_FILE} has the hash {identity}, but {path} says {described['hash']}: "
            "one of the two was altered. Take both from their source again."
        )
    info = {
        "hash": identity,
        "parameters": config.num_params,
        "provenance": described.get("provenance") or {},
    }
    return config, params, info
