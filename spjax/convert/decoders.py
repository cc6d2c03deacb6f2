"""Import unit LMs from Hugging Face folders: LLaMA, Mistral, Qwen2 and OPT, also as slamkit's and TWIST's.

A family is a function from its config.json to fields of `UnitLMConfig`, and a map from our names to its tensors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from spjax import vocab
from spjax.convert import ConvertError, why
from spjax.convert.checkpoint import provenance
from spjax.convert.huggingface import Reader, Tensors, read_config, read_tensors, weights_of
from spjax.convert.options import Options
from spjax.convert.safe_pickle import shown
from spjax.io import files
from spjax.models.config import UnitLMConfig
from spjax.types import Params

# Our tensors ← those of transformers. Kernels are transposed.
LLAMA = {
    "embed": "model.embed_tokens",
    "layers/attn_norm": "model.layers.{}.input_layernorm",
    "layers/query": "model.layers.{}.self_attn.q_proj",
    "layers/key": "model.layers.{}.self_attn.k_proj",
    "layers/value": "model.layers.{}.self_attn.v_proj",
    "layers/out": "model.layers.{}.self_attn.o_proj",
    "layers/ffn_norm": "model.layers.{}.post_attention_layernorm",
    "layers/ffn_in": "model.layers.{}.mlp.up_proj",
    "layers/ffn_gate": "model.layers.{}.mlp.gate_proj",
    "layers/ffn_out": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "heads/unit": "lm_head",
}
OPT = {
    "embed": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "embed_in": "model.decoder.project_in",
    "embed_out": "model.decoder.project_out",
    "layers/attn_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "layers/query": "model.decoder.layers.{}.self_attn.q_proj",
    "layers/key": "model.decoder.layers.{}.self_attn.k_proj",
    "layers/value": "model.decoder.layers.{}.self_attn.v_proj",
    "layers/out": "model.decoder.layers.{}.self_attn.out_proj",
    "layers/ffn_norm": "model.decoder.layers.{}.final_layer_norm",
    "layers/ffn_in": "model.decoder.layers.{}.fc1",
    "layers/ffn_out": "model.decoder.layers.{}.fc2",
    "final_norm": "model.decoder.final_layer_norm",
    "heads/unit": "lm_head",
}
_MOST_TOKENS = 1 << 24  # far more than any vocabulary; the map from units to tokens must fit into memory
_OPT_OFFSET = 2  # unused rows at the start of OPT's position table
_UNUSED = r".*\.rotary_emb\.inv_freq"  # older files hold these numbers, which follow from the config


def _gated(options: Options, *, qkv: bool, out: bool, ffn: bool) -> dict[str, Any]:
    """Fields of the LLaMA block, with biases as given."""
    _only(options, {"hidden_act": "silu", "sliding_window": None})
    layers = options.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
        _refuse(options, "layer_types", "full_attention in every layer")
    return {
        "dim": options.get("hidden_size"),
        "layers": options.get("num_hidden_layers"),
        "heads": options.get("num_attention_heads"),
        "ffn_dim": options.get("intermediate_size"),
        "kv_heads": options.get("num_key_value_heads") or 0,
        "head_width": options.get("head_dim") or 0,
        "norm": "rms",
        "norm_eps": options.assume("rms_norm_eps", 1e-6),
        "positions": "rotary",
        **_rotary(options),
        "qkv_bias": qkv,
        "out_bias": out,
        "ffn_bias": ffn,
        "activation": "swiglu",
        "tied": options.assume("tie_word_embeddings", False),
        "scale_embedding": False,
    }


def llama(options: Options) -> dict[str, Any]:
    """Fields of a LLaMA."""
    bias = options.assume("attention_bias", False)
    return _gated(options, qkv=bias, out=bias, ffn=options.assume("mlp_bias", False))


def mistral(options: Options) -> dict[str, Any]:
    """Fields of a Mistral whose sliding window, if it has one, covers every position."""
    window, longest = options.get("sliding_window"), options.get("max_position_embeddings")
    if isinstance(window, int) and isinstance(longest, int) and window >= longest:
        options.found["sliding_window"] = None
    return _gated(options, qkv=False, out=False, ffn=False)


def qwen2(options: Options) -> dict[str, Any]:
    """Fields of a Qwen2 without sliding windows."""
    _only(options, {"use_sliding_window": False, "use_mrope": False})
    options.found["sliding_window"] = None  # has no effect without the other
    return _gated(options, qkv=True, out=False, ffn=False)


def opt(options: Options) -> dict[str, Any]:
    """Fields of an OPT; that of 350 M parameters is post-norm and projects its embeddings."""
    _only(options, {"_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True})
    activation, dim = options.assume("activation_function", "relu"), options.get("hidden_size")
    if activation not in ("relu", "gelu"):
        _refuse(options, "activation_function", "'relu' or 'gelu'")
    bias = options.assume("enable_bias", True)
    return {
        "dim": dim,
        "layers": options.get("num_hidden_layers"),
        "heads": options.get("num_attention_heads"),
        "ffn_dim": options.get("ffn_dim"),
        "embed_dim": options.get("word_embed_proj_dim") or 0,
        "pre_norm": options.assume("do_layer_norm_before", True),
        "positions": "learned",
        "max_positions": options.get("max_position_embeddings"),
        "qkv_bias": bias,
        "out_bias": bias,
        "ffn_bias": bias,
        "activation": activation,
        "tied": options.assume("tie_word_embeddings", True),
        "scale_embedding": False,
    }


# model_type → config function, name map
FAMILIES: dict[str, tuple[Callable[[Options], dict[str, Any]], dict[str, str]]] = {
    "llama": (llama, LLAMA),
    "mistral": (mistral, LLAMA),
    "qwen2": (qwen2, LLAMA),
    "opt": (opt, OPT),
}

# Options of any model that do not affect the outputs, or that are read below.
_IGNORED = re.compile(
    r"architectures|model_type|base_model_name|twist_init|_name_or_path|transformers_version|torch_dtype|dtype|"
    r"use_cache|initializer_range|init_std|.*dropout|layerdrop|(bos|eos|pad|sep|decoder_start)_token_id|prefix|"
    r"forced_(bos|eos)_token_id|vocab_size|offset|tokenizer_class|_?attn_implementation.*|trust_remote_code|"
    r"use_safetensors|return_dict|output_(hidden_states|attentions|scores)|torchscript|use_bfloat16|tf_legacy_loss|"
    r"chunk_size_feed_forward|finetuning_task|id2label|label2id|problem_type|task_specific_params|"
    r"(max|min)_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_[kp]|"
    r"typical_p|.*repetition_penalty|.*length_penalty|(encoder_)?no_repeat_ngram_size|bad_words_ids|"
    r"num_return_sequences|return_dict_in_generate|remove_invalid_values|(begin_)?suppress_tokens|"
    r"cross_attention_hidden_size|tie_encoder_decoder|is_decoder|max_position_embeddings|max_window_layers|"
    r"pretraining_tp|output_projection|max_sequence_length"
)
_FIXED = {"is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {}}


def _refuse(options: Options, name: str, computed: str) -> None:
    raise ConvertError(
        f"{options.path.with_name('config.json')} has {name}={shown(options.get(name))}; spjax computes only "
        f"{computed}. Such a model cannot be imported."
    )


def _only(options: Options, values: Mapping[str, Any]) -> None:
    """Refuse options that have other values than these; absent and null ones are accepted."""
    for name, value in values.items():
        if options.get(name, value) not in (value, None):
            _refuse(options, name, f"{name}={value!r}")


def _rotary(options: Options) -> dict[str, Any]:
    """Base and scaling of rotary positions, in the form of transformers 5 (`rope_parameters`) or of earlier ones."""
    where = "rope_scaling" if options.get("rope_parameters") is None else "rope_parameters"
    stated = options.get(where) or {}
    if not isinstance(stated, dict):
        _refuse(options, where, "an object of its settings")
    rest = {"rope_theta": options.get("rope_theta"), **stated}
    kind = rest.pop("rope_type", None) or rest.get("type", "default")
    rest.pop("type", None)
    theta, share = rest.pop("rope_theta"), rest.pop("partial_rotary_factor", 1.0)
    theta = options.assume("rope_theta", 10_000.0) if theta is None else theta
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in tuple(names) or share != 1 or rest.keys() - {*names[kind], "original_max_position_embeddings"}:
        _refuse(options, where, f"the kinds {', '.join(names)} with their own settings, of all dimensions")
    if missing := [name for name in names[kind] if name not in rest]:
        raise ConvertError(f"{options.path.with_name('config.json')}: {where} lacks {', '.join(missing)}. Add it.")
    used = {name.replace("max_position_embeddings", "positions"): rest[name] for name in names[kind]}
    return {"rope_theta": theta, "rope_scaling": {"kind": kind, **used} if used else None}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What the user says about a source's vocabulary; None: as its files say.

    Attributes:
      units: number of units.
      first_unit: token of unit 0; the others follow.
      pad, opener: the padding token, and the token that opens a row.
      unit_tokens: name of a unit's token in the tokenizer, with {} for the unit's number.
    """

    units: int | None = None
    first_unit: int | None = None
    pad: int | None = None
    opener: int | None = None
    unit_tokens: str | None = None


def import_decoder(
    source: str | Path, tokens: Tokens | None = None, given: Mapping[str, Any] | None = None
) -> tuple[UnitLMConfig, Params, dict[str, Any], list[str]]:
    """Import a unit LM from a Hugging Face folder; no code named in a file is imported or run.

    Args:
      source: directory of config.json and model.safetensors or pytorch_model.bin, each in shards or not.
      tokens: map of the vocabulary, where the files do not say.
      given: options that config.json lacks.

    Returns:
      Config; the `lm` tree of docs/design.md in float32, with the rows of the units and of opener and padding;
      provenance; remarks for the user, a sentence each.

    Raises:
      ConvertError: unreadable; an unknown family, option or tensor; an option with a value that spjax does not compute;
        a tensor that is missing, of a wrong shape or not finite; no map of the vocabulary, or one that does not fit.
    """
    path = weights_of(Path(source))
    card = read_config(path.with_name("config.json"))
    inner = card.get("base_config") if card.get("model_type") == "speech_language_model" else card
    kind = inner.get("model_type") if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or not isinstance(kind, str) or kind not in FAMILIES:
        raise ConvertError(
            f"{path.with_name('config.json')} has the model_type {kind!r:.80}; unit LMs of {', '.join(FAMILIES)} can "
            "be imported, also as base_config of a slamkit model."
        )
    size = card.get("vocab_size", inner.get("vocab_size"))
    if type(size) is not int or not 0 < size <= _MOST_TOKENS:
        raise ConvertError(
            f"{path.with_name('config.json')}: vocab_size is {size!r:.80}, must be an integer of 1..{_MOST_TOKENS}. "
            "Take it from the model's source again."
        )
    make, names = FAMILIES[kind]
    options = Options(path, inner, given)
    _only(options, _FIXED)
    fields = make(options)
    rows = token_rows(path.parent, card, inner, size, tokens or Tokens())
    absent = tuple(np.flatnonzero(rows < 0).tolist())
    config = _config(options, fields, len(rows), absent)
    tensors = read_tensors(path, skip=_UNUSED)
    read = Reader(path, tensors, f"a unit LM of the {kind} family")
    params = _tree(read, _prefix(path, tensors, names["embed"]), names, config, rows, size)
    read.leftover(_UNUSED, f"models of {', '.join(FAMILIES)} for language modelling")
    origin = {**provenance(path, f"{kind} (Hugging Face)"), **options.record()}
    units = rows[vocab.UNIT_OFFSET :]
    origin["tokens"] = {"opener": int(rows[config.opener]), "first_unit": int(units[0]), "units": len(units)}
    note = (
        f"Rows open with token {rows[config.opener]}; unit 0 is token {units[0]}, unit {len(units) - 1} is token "
        f"{units[-1]}; {size - (rows >= 0).sum()} other tokens are left out."
    )
    return config, params, origin, [note, *options.remarks("transformers")]


def _config(options: Options, fields: dict[str, Any], size: int, absent: tuple[int, ...]) -> UnitLMConfig:
    card = options.path.with_name("config.json")
    if unknown := sorted(name for name in options.found if name not in options.asked and not _IGNORED.fullmatch(name)):
        raise ConvertError(
            f"{card} has options that spjax does not know: {', '.join(unknown[:8])}. If they do not change what the "
            "model computes, remove them from the file."
        )
    options.check_given()
    if missing := [name for name, value in fields.items() if value is None and name != "rope_scaling"]:
        raise ConvertError(f"{card} lacks the options for {', '.join(missing)}. Take it from the model's source again.")
    try:
        return UnitLMConfig(vocab_size=size, absent=absent, **fields)
    except ValueError as error:
        raise ConvertError(f"{card}: {error}.") from error


def token_rows(place: Path, card: Mapping[str, Any], inner: Mapping[str, Any], size: int, given: Tokens) -> np.ndarray:
    """The source's token for each of ours, int [V]; -1 for specials that the source lacks.

    Args:
      place: directory of the model; a tokeniser_config.json (slamkit) or tokenizer.json there is read.
      card, inner: config.json, and the part of it that describes the decoder.
      size: size of the source's vocabulary.
      given: takes precedence over the files.

    Raises:
      ConvertError: no first unit or opener is known, or the map does not fit the vocabulary.
    """
    known: dict[str, Any] = {name: inner.get(f"{name}_token_id") for name in ("pad", "bos")}
    known = {name: None if token == -1 else token for name, token in known.items()}  # as some LLaMAs write it
    if card is not inner:  # slamkit: specials, then units
        stated = place / "tokeniser_config.json"
        more = read_config(stated) if stated.is_file() else {}
        for name, option, usual in (("pad", "pad_token_id", 0), ("bos", "bos_eos_token_id", 1)):
            token = more.get(option, usual if known[name] is None else known[name])
            if type(token) is not int or token < 0:
                file = stated if option in more else place / "config.json"
                raise ConvertError(
                    f"{file}: the token {name} is {token!r:.80}, must be an integer of at least 0. Take the file from "
                    "the model's source again."
                )
            known[name] = token
        known |= {"first_unit": max(known["pad"], known["bos"]) + 1, "units": more.get("num_units")}
    elif "offset" in card:  # TWIST: unit u is token offset + u
        known["first_unit"] = card["offset"]
    values = {
        "first_unit": known.get("first_unit") if given.first_unit is None else given.first_unit,
        "units": known.get("units") if given.units is None else given.units,
        "pad": known["pad"] if given.pad is None else given.pad,
        "opener": known["bos"] if given.opener is None else given.opener,
    }
    for name, value in values.items():
        if value is not None and (type(value) is not int or value < 0):
            raise ConvertError(f"{place}: {name} is {shown(value)}, must be an integer of at least 0.")
        if name in ("pad", "opener") and value is not None and value >= size:
            raise ConvertError(
                f"{place} has {size} tokens, but {name} is {value!r:.80}. Give --{name}=TOKEN of 0..{size - 1}."
            )
    if given.unit_tokens is not None:
        if given.first_unit is not None:
            raise ConvertError("--unit-tokens and --first-unit both say which tokens are units. Give one of them.")
        units = _named_units(place, given.unit_tokens, values["units"], size)
    elif values["first_unit"] is None:
        raise ConvertError(
            f"{place} does not say which tokens are units. Give --first-unit=TOKEN (and --units=N, if others follow "
            "them), or their name in its tokenizer, such as --unit-tokens='<|u{}|>'."
        )
    else:
        first = values["first_unit"]
        count = size - first if values["units"] is None else values["units"]
        if count < 1 or first + count > size:
            raise ConvertError(
                f"{place} has {size} tokens, but {max(count, 0)!r:.80} units from token {first!r:.80} were asked for. "
                "Give --units and --first-unit that fit."
            )
        units = np.arange(first, first + count)
    if values["opener"] is None:
        raise ConvertError(f"{place} does not say which token opens a row. Give it: --opener=TOKEN.")
    specials = {vocab.EOS: values["opener"]} | ({} if values["pad"] is None else {vocab.PAD: values["pad"]})
    rows = np.concatenate([[specials.get(token, -1) for token in range(vocab.UNIT_OFFSET)], units])
    if np.isin(list(specials.values()), units).any():
        raise ConvertError(
            f"{place}: opener {values['opener']} or padding {values['pad']} is also a unit (tokens {units.min()}.."
            f"{units.max()}). Give --opener and --pad."
        )
    return rows


def _named_units(place: Path, template: str, count: int | None, size: int) -> np.ndarray:
    """Tokens of the units by their names in the tokenizer's files. `size`: of the vocabulary."""
    if template.count("{}") != 1:
        raise ConvertError(f"--unit-tokens={template} must hold {{}} once, where the unit's number is.")
    by_name: dict[str, Any] = {}
    for file in ("vocab.json", "added_tokens.json", "tokenizer.json"):
        found = read_config(place / file) if (place / file).is_file() else {}
        try:
            if file == "tokenizer.json" and found:
                pieces, added = found["model"]["vocab"], found.get("added_tokens", [])
                if isinstance(pieces, list):  # (piece, score) each
                    pieces = {piece: token for token, (piece, _) in enumerate(pieces)}
                found = {**pieces, **{token["content"]: token["id"] for token in added}}
            by_name |= found
        except (KeyError, TypeError, ValueError) as error:
            raise ConvertError(
                f"{place / file} is not a tokenizer's ({why(error)}). Take it from its source."
            ) from error
    if not by_name:
        raise ConvertError(f"{place} has no tokenizer.json. Copy it there, or give --first-unit and --units.")
    units: dict[int, str] = {}
    while (count is None or len(units) < count) and (name := template.replace("{}", str(len(units)))) in by_name:
        token = by_name[name]
        if type(token) is not int or not 0 <= token < size:
            raise ConvertError(
                f"{place}: {name} is token {token!r:.80} of the tokenizer, must be an integer of 0..{size - 1}. Take "
                "the tokenizer from its source again."
            )
        if token in units:
            raise ConvertError(
                f"{place}: {units[token]} and {name} are both token {token} of the tokenizer. Give each unit its token."
            )
        units[token] = name
    if not units or (count is not None and len(units) < count):
        raise ConvertError(f"{place} has no token {template.replace('{}', str(len(units)))}. Check --unit-tokens.")
    return np.asarray(list(units))


def _prefix(path: Path, tensors: Tensors, embed: str) -> str:
    """What stands before transformers' names; slamkit puts `lm.` there."""
    found = [name.removesuffix(f"{embed}.weight") for name in tensors if name.endswith(f"{embed}.weight")]
    if len(found) != 1:
        raise ConvertError(
            f"{path} has {len(found)} tensors {embed}.weight, must have one (it has {', '.join(list(tensors)[:3])}). "
            "Give a model for language modelling."
        )
    return found[0]


def _tree(
    read: Reader, prefix: str, names: Mapping[str, str], config: UnitLMConfig, rows: np.ndarray, size: int
) -> Params:
    """The `lm` tree. `rows` as from `token_rows`; `size`: of the source's vocabulary."""

    def vocabulary(name: str, width: int) -> np.ndarray:
        """Rows of our tokens; zero for those that the source lacks."""
        return np.where(rows[:, None] >= 0, read(name, (size, width))[rows], 0).astype(np.float32)

    def one(path: str, shape: tuple[int, ...], layer: int | str = "") -> np.ndarray:
        part, _, leaf = path.rpartition("/") if path not in names else (path, "", "weight")
        name = f"{prefix}{names[part].format(layer)}.{'bias' if leaf == 'bias' else 'weight'}"
        if part in ("embed", "heads/unit"):
            return vocabulary(name, shape[1])
        if part == "positions":
            return read(name, (shape[0] + _OPT_OFFSET, shape[1]))[_OPT_OFFSET:]
        return np.ascontiguousarray(read(name, shape[::-1]).T)

    flat = {}
    for path, shape in tqdm(config.shapes.items(), desc="tensors", leave=False, delay=2):
        if path.startswith("layers/"):
            flat[path] = np.stack([one(path, shape[1:], layer) for layer in range(config.layers)])
        else:
            flat[path] = one(path, shape)
    head, embed = f"{prefix}{names['heads/unit']}.weight", flat["embed"]
    if config.tied and head in read.tensors and not np.array_equal(vocabulary(head, embed.shape[1]), embed):
        raise ConvertError(
            f"{read.path}: {head} differs from the token embeddings, but tie_word_embeddings is true. Set it to false "
            "in config.json, if the model was trained so."
        )
    return files.unflatten(flat)
