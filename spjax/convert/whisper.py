"""Import the encoder of Hugging Face's Whisper models; the decoder is left out and counted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spjax.convert import ConvertError, why
from spjax.convert.checkpoint import provenance
from spjax.convert.huggingface import (
    Imported,
    Reader,
    Tensors,
    model_name,
    read_config,
    read_front_end,
    read_tensors,
    weights_of,
)
from spjax.convert.options import Options
from spjax.convert.safe_pickle import shown
from spjax.io import kinds, places
from spjax.models.whisper_config import WhisperConfig
from spjax.types import Params

MODEL = "a Whisper of Hugging Face"
# Tensors have different prefixes in a model for transcription, a bare model, and an encoder.
_UNUSED = r"((model\.)?decoder|proj_out|projector|classifier)\..*|layer_weights"
_SIZES = {
    "mels": "num_mel_bins",
    "dim": "d_model",
    "layers": "encoder_layers",
    "heads": "encoder_attention_heads",
    "ffn_dim": "encoder_ffn_dim",
    "positions": "max_source_positions",
}
_LAYER = {
    "query": "layers.{}.self_attn.q_proj",
    "key": "layers.{}.self_attn.k_proj",
    "value": "layers.{}.self_attn.v_proj",
    "out": "layers.{}.self_attn.out_proj",
    "ffn_in": "layers.{}.fc1",
    "ffn_out": "layers.{}.fc2",
    "attn_norm": "layers.{}.self_attn_layer_norm",
    "ffn_norm": "layers.{}.final_layer_norm",
}
_FRONT_END = {  # options in preprocessor_config.json, and the only value that `whisper.log_mel` computes
    "n_fft": 400,
    "hop_length": 160,
    "sampling_rate": 16000,
    "padding_value": 0.0,
    "dither": 0.0,
    "do_normalize": False,
}


def import_whisper(source: str | Path, given: Mapping[str, Any] | None = None) -> Imported:
    """Import the encoder of a Whisper; no code named in a file is imported or run.

    Args:
      source: the directory of a Hugging Face model, or its model.safetensors, the index of its shards, or its
        pytorch_model.bin, with config.json beside it; preprocessor_config.json is checked if present.
      given: options that config.json lacks.

    Raises:
      ConvertError: unreadable; another architecture or front end; a tensor that is missing, unknown, of a wrong shape,
        or not finite.
    """
    path = Path(source)
    if path.is_dir():
        path = weights_of(path)
    try:
        with places.open_regular(path):
            pass
    except OSError as error:
        raise ConvertError(f"{path} cannot be read ({why(error)}). Give the directory of {MODEL}.") from error
    if path.suffix not in (".safetensors", ".bin", ".json"):
        raise ConvertError(f"{path} is not a Hugging Face model. Give its directory, or its model.safetensors.")
    options = Options(path, read_config(path.with_name("config.json")), given)
    config = _config(path, options)
    read_front_end(path.with_name("preprocessor_config.json"), {**_FRONT_END, "feature_size": config.mels})
    tensors = read_tensors(path, skip=_UNUSED)
    read = Reader(path, tensors, MODEL)
    params = _tree(read, _prefix(path, tensors), config)
    left, left_out = read.leftover(_UNUSED, "Whisper encoders")
    origin = {**provenance(path, "Whisper (Hugging Face)"), **options.record()}
    name = model_name(path, options.get("_name_or_path"))
    return Imported(
        config, params, path, "Hugging Face", read.count(read.used), left, "Whisper", name, origin, left_out
    )


def _config(path: Path, options: Options) -> WhisperConfig:
    card = path.with_name("config.json")
    if options.get("model_type", "whisper") != "whisper":
        raise ConvertError(f"{path.parent} is {kinds.describe(path.parent)[0]}. {kinds.describe(path.parent)[1]}")
    if options.get("activation_function", "gelu") != "gelu":
        raise ConvertError(
            f"{card} has activation_function={shown(options.get('activation_function'))}; spjax computes only 'gelu'. "
            "Such a model cannot be imported."
        )
    defaults = WhisperConfig()
    options.require({theirs: str(getattr(defaults, ours)) for ours, theirs in _SIZES.items()})
    options.check_given()
    try:
        return WhisperConfig(**{ours: options.get(theirs) for ours, theirs in _SIZES.items()})
    except ValueError as error:
        raise ConvertError(f"{card}: {error}.") from error


def _prefix(path: Path, tensors: Tensors) -> str:
    prefixes = [name.removesuffix("conv1.weight") for name in tensors if name.endswith("conv1.weight")]
    prefixes = [prefix for prefix in prefixes if prefix in ("", "encoder.", "model.encoder.")]
    if len(prefixes) != 1:
        raise ConvertError(
            f"{path} has {len(prefixes)} tensors encoder.conv1.weight, must have one (it has "
            f"{', '.join(list(tensors)[:3])}). Give {MODEL}."
        )
    return prefixes[0]


def _tree(read: Reader, prefix: str, config: WhisperConfig) -> Params:
    d, names = config.dim, {ours: f"{prefix}{theirs}" for ours, theirs in _LAYER.items()}
    return {
        "conv": {"0": read.conv(f"{prefix}conv1", 3, config.mels, d), "1": read.conv(f"{prefix}conv2", 3, d, d)},
        "position": {"table": read(f"{prefix}embed_positions.weight", (config.positions, d))},
        "layers": {str(n): read.layer(names, n, d, config.ffn_dim, key_bias=False) for n in range(config.layers)},
        "norm": read.norm(f"{prefix}layer_norm", d),
    }
