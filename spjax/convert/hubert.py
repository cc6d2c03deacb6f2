"""Import HuBERTs of fairseq and Hugging Face. Every tensor must be known."""

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
from spjax.convert.huggingface import Imported, Reader, Tensors, model_name, read_config, read_tensors, weights_of
from spjax.convert.options import Options
from spjax.convert.safe_pickle import shown
from spjax.io import files, kinds
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
      needed: options that change what is computed, with the only value that spjax supports.
      unseen: those options that must be given, since tensors do not reveal them and every version wrote them.
    """

    title: str
    names: Mapping[str, str]
    mix: tuple[tuple[str, str], ...]
    unused: str
    sizes: Mapping[str, str]
    needed: Mapping[str, Any]
    unseen: tuple[str, ...]


FAIRSEQ = Dialect(
    title="fairseq",
    names={
        "conv": "feature_extractor.conv_layers.{}.0",
        "conv_norm": "feature_extractor.conv_layers.0.2",
        "project_norm": "layer_norm",
        "project": "post_extract_proj",
        "position": "encoder.pos_conv.0",
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
    unused=r"mask_emb|label_embs_concat|final_proj\.(weight|bias)",
    sizes={
        "dim": "encoder_embed_dim",
        "layers": "encoder_layers",
        "heads": "encoder_attention_heads",
        "ffn_dim": "encoder_ffn_embed_dim",
        "position_width": "conv_pos",
        "position_groups": "conv_pos_groups",
    },
    needed={
        "extractor_mode": "default",
        "layer_norm_first": False,
        "conv_bias": False,
        "activation_fn": "gelu",
        "layer_type": "transformer",
        "conv_pos_batch_norm": False,
        "pos_conv_depth": 1,
        "attn_type": "",
        "pos_enc_type": "abs",
        "normalize": False,  # of the task: normalise waves to mean 0 and variance 1
    },
    unseen=("layer_norm_first", "activation_fn", "normalize"),
)

HUGGING_FACE = Dialect(
    title="Hugging Face",
    names={
        "conv": "feature_extractor.conv_layers.{}.conv",
        "conv_norm": "feature_extractor.conv_layers.0.layer_norm",
        "project_norm": "feature_projection.layer_norm",
        "project": "feature_projection.projection",
        "position": "encoder.pos_conv_embed.conv",
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
    r"(lm_head|projector|classifier|final_proj)(\.\w+)*\.(weight|bias)",
    sizes={
        "dim": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "ffn_dim": "intermediate_size",
        "position_width": "num_conv_pos_embeddings",
        "position_groups": "num_conv_pos_embedding_groups",
    },
    needed={
        "model_type": "hubert",
        "feat_extract_norm": "group",
        "do_stable_layer_norm": False,
        "conv_bias": False,
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "feat_proj_layer_norm": True,
        "conv_pos_batch_norm": False,
        "layer_norm_eps": 1e-5,
    },
    unseen=("do_stable_layer_norm", "hidden_act", "layer_norm_eps"),
)


def import_hubert(source: str | Path, given: Mapping[str, Any] | None = None) -> Imported:
    """Import a HuBERT; no code named in a file is imported or run.

    Args:
      source: fairseq's checkpoint (hubert_base_ls960.pt); or Hugging Face's model.safetensors or pytorch_model.bin with
        its config.json beside it, or the directory of both.
      given: options that neither the checkpoint nor config.json holds.

    Raises:
      ConvertError: unreadable; unknown options; another architecture (the large ones normalise differently); a tensor
        that is missing, unknown, of a wrong shape, or not finite.
    """
    path = Path(source)
    if path.is_dir():
        path = weights_of(path)
    if path.suffix in (".safetensors", ".bin", ".json"):
        dialect, options = HUGGING_FACE, Options(path, read_config(path.with_name("config.json")), given)
        tensors: Tensors = _without_prefix(path, read_tensors(path))
        notes: list[str] = []
    else:
        checkpoint = read_checkpoint(path, given)
        check_kind(checkpoint, "hubert")
        dialect, options, tensors = FAIRSEQ, checkpoint.options, checkpoint.tensors
        notes = checkpoint.notes
    config = _config(path, dialect, options)
    options.check_given()
    read = Reader(path, tensors, "a HuBERT of the base kind")
    params = _tree(read, dialect, config)
    left, left_out = read.leftover(dialect.unused, "HuBERTs of the base kind")
    count = sum(array.size for array in files.flatten(params).values())
    read_count = read.count(read.used)
    if count != config.num_params or read_count != count + config.position_width:
        raise ConvertError(
            f"{path}: {read_count:,} parameters were read as {count:,}, but a HuBERT of these sizes has "
            f"{config.num_params:,}. Such a model cannot be imported."
        )
    origin = {**provenance(path, f"HuBERT ({dialect.title})"), **options.record()}
    if notes := [*notes, *options.remarks(dialect.title)]:
        origin["notes"] = notes
    name = model_name(path, options.get("_name_or_path"))
    return Imported(config, params, path, dialect.title, read_count, left, name, origin, left_out)


def _without_prefix(path: Path, tensors: Tensors) -> Tensors:
    """Tensor names without `hubert.`, which models with a head have."""
    bare = {name.removeprefix("hubert."): tensor for name, tensor in tensors.items()}
    if len(bare) != len(tensors):
        raise ConvertError(f"{path} has tensors twice, with `hubert.` before their names and without.")
    if not any(name.startswith("feature_projection.") for name in bare):
        todo = kinds.describe(path.parent)[1]
        raise ConvertError(
            f"{path} is not a HuBERT of Hugging Face: it has no feature_projection, but {', '.join(list(bare)[:3])}. "
            f"{'Give one.' if 'convert hubert' in todo else todo}"
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


def _config(path: Path, dialect: Dialect, options: Options) -> HubertConfig:
    required = {name: str(dialect.needed[name]).lower() for name in dialect.unseen}
    if dialect is FAIRSEQ:
        required["conv_feature_layers"] = "'[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2'"
    for name, needed in dialect.needed.items():
        value = options.get(name)
        if value is None:  # required or assumed below, or shown by the tensors
            continue
        if value != needed or (isinstance(needed, bool) and not isinstance(value, bool)):
            raise ConvertError(
                f"{path} was made with {name}={shown(value)}; spjax computes only {name}={needed!r}, as in HuBERTs of "
                "base architecture. Such a model cannot be imported."
            )
    sizes: dict[str, Any] = {ours: options.get(theirs) for ours, theirs in dialect.sizes.items()}
    options.require(
        required | {dialect.sizes[name]: str(_BASE[name]) for name, value in sizes.items() if value is None}
    )
    if dialect is HUGGING_FACE:
        options.assume("feat_extract_activation", "gelu")
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
    try:
        return HubertConfig(
            conv_dim=dims[0],
            conv_kernels=tuple(convs["conv_kernel"]),
            conv_strides=tuple(convs["conv_stride"]),
            **sizes,
        )
    except ValueError as error:
        raise ConvertError(f"{path}: {error}.") from error


def _tree(read: Reader, dialect: Dialect, config: HubertConfig) -> Params:
    c, d, f = config.conv_dim, config.dim, config.ffn_dim

    def dense(name: str, rows: int, columns: int, number: int = 0) -> Params:
        theirs = dialect.names[name].format(number)
        kernel = read(f"{theirs}.weight", (columns, rows)).T
        return {"kernel": np.ascontiguousarray(kernel), "bias": read(f"{theirs}.bias", (columns,))}

    def norm(name: str, width: int, number: int = 0) -> Params:
        theirs = dialect.names[name].format(number)
        return {"scale": read(f"{theirs}.weight", (width,)), "bias": read(f"{theirs}.bias", (width,))}

    def conv(number: int, width: int) -> Params:
        kernel = read(f"{dialect.names['conv'].format(number)}.weight", (c, c if number else 1, width))
        return {"kernel": np.ascontiguousarray(kernel.transpose(2, 1, 0))}

    def layer(number: int) -> Params:
        tree = {name: dense(name, d, d, number) for name in ("query", "key", "value", "out")}
        tree |= {"ffn_in": dense("ffn_in", d, f, number), "ffn_out": dense("ffn_out", f, d, number)}
        return tree | {name: norm(name, d, number) for name in ("attn_norm", "ffn_norm")}

    convs = {str(number): conv(number, width) for number, width in enumerate(config.conv_kernels)}
    numbers = tqdm(range(config.layers), desc="layers", unit="layer", leave=False, delay=2)
    return {
        "conv": convs,
        "conv_norm": norm("conv_norm", c),
        "project_norm": norm("project_norm", c),
        "project": dense("project", c, d),
        "position": _position(read, dialect, config),
        "norm": norm("norm", d),
        "layers": {str(number): layer(number) for number in numbers},
    }


def _position(read: Reader, dialect: Dialect, config: HubertConfig) -> Params:
    """The positional convolution with its weight norm (over all dims but the width) folded in."""
    name, width, part = dialect.names["position"], config.position_width, config.dim // config.position_groups
    found = [mix for mix in dialect.mix if f"{name}.{mix[1]}" in read.tensors]
    magnitude_name, direction_name = (found or dialect.mix)[0]
    magnitude = read(f"{name}.{magnitude_name}", (1, 1, width)).astype(np.float64)
    direction = read(f"{name}.{direction_name}", (config.dim, part, width)).astype(np.float64)
    length = np.sqrt(np.square(direction).sum(axis=(0, 1), keepdims=True))
    if not length.all():
        raise ConvertError(f"{read.path}: {name}.{direction_name} has a tap of zeros, which weight norm cannot scale.")
    kernel = (direction * (magnitude / length)).astype(np.float32)
    return {"kernel": np.ascontiguousarray(kernel.transpose(2, 1, 0)), "bias": read(f"{name}.bias", (config.dim,))}
