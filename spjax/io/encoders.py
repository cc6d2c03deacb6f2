"""A speech encoder on disk: `config.json` and `model.safetensors` (docs/design.md, Speech to units)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spjax.io import files, places
from spjax.io.files import Shape, StorageError
from spjax.models.hubert_config import HubertConfig
from spjax.models.whisper_config import WhisperConfig
from spjax.types import Params

VERSION = 3  # 2: config.json has a hash; 3: fields that may be left out at their default
SEALED = 2
FREE = ("provenance",)  # fields of config.json that do not affect the output and are not hashed
CONFIG_FILE = "config.json"
TENSOR_FILE = "model.safetensors"

EncoderConfig = HubertConfig | WhisperConfig


KINDS: dict[str, tuple[str, type[EncoderConfig]]] = {  # "format" of config.json: title in messages, config
    "spjax-hubert": ("HuBERT", HubertConfig),  # also of wav2vec2 and WavLM
    "spjax-whisper": ("Whisper", WhisperConfig),
}


def _required(kind: type[EncoderConfig]) -> tuple[str, ...]:
    """Fields that config.json always has; the others, with a default of 0 or False, came with version 3."""
    return tuple(field.name for field in dataclasses.fields(kind) if field.default)


def save_encoder(
    directory: str | Path,
    config: EncoderConfig,
    params: Params,
    name: str,
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """Writes an encoder, atomically; an existing one is replaced.

    Args:
      directory: target; parents are created.
      config: architecture.
      params: weights, float32, as `config.shapes` lists them.
      name: the encoder's name in unit records, such as "hubert_base".
      provenance: source of the weights, any JSON.

    Returns:
      sha256 (hex) of the tensors.

    Raises:
      StorageError: tensors that do not match the config, an empty name, or a directory that holds other files.
    """
    form, title = next((form, title) for form, (title, kind) in KINDS.items() if isinstance(config, kind))
    if not isinstance(name, str) or not name.strip():
        raise StorageError(f"a {title} to save has the name {name!r}: give a name, such as 'hubert_base'.")
    files.check_tensors(files.described(params), config.shapes, f"{title} to save", "Give the whole tree.")
    identity = files.tree_hash(params)
    required, defaults = _required(type(config)), type(config)()
    sizes = {
        field: value
        for field, value in dataclasses.asdict(config).items()
        if field in required or value != getattr(defaults, field)
    }
    described: dict[str, Any] = {
        "format": form,
        "version": VERSION if len(sizes) > len(required) else SEALED,  # earlier releases read version 2
        "name": name,
        **sizes,
        "hash": identity,
        "parameters": config.num_params,
        "provenance": dict(provenance or {}),
    }
    described[files.SEAL] = files.seal(described, FREE)
    files.write_directory(
        directory, {CONFIG_FILE: files.json_writer(described), TENSOR_FILE: files.tensor_writer(params)}, CONFIG_FILE
    )
    return identity


def read_encoder(directory: str | Path) -> tuple[EncoderConfig, Params, dict[str, Any]]:
    """Reads an encoder of any kind and checks its tensors against the config and the hash in config.json.

    Args:
      directory: written by `save_encoder`.

    Returns:
      Config; weights, numpy float32 arrays; info: "name", "hash", "parameters" and "provenance".

    Raises:
      StorageError: missing, truncated, altered or newer files, or tensors that do not match the config.
    """
    directory = places.at(directory)
    path = directory / CONFIG_FILE
    described = files.read_json(path, tuple(KINDS), VERSION)
    title, kind = KINDS[described["format"]]
    todo = f"Take it from its source again, or import it again: `python -m spjax.convert {title.lower()}`."
    fields, required = [field.name for field in dataclasses.fields(kind)], _required(kind)
    sealed = (files.SEAL,) if described["version"] >= SEALED else ()
    more = fields if described["version"] >= VERSION else ()
    files.check_keys(described, (*required, *sealed, "name", "hash"), (*more, "parameters", "provenance"), path, todo)
    sizes: dict[str, Any] = {name: value for name, value in described.items() if name in fields}
    sizes = {name: tuple(size) if isinstance(size, list) else size for name, size in sizes.items()}
    try:
        config = kind(**sizes)
    except ValueError as error:
        raise StorageError(f"{path}: {error}. {todo}") from error
    if not isinstance(described["name"], str) or not described["name"].strip():
        raise StorageError(f"{path}: name is {described['name']!r:.80}, must be the encoder's name. {todo}")

    def shapes(found: Mapping[str, tuple[str, Shape]]) -> dict[str, Shape]:
        if config.layers > len(found):  # bounds the number of names made below
            raise StorageError(f"{path}: layers is {config.layers}, but there are {len(found)} tensors. {todo}")
        return config.shapes

    params = files.read_tensors(directory / TENSOR_FILE, shapes)
    identity = files.tree_hash(params)
    if identity != described["hash"]:
        raise StorageError(
            f"{directory / TENSOR_FILE} has the hash {identity}, but {path} says {described['hash']}: "
            f"one of the two was altered. {todo}"
        )
    files.check_seal(described, FREE, SEALED, path)
    info = {
        "name": described["name"],
        "hash": identity,
        "parameters": config.num_params,
        "provenance": described.get("provenance") or {},
    }
    return config, params, info
