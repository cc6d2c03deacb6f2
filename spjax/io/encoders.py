"""A speech encoder on disk: `config.json` and `model.safetensors` (docs/design.md, Speech to units)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spjax.io import files, places
from spjax.io.files import Shape, StorageError
from spjax.models.hubert_config import HubertConfig
from spjax.models.whisper_config import WhisperConfig
from spjax.types import Params

VERSION = 2  # since 2 config.json has a hash
FREE = ("provenance",)  # fields of config.json that do not affect the output and are not hashed
CONFIG_FILE = "config.json"
TENSOR_FILE = "model.safetensors"

EncoderConfig = HubertConfig | WhisperConfig


def hubert_shapes(config: HubertConfig) -> dict[str, Shape]:
    """Returns the shape of each HuBERT tensor by path; kernels are [in, out], of convolutions [width, in, out]."""
    c, d, f, part = config.conv_dim, config.dim, config.ffn_dim, config.dim // config.position_groups
    shapes: dict[str, Shape] = {}
    for number, width in enumerate(config.conv_kernels):
        shapes[f"conv/{number}/kernel"] = (width, c if number else 1, c)
    shapes["position/kernel"] = (config.position_width, part, d)
    shapes["position/bias"] = (d,)
    dense = {"project": (c, d)}
    norms = {"conv_norm": c, "project_norm": c, "norm": d}
    for number in range(config.layers):
        dense |= {f"layers/{number}/{name}": (d, d) for name in ("query", "key", "value", "out")}
        dense |= {f"layers/{number}/ffn_in": (d, f), f"layers/{number}/ffn_out": (f, d)}
        norms |= {f"layers/{number}/{name}": d for name in ("attn_norm", "ffn_norm")}
    for name, (rows, columns) in dense.items():
        shapes |= {f"{name}/kernel": (rows, columns), f"{name}/bias": (columns,)}
    for name, width in norms.items():
        shapes |= {f"{name}/scale": (width,), f"{name}/bias": (width,)}
    return shapes


def whisper_shapes(config: WhisperConfig) -> dict[str, Shape]:
    """Returns the shape of each Whisper encoder tensor by path, as `hubert_shapes`; key projections have no bias."""
    d, f = config.dim, config.ffn_dim
    shapes: dict[str, Shape] = {"position/table": (config.positions, d)}
    shapes |= {
        "conv/0/kernel": (3, config.mels, d),
        "conv/1/kernel": (3, d, d),
        "conv/0/bias": (d,),
        "conv/1/bias": (d,),
    }
    norms = ["norm"]
    for number in range(config.layers):
        part = f"layers/{number}"
        dense = dict.fromkeys(("query", "key", "value", "out"), (d, d)) | {"ffn_in": (d, f), "ffn_out": (f, d)}
        shapes |= {f"{part}/{name}/kernel": shape for name, shape in dense.items()}
        shapes |= {f"{part}/{name}/bias": shape[1:] for name, shape in dense.items() if name != "key"}
        norms += [f"{part}/attn_norm", f"{part}/ffn_norm"]
    return shapes | {f"{name}/{part}": (d,) for name in norms for part in ("scale", "bias")}


class Kind(NamedTuple):
    """A kind of encoder: its title in messages, its config class, and the shapes of its tensors."""

    title: str
    config: type[HubertConfig] | type[WhisperConfig]
    shapes: Callable[[Any], dict[str, Shape]]


KINDS = {  # by the "format" of config.json
    "spjax-hubert": Kind("HuBERT", HubertConfig, hubert_shapes),
    "spjax-whisper": Kind("Whisper", WhisperConfig, whisper_shapes),
}


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
      params: weights, float32, as `hubert_shapes` or `whisper_shapes` lists them.
      name: the encoder's name in unit records, such as "hubert_base".
      provenance: source of the weights, any JSON.

    Returns:
      sha256 (hex) of the tensors.

    Raises:
      StorageError: tensors that do not match the config, an empty name, or a directory that holds other files.
    """
    form, kind = next((form, kind) for form, kind in KINDS.items() if isinstance(config, kind.config))
    if not isinstance(name, str) or not name.strip():
        raise StorageError(f"a {kind.title} to save has the name {name!r}: give a name, such as 'hubert_base'.")
    files.check_tensors(files.described(params), kind.shapes(config), f"{kind.title} to save", "Give the whole tree.")
    identity = files.tree_hash(params)
    described: dict[str, Any] = {
        "format": form,
        "version": VERSION,
        "name": name,
        **dataclasses.asdict(config),
        "hash": identity,
        "parameters": config.num_params,
        "provenance": dict(provenance or {}),
    }
    described[files.SEAL] = files.seal(described, FREE)
    files.write_directory(
        directory, {CONFIG_FILE: files.json_writer(described), TENSOR_FILE: files.tensor_writer(params)}
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
    title, sizes_of, shapes_of = KINDS[described["format"]]
    todo = f"Take it from its source again, or import it again: `python -m spjax.convert {title.lower()}`."
    fields = tuple(field.name for field in dataclasses.fields(sizes_of))
    sealed = (files.SEAL,) if described["version"] >= VERSION else ()
    files.check_keys(described, (*fields, *sealed, "name", "hash"), ("parameters", "provenance"), path, todo)
    sizes: dict[str, Any] = {name: described[name] for name in fields}
    sizes = {name: tuple(size) if isinstance(size, list) else size for name, size in sizes.items()}
    try:
        config = sizes_of(**sizes)
    except ValueError as error:
        raise StorageError(f"{path}: {error}. {todo}") from error
    if not isinstance(described["name"], str) or not described["name"].strip():
        raise StorageError(f"{path}: name is {described['name']!r:.80}, must be the encoder's name. {todo}")

    def shapes(found: Mapping[str, tuple[str, Shape]]) -> dict[str, Shape]:
        if config.layers > len(found):  # bounds the number of names made below
            raise StorageError(f"{path}: layers is {config.layers}, but there are {len(found)} tensors. {todo}")
        return shapes_of(config)

    params = files.read_tensors(directory / TENSOR_FILE, shapes)
    identity = files.tree_hash(params)
    if identity != described["hash"]:
        raise StorageError(
            f"{directory / TENSOR_FILE} has the hash {identity}, but {path} says {described['hash']}: "
            f"one of the two was altered. {todo}"
        )
    files.check_seal(described, FREE, VERSION, path)
    info = {
        "name": described["name"],
        "hash": identity,
        "parameters": config.num_params,
        "provenance": described.get("provenance") or {},
    }
    return config, params, info
