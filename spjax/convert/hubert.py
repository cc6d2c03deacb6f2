"""Import HuBERTs of fairseq, and HuBERT, wav2vec2 and WavLM of Hugging Face. Every tensor must be known."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from spjax.convert import ConvertError
from spjax.convert.checkpoint import check_kind, provenance, read_checkpoint
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
from spjax.io import kinds
from spjax.models.hubert_config import HubertConfig
from spjax.types import Params


@dataclasses.dataclass(frozen=True)
class Dialect:
    """A library's names for the tensors and options of a HuBERT.

    Attributes:
      title: name of the library.
      names: our name → theirs, without `.kernel`, `.scale` and `.bias`; `{}` is the number of a layer.
      mix: alternative names of (magnitude, direction) of the positional convolution's weight norm.
      unused: pattern of tensors that features do not depend on: masking, pretraining targets, heads.
      sizes: our field → their option.
      choices: our field → their option, and their value → ours.
      needed: other options that change what is computed, with the only value that spjax supports.
      unseen: those options that must be given, since tensors do not reveal them and every version wrote them.
    """

    title: str
    names: Mapping[str, str]
    mix: tuple[tuple[str, str], ...]
    unused: str
    sizes: Mapping[str, str]
    choices: Mapping[str, tuple[str, Mapping[Any, Any]]]
    needed: Mapping[str, Any]
    unseen: tuple[str, ...]


_EITHER = {False: False, True: True}
_KINDS = {"hubert": "HuBERT", "wav2vec2": "wav2vec2", "wavlm": "WavLM"}  # by model_type
_MODEL = "a HuBERT, wav2vec2 or WavLM"

FAIRSEQ = Dialect(
    title="fairseq",
    names={
        "conv": "feature_extractor.conv_layers.{}.0",
        "conv_norm": "feature_extractor.conv_layers.0.2",
        "conv_layer_norm": "feature_extractor.conv_layers.{}.2.1",
        "project_norm": "layer_norm",
        "project": "post_extract_proj",
        "position": "encoder.pos_conv.{}",
        "position_norm": "encoder.pos_conv.0",
        "norm": "encoder.layer_norm",
        "query": "encoder.layers.{}.self_attn.q_proj",
        "key": "encoder.layers.{}.self_attn.k_proj",
        "value": "encoder.layers.{}.self_attn.v_proj",
        "out": "encoder.layers.{}.self_attn.out_proj",
        "attn_norm": "encoder.layers.{}.self_attn_layer_norm",
        "ffn_in": "encoder.layers.{}.fc1",
        "ffn_out": "encoder.layers.{}.fc2",
        "ffn_norm": "encoder.layers.{}.final_layer_norm",
    },
    mix=(("weight_g", "weight_v"),),
    unused=r"mask_emb|label_embs_concat|final_proj\.(weight|bias)|.*\.num_batches_tracked",
    sizes={
        "dim": "encoder_embed_dim",
        "layers": "encoder_layers",
        "heads": "encoder_attention_heads",
        "ffn_dim": "encoder_ffn_embed_dim",
        "position_width": "conv_pos",
        "position_groups": "conv_pos_groups",
    },
    choices={
        "conv_layer_norm": ("extractor_mode", {"default": False, "layer_norm": True}),
        "pre_norm": ("layer_norm_first", _EITHER),
        "conv_bias": ("conv_bias", _EITHER),
        "position_norm": ("conv_pos_batch_norm", _EITHER),
        "wave_eps": ("normalize", {False: 0.0, True: 1e-5}),  # of the task
    },
    needed={
        "activation_fn": "gelu",
        "layer_type": "transformer",
        "pos_conv_depth": 1,
        "attn_type": "",
        "pos_enc_type": "abs",
    },
    unseen=("layer_norm_first", "activation_fn", "normalize"),
)

HUGGING_FACE = Dialect(
    title="Hugging Face",
    names={
        "conv": "feature_extractor.conv_layers.{}.conv",
        "conv_norm": "feature_extractor.conv_layers.0.layer_norm",
        "conv_layer_norm": "feature_extractor.conv_layers.{}.layer_norm",
        "project_norm": "feature_projection.layer_norm",
        "project": "feature_projection.projection",
        "position": "encoder.pos_conv_embed.conv",
        "position_norm": "encoder.pos_conv_embed.batch_norm",
        "norm": "encoder.layer_norm",
        "query": "encoder.layers.{}.attention.q_proj",
        "key": "encoder.layers.{}.attention.k_proj",
        "value": "encoder.layers.{}.attention.v_proj",
        "out": "encoder.layers.{}.attention.out_proj",
        "attn_norm": "encoder.layers.{}.layer_norm",
        "ffn_in": "encoder.layers.{}.feed_forward.intermediate_dense",
        "ffn_out": "encoder.layers.{}.feed_forward.output_dense",
        "ffn_norm": "encoder.layers.{}.final_layer_norm",
    },
    mix=(
        ("weight_g", "weight_v"),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ),
    unused=r"masked_spec_embed|mask_emb|layer_weights|label_embs_concat|"
    r"(lm_head|projector|classifier|final_proj|project_q|project_hid)(\.\w+)*\.(weight|bias)|quantizer\..*|"
    r".*\.num_batches_tracked",
    sizes={
        "dim": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "ffn_dim": "intermediate_size",
        "position_width": "num_conv_pos_embeddings",
        "position_groups": "num_conv_pos_embedding_groups",
    },
    choices={
        "conv_layer_norm": ("feat_extract_norm", {"group": False, "layer": True}),
        "pre_norm": ("do_stable_layer_norm", _EITHER),
        "conv_bias": ("conv_bias", _EITHER),
        "position_norm": ("conv_pos_batch_norm", _EITHER),
        "wave_eps": ("do_normalize", {False: 0.0, True: 1e-7}),
    },
    needed={
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "feat_proj_layer_norm": True,
        "layer_norm_eps": 1e-5,
    },
    unseen=("do_stable_layer_norm", "hidden_act", "layer_norm_eps"),
)


def import_hubert(source: str | Path, given: Mapping[str, Any] | None = None) -> Imported:
    """Import a HuBERT, a wav2vec2 or a WavLM; no code named in a file is imported or run.

    Args:
      source: fairseq's checkpoint of a HuBERT (hubert_base_ls960.pt); or the directory of a Hugging Face model, or its
        model.safetensors, the index of its shards or its pytorch_model.bin, with config.json beside it.
      given: options that neither the checkpoint nor config.json holds.

    Raises:
      ConvertError: unreadable; unknown options; another architecture; a tensor that is missing, unknown, of a wrong
        shape, or not finite.
    """
    path = Path(source)
    if path.is_dir():
        path = weights_of(path)
    notes: list[str] = []
    if path.suffix in (".safetensors", ".bin", ".json"):
        front = read_front_end(path.with_name("preprocessor_config.json"), {"sampling_rate": 16_000})
        stated = {**read_config(path.with_name("config.json")), "do_normalize": front.get("do_normalize")}
        dialect, options = HUGGING_FACE, Options(path, stated, given)
        tensors: Tensors = _without_prefix(path, read_tensors(path))
    else:
        checkpoint = read_checkpoint(path, given)
        check_kind(checkpoint, "hubert")
        dialect, options, tensors, notes = FAIRSEQ, checkpoint.options, checkpoint.tensors, checkpoint.notes
    kind = _KINDS.get(options.get("model_type") or "hubert" if dialect is HUGGING_FACE else "hubert", "")
    if not kind:
        raise ConvertError(
            f"{path} has model_type={shown(options.get('model_type'))}; spjax computes only {', '.join(_KINDS)}. "
            "Such a model cannot be imported."
        )
    fields = _fields(path, dialect, options)
    if dialect is HUGGING_FACE and fields["conv_layer_norm"]:
        options.require({"do_normalize": "true"})
    elif fields["wave_eps"] and "do_normalize" in options.found and "do_normalize" not in options.given:
        fields["wave_eps"] = 0.0
        notes.append(
            "do_normalize of preprocessor_config.json is not applied: the group norm removes offset and level."
        )
    if kind == "WavLM":
        options.require({"num_buckets": "320", "max_bucket_distance": "800"})
        fields |= {"buckets": options.get("num_buckets"), "max_distance": options.get("max_bucket_distance")}
    options.check_given()
    try:
        config = HubertConfig(**fields)
    except ValueError as error:
        raise ConvertError(f"{path}: {error}.") from error
    read = Reader(path, tensors, _MODEL)
    params = _tree(read, dialect, config)
    # The last norm of `pre_norm` models follows the last layer, whose output is returned without it.
    unused = rf"{dialect.unused}|encoder\.layer_norm\..*" if config.pre_norm else dialect.unused
    left, left_out = read.leftover(unused, f"{_MODEL} of these options")
    origin = {**provenance(path, f"{kind} ({dialect.title})"), **options.record()}
    if notes := [*notes, *options.remarks(dialect.title)]:
        origin["notes"] = notes
    name = model_name(path, options.get("_name_or_path"))
    return Imported(config, params, path, dialect.title, read.count(read.used), left, kind, name, origin, left_out)


def _without_prefix(path: Path, tensors: Tensors) -> Tensors:
    """Tensor names without `hubert.` or the like, which models with a head have."""
    bare = {re.sub(rf"^({'|'.join(_KINDS)})\.", "", name): tensor for name, tensor in tensors.items()}
    if len(bare) != len(tensors):
        raise ConvertError(f"{path} has tensors twice, with a prefix such as `hubert.` and without.")
    if not any(name.startswith("feature_projection.") for name in bare):
        todo = kinds.describe(path.parent)[1]
        raise ConvertError(
            f"{path} is not {_MODEL} of Hugging Face: it has no feature_projection, but {', '.join(list(bare)[:3])}. "
            f"{'Give one.' if any(f'convert {kind} ' in todo for kind in _KINDS) else todo}"
        )
    return bare


def _convolutions(path: Path, text: Any) -> dict[str, tuple[int, ...]]:
    """fairseq's list of convolutions as Hugging Face's three options."""
    layers: list[tuple[int, ...]] = []
    for term in re.sub(r"\s", "", text).split("+") if isinstance(text, str) else [""]:
        match = re.fullmatch(r"\[((?:\(\d{1,6},\d{1,6},\d{1,6}\),?)+)\](?:\*(\d{1,2}))?", term)
        if not match:
            raise ConvertError(
                f"{path}: conv_feature_layers is {shown(text)}, which is not supported. "
                "Expected is a sum of lists such as [(512,3,2)] * 4."
            )
        parts = [tuple(map(int, part.split(","))) for part in re.findall(r"\(([^)]*)\)", match[1])]
        layers += parts * int(match[2] or 1)
    return dict(zip(_CONVOLUTIONS, zip(*layers, strict=True), strict=True))


_CONVOLUTIONS = ("conv_dim", "conv_kernel", "conv_stride")
_BASE = dataclasses.asdict(HubertConfig())  # values of hubert_base_ls960, as examples in messages


def _fields(path: Path, dialect: Dialect, options: Options) -> dict[str, Any]:
    """Fields of HubertConfig, but those of WavLM."""
    known = {name: {value: value} for name, value in dialect.needed.items()} | dict(dialect.choices.values())
    required = {name: str(next(iter(known[name]))).lower() for name in dialect.unseen}
    if dialect is FAIRSEQ:
        required["conv_feature_layers"] = "'[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2'"
    for name, values in known.items():
        value = options.get(name)  # None: required or assumed below, or shown by the tensors
        if value is not None and not any(type(value) is type(one) and value == one for one in values):
            raise ConvertError(
                f"{path} was made with {name}={shown(value)}; spjax computes only {name}="
                f"{' or '.join(map(repr, values))}. Such a model cannot be imported."
            )
    fields: dict[str, Any] = {ours: options.get(theirs) for ours, theirs in dialect.sizes.items()}
    options.require(
        required | {dialect.sizes[name]: str(_BASE[name]) for name, value in fields.items() if value is None}
    )
    if dialect is HUGGING_FACE:
        options.assume("feat_extract_activation", "gelu")
    for ours, (theirs, values) in dialect.choices.items():
        value = options.get(theirs)
        fields[ours] = values[next(iter(values)) if value is None else value]
    convs: dict[str, Any] = (
        _convolutions(path, options.get("conv_feature_layers"))
        if dialect is FAIRSEQ
        else {name: options.get(name) for name in _CONVOLUTIONS}
    )
    if not all(isinstance(value, list | tuple) and value for value in convs.values()):
        raise ConvertError(f"{path} does not say its {', '.join(convs)}. Give its config.json.")
    dims = convs["conv_dim"]
    if len(set(map(str, dims))) > 1 or len(dims) != len(convs["conv_kernel"]):
        raise ConvertError(f"{path}: conv_dim is {shown(tuple(dims))}; spjax supports only convolutions of one width.")
    kernels, strides = tuple(convs["conv_kernel"]), tuple(convs["conv_stride"])
    return {**fields, "conv_dim": dims[0], "conv_kernels": kernels, "conv_strides": strides}


def _tree(read: Reader, dialect: Dialect, config: HubertConfig) -> Params:
    c, d = config.conv_dim, config.dim
    names, convs = dialect.names, range(len(config.conv_kernels))

    def layer(number: int) -> Params:
        tree = read.layer(names, number, d, config.ffn_dim)
        if config.buckets:
            tree["gate"] = _gate(read, names["query"].format(number).removesuffix(".q_proj"), config)
        return tree

    tree: Params = {
        "conv": {
            str(n): read.conv(names["conv"].format(n), config.conv_kernels[n], c if n else 1, c, config.conv_bias)
            for n in convs
        },
        "conv_norm": {str(n): read.norm(names["conv_layer_norm"].format(n), c) for n in convs}
        if config.conv_layer_norm
        else read.norm(names["conv_norm"], c),
        "project_norm": read.norm(names["project_norm"], c),
        "project": read.dense(names["project"], c, d),
        "position": _position(read, dialect, config),
        "layers": {str(n): layer(n) for n in tqdm(range(config.layers), desc="layers", leave=False, delay=2)},
    }
    if not config.pre_norm:
        tree["norm"] = read.norm(names["norm"], d)
    if config.position_norm:
        tree["position_norm"] = _batch_norm(read, names["position_norm"], d)
    if config.buckets:
        name = names["query"].format(0).replace("q_proj", "rel_attn_embed.weight")
        tree["relative"] = {"table": read(name, (config.buckets, config.heads))}
    return tree


def _position(read: Reader, dialect: Dialect, config: HubertConfig) -> Params:
    """The positional convolution, with its weight norm (over all dims but the width) folded in if it has one."""
    name, width, part = dialect.names["position"], config.position_width, config.dim // config.position_groups
    name = name.format(int(config.position_norm))  # in fairseq the batch norm comes first
    if config.position_norm:
        return read.conv(name, width, part, config.dim)
    found = [mix for mix in dialect.mix if f"{name}.{mix[1]}" in read.tensors]
    magnitude_name, direction_name = (found or dialect.mix)[0]
    magnitude = read(f"{name}.{magnitude_name}", (1, 1, width)).astype(np.float64)
    direction = read(f"{name}.{direction_name}", (config.dim, part, width)).astype(np.float64)
    length = np.sqrt(np.square(direction).sum(axis=(0, 1), keepdims=True))
    if not length.all():
        raise ConvertError(f"{read.path}: {name}.{direction_name} has a tap of zeros, which weight norm cannot scale.")
    kernel = (direction * (magnitude / length)).astype(np.float32)
    return {"kernel": np.ascontiguousarray(kernel.transpose(2, 1, 0)), "bias": read(f"{name}.bias", (config.dim,))}


def _batch_norm(read: Reader, name: str, dim: int) -> Params:
    """A batch norm with the statistics of its training, as scale and bias."""
    mean, variance = (read(f"{name}.running_{part}", (dim,)).astype(np.float64) for part in ("mean", "var"))
    given = read.norm(name, dim)
    if (variance < 0).any():
        raise ConvertError(f"{read.path}: {name}.running_var is negative. Give another checkpoint.")
    scale = given["scale"] / np.sqrt(variance + 1e-5)
    return {"scale": scale.astype(np.float32), "bias": (given["bias"] - mean * scale).astype(np.float32)}


def _gate(read: Reader, name: str, config: HubertConfig) -> Params:
    """The gate of WavLM's relative positions: its outputs are sums of four, which are folded into the kernel."""
    kernel = read(f"{name}.gru_rel_pos_linear.weight", (8, config.head_dim)).reshape(2, 4, -1).sum(1)
    bias = read(f"{name}.gru_rel_pos_linear.bias", (8,)).reshape(2, 4).sum(1)
    scale = read(f"{name}.gru_rel_pos_const", (1, config.heads, 1, 1)).reshape(-1)
    return {"kernel": np.ascontiguousarray(kernel.T), "bias": bias, "scale": scale}
