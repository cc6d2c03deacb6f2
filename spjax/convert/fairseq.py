"""Import fairseq checkpoints of GSLM unit LMs. Every tensor must be known."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from spjax import vocab
from spjax.convert import ConvertError, why
from spjax.convert.checkpoint import Checkpoint, check_kind, check_leftover, load, read_checkpoint
from spjax.convert.safe_pickle import shown
from spjax.io import places
from spjax.io.kinds import MAX_JSON
from spjax.models.config import UnitLMConfig
from spjax.types import Params

# Our name ← fairseq's, inside a layer. Weights of fairseq's linear layers are [out, in].
_LAYER_PARTS = {
    "attn_norm": "self_attn_layer_norm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn_in": "fc1",
    "ffn_out": "fc2",
}
_EMBED = "decoder.embed_tokens.weight"
OUTPUT = "decoder.output_projection.weight"
STREAMS_HEAD = "decoder.project_out_dim.weight"  # outputs for units, durations and f0: only pGSLM has it

SIZES = {  # UnitLMConfig field ← option
    "dim": "decoder_embed_dim",
    "layers": "decoder_layers",
    "ffn_dim": "decoder_ffn_embed_dim",
    "heads": "decoder_attention_heads",
}
_ARCHITECTURE = {  # options that spjax computes for one value only
    "activation_fn": "relu",
    "decoder_normalize_before": True,
    "no_decoder_final_norm": False,
    "no_token_positional_embeddings": False,
    "decoder_learned_pos": False,
    "share_decoder_input_output_embed": True,
    "no_scale_embedding": False,
    "layernorm_embedding": False,
    "adaptive_input": False,
    "character_embeddings": False,
    "adaptive_softmax_cutoff": None,
    "base_layers": 0,
    "scale_fc": False,
    "scale_attn": False,
    "scale_heads": False,
    "scale_resids": False,
    "decoder_xformers_att_config": None,
    "add_bos_token": False,
    "fine_tune": False,  # SpeechPrompt: the LM's weights are trained too
    "use_sep_token": True,  # SpeechPrompt: `<s>` is trained
}

# Options that cannot be inferred from the tensors, with the flag value that spjax computes.
_UNSEEN = {
    "decoder_attention_heads": "16",
    "activation_fn": "relu",
    "decoder_normalize_before": "true",
    "share_decoder_input_output_embed": "true",  # unless the file has an output tensor
    "no_token_positional_embeddings": "false",
    "decoder_learned_pos": "false",
    "no_scale_embedding": "false",
    "add_bos_token": "false",
}
# Behaviour of fairseq versions without the option. Without any options, only the last is certain, a later addition.
_DEFAULTS = {"no_scale_embedding": False, "add_bos_token": False, "decoder_xformers_att_config": None}


def check_architecture(checkpoint: Checkpoint, free: Collection[str] = (), *, whole: bool = True) -> None:
    """Refuse a decoder that differs from GSLM's, or that lacks options that decide what it computes.

    Args:
      checkpoint: its options are checked; options that tensors reveal may be absent.
      free: options that may have any value.
      whole: False for a prompt, whose LM has the options.

    Raises:
      ConvertError: the first option that differs, by name; or all that are missing.
    """
    options = checkpoint.options
    for name, needed in _ARCHITECTURE.items():
        value = options.get(name)
        if value not in (needed, None) and name not in free:  # None: required or assumed below, or shown by tensors
            given = "was given as" if name in options.given else "was trained with"
            raise ConvertError(
                f"{checkpoint.path} {given} {name}={shown(value)}; spjax computes only {name}={needed!r}. "
                "Such a model cannot be imported."
            )
    if not whole:
        return
    needed_here = {name: value for name, value in _UNSEEN.items() if name not in free}
    if OUTPUT in checkpoint.tensors:
        needed_here.pop("share_decoder_input_output_embed", None)
    for name, default in _DEFAULTS.items():
        if options.found or name not in needed_here:
            options.assume(name, default)
            needed_here.pop(name, None)
    options.require(needed_here)


def check_dictionary(path: str | Path, vocab_size: int) -> None:
    """Check that dict.txt lists units 0, 1, 2 ... in numeric order, since unit u is token 4 + u in spjax.

    Lines `madeupword0000 0` at the end, with which fairseq pads a vocabulary to a multiple of 8, are accepted.

    Args:
      path: fairseq's dictionary, a line "<unit> <count>" each.
      vocab_size: V of the model, specials included.

    Raises:
      ConvertError: absent, another order, or another number of symbols than the model has.
    """
    path = Path(path)
    try:
        lines = places.read_limited(path, MAX_JSON).decode("utf-8-sig").splitlines()
        symbols = [line.rsplit(" ", 1)[0] for line in lines]
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(
            f"{path} cannot be read ({why(error)}). Give the model's dictionary with --dict=dict.txt."
        ) from error
    units = len(symbols)
    while units and re.fullmatch(r"madeupword\d{4}", symbols[units - 1]):
        units -= 1
    for number, symbol in enumerate(symbols[:units]):
        if symbol != str(number):
            raise ConvertError(
                f"{path}, line {number + 1}: the symbol is {symbol!r:.40}, must be {str(number)!r}. Units must be in "
                "numeric order; a model with another order must be trained again on a sorted dictionary."
            )
    if len(symbols) + vocab.UNIT_OFFSET != vocab_size:
        raise ConvertError(
            f"{path} has {len(symbols)} symbols, but the model has {vocab_size} with {vocab.UNIT_OFFSET} specials. "
            "Give the dictionary that the model was trained with, --dict=dict.txt."
        )


def decoder_config(checkpoint: Checkpoint) -> UnitLMConfig:
    """Sizes from the tensors; the number of heads from the options.

    Raises:
      ConvertError: no decoder, or options that contradict the tensors.
    """
    tensors, options = checkpoint.tensors, checkpoint.options
    embed, inner = tensors.get(_EMBED), tensors.get("decoder.layers.0.fc1.weight")
    if embed is None or inner is None or len(embed.shape) != 2 or len(inner.shape) != 2:
        raise ConvertError(f"{checkpoint.path} is not a unit LM: it lacks {_EMBED} or decoder.layers.0.fc1.weight.")
    numbers = [int(found[1]) for name in tensors if (found := re.match(r"decoder\.layers\.(\d{1,6})\.", name))]
    sizes: dict[str, Any] = {
        "dim": embed.shape[1],
        "layers": max(numbers) + 1,
        "ffn_dim": inner.shape[0],
        "heads": options.get(SIZES["heads"]),
    }
    expected = {option: sizes[field] for field, option in SIZES.items()}
    expected |= dict.fromkeys(("decoder_input_dim", "decoder_output_dim"), sizes["dim"])
    for option, size in expected.items():
        value = options.get(option, size)
        if value is not None and type(value) is not int:
            raise ConvertError(f"{checkpoint.path}: {option} is {shown(value)}, must be an integer.")
        if value != size:
            raise ConvertError(f"{checkpoint.path}: {option} is {shown(value)}, but its tensors say {shown(size)}.")
    try:
        return UnitLMConfig(vocab_size=embed.shape[0], **sizes)
    except ValueError as error:
        raise ConvertError(f"{checkpoint.path}: {error}.") from error


def as_checkpoint(source: str | Path | Checkpoint, heads: int | None) -> Checkpoint:
    """Read `source` unless it is a Checkpoint; `heads` overrides the option."""
    if isinstance(source, Checkpoint):
        return source
    return read_checkpoint(source, None if heads is None else {SIZES["heads"]: heads})


def import_decoder(checkpoint: Checkpoint, config: UnitLMConfig) -> Params:
    """The layers that GSLM and pGSLM share: "embed" (rows as in the file), "layers", "final_norm" (docs/design.md).

    Raises:
      ConvertError: a missing tensor, or one of another shape.
    """
    d, f = config.dim, config.ffn_dim
    sizes = {"ffn_in": (f, d), "ffn_out": (d, f)}

    def stack(part: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        names = [f"decoder.layers.{layer}.{part}.{kind}" for layer in range(config.layers)]
        return np.stack([np.ascontiguousarray(load(checkpoint, name, shape).T) for name in names])

    layers: Params = {}
    for ours, theirs in tqdm(_LAYER_PARTS.items(), desc="tensors", unit="part", leave=False, delay=2):
        if ours.endswith("_norm"):
            layers[ours] = {"scale": stack(theirs, "weight", (d,)), "bias": stack(theirs, "bias", (d,))}
        else:
            shape = sizes.get(ours, (d, d))
            layers[ours] = {"kernel": stack(theirs, "weight", shape), "bias": stack(theirs, "bias", shape[:1])}
    return {
        "embed": load(checkpoint, _EMBED, (config.vocab_size, d)),
        "layers": layers,
        "final_norm": {
            "scale": load(checkpoint, "decoder.layer_norm.weight", (d,)),
            "bias": load(checkpoint, "decoder.layer_norm.bias", (d,)),
        },
    }


def import_unit_lm(
    source: str | Path | Checkpoint, dictionary: str | Path | None = None, heads: int | None = None
) -> tuple[UnitLMConfig, Params]:
    """Import a fairseq `transformer_lm` checkpoint of GSLM's architecture.

    Args:
      source: checkpoint_best.pt, in float32 or half precision; or a Checkpoint.
      dictionary: dict.txt; None for the one beside `source`.
      heads: attention heads, for a path to a checkpoint without that option.

    Returns:
      Config; the `lm` tree of docs/design.md in float32, kernels [in, out], layers stacked.

    Raises:
      ConvertError: another architecture, a missing or unknown tensor, a wrong shape, an untied output projection, a
        dictionary out of order.
    """
    checkpoint = as_checkpoint(source, heads)
    check_kind(checkpoint, "unit_lm")
    check_architecture(checkpoint)
    config = decoder_config(checkpoint)
    check_dictionary(dictionary or checkpoint.path.with_name("dict.txt"), config.vocab_size)
    params = import_decoder(checkpoint, config)
    embed = params["embed"]
    if OUTPUT in checkpoint.tensors and not np.array_equal(load(checkpoint, OUTPUT, embed.shape), embed):
        raise ConvertError(
            f"{checkpoint.path}: {OUTPUT} differs from {_EMBED}; spjax supports only tied output embeddings. "
            "Such a model cannot be imported."
        )
    check_leftover(checkpoint, "Only GSLM's architecture is imported; for prompts use `spjax.convert prompt`.")
    return config, params
