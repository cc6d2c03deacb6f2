"""Options of a checkpoint: every pickled form is read alike, and missing options are requested."""

from __future__ import annotations

import argparse
import enum
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spjax.convert import ConvertError, fairseq
from spjax.convert.__main__ import main
from spjax.convert.checkpoint import read_checkpoint
from spjax.convert.options import parse, read_options
from spjax.io import read_unit_lm

Write = Callable[..., Path]


@pytest.fixture
def omega(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Classes that pickle like OmegaConf's: `wrap(value, version)` makes a config of nested dicts and lists."""
    made: dict[str, Any] = {}
    for package in ("omegaconf", "fairseq", "fairseq.dataclass"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for module, names in {
        "omegaconf.dictconfig": ("DictConfig",),
        "omegaconf.listconfig": ("ListConfig",),
        "omegaconf.base": ("ContainerMetadata", "Metadata"),
        "omegaconf.nodes": ("AnyNode", "StringNode", "IntegerNode", "BooleanNode", "FloatNode", "EnumNode"),
        "fairseq.dataclass.constants": ("Choice",),
    }.items():
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        for name in names:
            base = {"Choice": enum.Enum}.get(name)
            kind = (
                enum.Enum(name, {"relu": "relu", "gelu": "gelu"}, module=module)
                if base
                else type(name, (), {"__module__": module})
            )
            setattr(sys.modules[module], name, kind)
            made[name] = kind

    def instance(name: str, **state: Any) -> Any:
        value = made[name]()
        value.__dict__.update(state)
        return value

    def wrap(value: Any, version: str, parent: Any = None, typed: bool = False) -> Any:
        content = "content" if version == "1.4" else "_content"
        metadata = {} if version == "1.4" else {"_metadata": instance("ContainerMetadata", ref_type=Any, key=None)}
        if isinstance(value, dict | list):
            node = instance("DictConfig" if isinstance(value, dict) else "ListConfig", _parent=parent, **metadata)
            if isinstance(value, dict):
                inner: Any = {name: wrap(part, version, node, typed) for name, part in value.items()}
            else:
                inner = [wrap(part, version, node, typed) for part in value]
            node.__dict__[content] = inner
            return node
        if version == "1.4":
            return value
        kind = {str: "StringNode", bool: "BooleanNode", int: "IntegerNode"}.get(type(value), "AnyNode")
        if isinstance(value, enum.Enum):
            kind = "EnumNode"
        return instance(kind if typed else "AnyNode", _metadata=instance("Metadata"), _parent=parent, _val=value)

    return types.SimpleNamespace(wrap=wrap, instance=instance, **made)


@pytest.fixture
def write(torch_writer: types.SimpleNamespace, dictionary: Path, tiny_lm: dict[str, np.ndarray]) -> Write:
    """Write `tiny_lm` with options pickled by Python at a protocol, and other contents."""

    def bits(value: Any, protocol: int) -> Any:
        # The memo numbers of the parts must differ; the writer uses none.
        body = pickle.dumps(value, protocol)
        return torch_writer.Raw(body[2 if protocol > 1 else 0 : -1])

    def write(protocol: int = 2, model: Any = None, **parts: Any) -> Path:
        raw = {name: value if name == "extra_state" else bits(value, protocol) for name, value in parts.items()}
        content = {"model": tiny_lm if model is None else model, **raw}
        return torch_writer.zip(dictionary.with_name("checkpoint.pt"), content)

    return write


FORMS = (
    "args",
    "cfg of dicts",
    "cfg with a namespace",
    "cfg without sections",
    *(f"omegaconf {v}" for v in ("1.4", "2.0", "2.1")),
)


def shape(form: str, options: dict[str, Any], omega: types.SimpleNamespace) -> dict[str, Any]:
    nested = {"task": {"_name": "language_modeling", "seed": 1}, "model": {"_name": "transformer_lm_big", **options}}
    match form.split():
        case ["args"]:
            return {"args": argparse.Namespace(arch="transformer_lm_big", **options), "cfg": None}
        case ["cfg", "of", _]:
            return {"args": None, "cfg": nested}
        case ["cfg", "with", *_]:
            return {"args": None, "cfg": {**nested, "model": argparse.Namespace(**nested["model"])}}
        case ["cfg", "without", _]:
            return {"cfg": options}
        case [_, version]:
            return {"args": None, "cfg": omega.wrap(nested, version, typed=version == "2.1")}
    raise AssertionError(form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_every_form_is_read_alike(write: Write, omega, options, form: str, protocol: int):
    path = write(protocol, **shape(form, options, omega))
    found = read_checkpoint(path).options
    assert {name: found.get(name) for name in options} == options
    assert fairseq.import_unit_lm(path)[0].heads == 2


WRONG = {
    "activation_fn": "gelu",
    "decoder_normalize_before": False,
    "share_decoder_input_output_embed": False,
    "no_token_positional_embeddings": True,
    "decoder_learned_pos": True,
    "no_scale_embedding": True,
    "layernorm_embedding": True,
    "adaptive_input": True,
    "adaptive_softmax_cutoff": "1000,2000",
    "character_embeddings": True,
    "base_layers": 1,
    "scale_heads": True,
    "decoder_layers": 3,
    "decoder_embed_dim": 16,
    "decoder_output_dim": 16,
    "decoder_attention_heads": 3,
    "add_bos_token": True,
    "decoder_xformers_att_config": "{name: scaled_dot_product}",
}


@pytest.mark.parametrize("form", ["args", "cfg of dicts", "omegaconf 2.0", "omegaconf 2.1"])
def test_unsupported_options_are_refused_in_every_form(write: Write, omega, options, form: str):
    for name, value in WRONG.items():
        path = write(**shape(form, {**options, name: value}, omega))
        with pytest.raises(ConvertError, match=f"{name}|heads 3"):
            fairseq.import_unit_lm(path)


UNSEEN = (
    "decoder_attention_heads",
    "activation_fn",
    "decoder_normalize_before",
    "share_decoder_input_output_embed",
    "no_token_positional_embeddings",
    "decoder_learned_pos",
)


@pytest.mark.parametrize("name", UNSEEN)
def test_missing_options_are_requested_and_recorded_as_given(
    write: Write, omega, options, name: str, tmp_path: Path, capsys
):
    value = options.pop(name)
    path = write(**shape("omegaconf 2.0", options, omega))
    command = ["unit_lm", str(path), str(tmp_path / "lm")]
    with pytest.raises(SystemExit, match=f"lacks the options {name}") as raised:
        main(command)
    flag = f"--heads={value}" if name.endswith("heads") else f"--option={name}={str(value).lower()}"
    assert flag.partition("=")[0] in str(raised.value)
    main([*command, flag])
    assert read_unit_lm(tmp_path / "lm")[2]["provenance"]["options_given"] == {name: value}


def test_the_flags_of_the_message_work(write: Write, tmp_path: Path):
    """A bare state dict has no options; with the flags of the message it can be imported."""
    path = write(args=None, cfg=None)
    command = ["unit_lm", str(path), str(tmp_path / "lm")]
    with pytest.raises(SystemExit) as raised:
        main(command)
    flags = [word for word in str(raised.value).split() if word.startswith("--")]
    assert len(flags) == 8
    main([*command, *(flag.replace("16", "2") for flag in flags)])
    config, _, info = read_unit_lm(tmp_path / "lm")
    assert config.heads == 2
    assert len(info["provenance"]["options_given"]) == 8
    with pytest.raises(SystemExit, match="unknown option activaton_fn"):
        main([*command, "--force", *(flag.replace("16", "2") for flag in flags), "--option=activaton_fn=relu"])
    with pytest.raises(SystemExit, match="given as activation_fn='gelu'"):
        main([*command, "--force", *(flag.replace("16", "2").replace("=relu", "=gelu") for flag in flags)])


ASSUMED = {"no_scale_embedding": False, "add_bos_token": False, "decoder_xformers_att_config": None}


@pytest.mark.parametrize("name", ASSUMED)
def test_a_default_of_fairseq_is_printed_and_recorded(write: Write, options, tmp_path: Path, capsys, name: str):
    del options[name]
    main(["unit_lm", str(write(args=argparse.Namespace(**options))), str(tmp_path / "lm")])
    assert f"taken as fairseq's default: {name}={ASSUMED[name]}." in capsys.readouterr().out
    assert read_unit_lm(tmp_path / "lm")[2]["provenance"]["options_assumed"] == {name: ASSUMED[name]}


@pytest.mark.parametrize("name", UNSEEN)
def test_an_option_of_none_is_requested_and_can_be_given(write: Write, options, name: str):
    value, options[name] = options[name], None
    path = write(args=argparse.Namespace(**options))
    with pytest.raises(ConvertError, match=f"lacks the options {name}"):
        fairseq.import_unit_lm(path)
    assert fairseq.import_unit_lm(read_checkpoint(path, {name: value}))[0].heads == 2


def test_a_flag_that_contradicts_the_checkpoint_is_refused(write: Write, options):
    path = write(args=argparse.Namespace(**options))
    with pytest.raises(ConvertError, match="has activation_fn='relu', not gelu"):
        read_checkpoint(path, {"activation_fn": "gelu"})
    assert fairseq.import_unit_lm(read_checkpoint(path, {"activation_fn": "relu"}))[0].heads == 2


def test_args_and_cfg_that_disagree_are_refused(write: Write, options):
    args = argparse.Namespace(**options, seed=1)
    same = write(args=args, cfg={"model": options, "task": {"seed": 2}})  # a seed does not matter
    assert fairseq.import_unit_lm(same)[0].heads == 2
    path = write(args=args, cfg={"model": {**options, "activation_fn": "gelu"}})
    with pytest.raises(ConvertError, match="contradicts itself: its args have activation_fn='relu', its cfg"):
        fairseq.import_unit_lm(path)


def test_interpolations_enums_and_missing_values(write: Write, omega, options):
    nested = {
        "common": {"width": 8},
        "task": {"activation": omega.Choice.relu},
        "model": {
            **options,
            "decoder_embed_dim": "${common.width}",
            "activation_fn": "${task.activation}",
            "no_scale_embedding": "???",
        },
    }
    checkpoint = read_checkpoint(write(cfg=omega.wrap(nested, "2.1", typed=True)))
    assert fairseq.import_unit_lm(checkpoint)[0].heads == 2
    assert checkpoint.options.assumed == {"no_scale_embedding": False}
    for name in ("adaptive_softmax_cutoff", "activation_fn"):
        dangling = {**nested, "model": {**nested["model"], name: "${common.absent}"}}
        with pytest.raises(ConvertError, match=rf"{name}='\$\{{common\.absent"):
            fairseq.import_unit_lm(write(cfg=omega.wrap(dangling, "2.1")))
    nested["model"]["activation_fn"] = "${oc.env:ACTIVATION}"
    with pytest.raises(ConvertError, match=r"activation_fn='\$\{oc\.env"):
        fairseq.import_unit_lm(write(cfg=omega.wrap(nested, "2.1")))
    nested["model"]["activation_fn"] = "${model.activation_fn}"
    with pytest.raises(ConvertError, match="nested too deeply"):
        fairseq.import_unit_lm(write(cfg=omega.wrap(nested, "2.1")))


class Run:
    """Would touch a file if it were run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_nothing_is_run_and_unknown_forms_are_named(write: Write, omega, options, tmp_path: Path):
    marker = tmp_path / "ran"
    for cfg in (
        Run(marker),
        {"model": Run(marker)},
        omega.wrap({"model": {**options, "activation_fn": 3}}, "2.0"),
        [1],
        3,
    ):
        with pytest.raises(ConvertError, match=r"not supported|activation_fn"):
            fairseq.import_unit_lm(write(cfg=cfg))
    with pytest.raises(ConvertError, match=r"activation_fn=<inert \w+\.open>"):
        fairseq.import_unit_lm(write(cfg={"model": {**options, "activation_fn": Run(marker)}}))
    assert not marker.exists()


def test_shared_and_recursive_containers(tmp_path: Path):
    shared: Any = {"x": 1}
    for _ in range(24):
        shared = {"a": shared, "b": shared}  # 16 million paths, 25 dicts
    assert read_options(tmp_path, {"args": shared}).get("a")
    looped: dict[str, Any] = {}
    looped["model"] = looped
    with pytest.raises(ConvertError, match="nested too deeply"):
        read_options(tmp_path, {"cfg": looped})


def tensors(tiny_lm: dict[str, np.ndarray], prefix: str, cut: str = "") -> dict[str, np.ndarray]:
    return {f"{prefix}{name.removeprefix(cut)}": value for name, value in tiny_lm.items()}


@pytest.mark.parametrize(
    ("prefix", "cut"),
    [("models.0.", ""), ("module.", ""), ("", "decoder."), ("model.", "decoder."), ("model.model.", "")],
)
def test_prefixes_of_names(write: Write, options, tiny_lm, prefix: str, cut: str):
    path = write(model=tensors(tiny_lm, prefix, cut), args=argparse.Namespace(**options))
    _, params = fairseq.import_unit_lm(path)
    np.testing.assert_array_equal(params["embed"], tiny_lm["decoder.embed_tokens.weight"])


def test_prefixes_of_some_names_only(write: Write, options, tiny_lm):
    args = argparse.Namespace(**options)
    with pytest.raises(ConvertError, match=r"unknown tensors: loss\.weight"):
        fairseq.import_unit_lm(
            write(model={**tensors(tiny_lm, "model."), "loss.weight": np.ones(2, np.float32)}, args=args)
        )
    several = {**tensors(tiny_lm, "models.0."), **tensors(tiny_lm, "models.1.")}
    with pytest.raises(ConvertError, match=r"several models, under models\.0\.decoder\., models\.1\.decoder\."):
        fairseq.import_unit_lm(write(model=several, args=args))
    twice = {**tensors(tiny_lm, "model."), "decoder.layer_norm.weight": np.ones(8, np.float32)}
    with pytest.raises(ConvertError, match=r"tensors twice, with 'model\.'"):
        fairseq.import_unit_lm(write(model=twice, args=args))


def test_numbers_of_numpy_are_numbers(write: Write, options):
    numbers = {name: np.int64(value) for name, value in options.items() if type(value) is int}
    path = write(args=argparse.Namespace(**{**options, **numbers, "decoder_normalize_before": np.bool_(True)}))
    assert fairseq.import_unit_lm(path)[0].heads == 2


def test_other_locations_of_the_weights(write: Write, torch_writer, options, tiny_lm, dictionary: Path):
    args = argparse.Namespace(**options)
    averaged = {name: value + 1 for name, value in tiny_lm.items()}
    for model, notes in (({"model": tiny_lm}, 0), ({"state_dict": tiny_lm}, 0)):
        checkpoint = read_checkpoint(write(model=model, args=args))
        assert len(checkpoint.notes) == notes
        assert fairseq.import_unit_lm(checkpoint)[0].heads == 2
    both = read_checkpoint(write(args=args, extra_state={"ema": averaged}))
    assert "left out the averaged ones (ema)" in both.notes[0]
    np.testing.assert_array_equal(fairseq.import_unit_lm(both)[1]["embed"], tiny_lm["decoder.embed_tokens.weight"])
    path = dictionary.with_name("checkpoint.pt")
    namespace = torch_writer.namespace(options)
    only = read_checkpoint(torch_writer.zip(path, {"args": namespace, "model_ema": averaged}))
    assert "Took the averaged weights (model_ema)" in only.notes[0]
    np.testing.assert_array_equal(fairseq.import_unit_lm(only)[1]["embed"], averaged["decoder.embed_tokens.weight"])
    bare = read_checkpoint(torch_writer.zip(path, tiny_lm), options)
    assert fairseq.import_unit_lm(bare)[0].heads == 2


def test_parts_of_a_checkpoint_are_refused_by_name(write: Write, options, tiny_lm, tmp_path: Path):
    args = argparse.Namespace(**options)
    for name in ("checkpoint_best-model_part-0.pt", "checkpoint_1_5-shard3.pt", "c-model_part-1-shard0.pt"):
        part = write(args=args).rename(tmp_path / name)
        with pytest.raises(ConvertError, match=r"one part of .*Merge all parts"):
            read_checkpoint(part)
    with pytest.raises(ConvertError, match=r"one shard .*FSDP"):
        read_checkpoint(write(args=args, model={"_fsdp_wrapped_module.flat_param_0": np.ones(3, np.float32)}))
    half = dict(tiny_lm)
    half["decoder.layers.0.self_attn.q_proj.weight"] = half["decoder.layers.0.self_attn.q_proj.weight"][:4]
    with pytest.raises(ConvertError, match="model-parallel"):
        read_checkpoint(write(args=args, model=half))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("decoder.embed_positions.weight", "unknown tensors: decoder.embed_positions.weight"),
        ("decoder.project_in_dim.weight", "unknown tensors"),
        ("decoder.layernorm_embedding.weight", "unknown tensors"),
        ("decoder.layers.0.fc1.weight_centroids", "unknown tensors"),
        ("decoder.adaptive_softmax.head.weight", "unknown tensors"),
        ("encoder.layers.0.fc1.weight", "a model with an encoder"),
    ],
)
def test_options_are_inferred_from_tensors(write: Write, options, tiny_lm, extra: str, message: str):
    path = write(model={**tiny_lm, extra: np.ones((2, 2), np.float32)}, args=argparse.Namespace(**options))
    with pytest.raises(ConvertError, match=message):
        fairseq.import_unit_lm(path)


def test_an_untied_output_is_found_without_the_option(write: Write, options, tiny_lm):
    del options["share_decoder_input_output_embed"]
    embed = tiny_lm["decoder.embed_tokens.weight"]
    args = argparse.Namespace(**options)
    tied = write(model={**tiny_lm, "decoder.output_projection.weight": embed.copy()}, args=args)
    assert fairseq.import_unit_lm(tied)[0].heads == 2
    with pytest.raises(ConvertError, match="differs from"):
        fairseq.import_unit_lm(write(model={**tiny_lm, "decoder.output_projection.weight": embed + 1}, args=args))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=true", True),
        ("a=False", False),
        ("a=none", None),
        ("a=3", 3),
        ("a=1e-5", 1e-5),
        ("a=0.5", 0.5),
        ("a=1,1", "1,1"),
        ("a=", ""),
    ],
)
def test_flags_are_parsed(text: str, value: Any):
    assert parse([text]) == {"a": value}
    assert type(parse([text])["a"]) is type(value)


@pytest.mark.parametrize("texts", [["relu"], ["=3"], ["a b=3"], ["a=1", "a=2"]])
def test_bad_flags_are_refused(texts: list[str]):
    with pytest.raises(ConvertError, match="NAME=VALUE"):
        parse(texts)


@pytest.mark.parametrize("heads", ["2", 2.0, True])
def test_a_size_that_is_not_an_integer_is_named(write: Write, options, heads: Any):
    options["decoder_attention_heads"] = heads
    with pytest.raises(ConvertError, match=f"decoder_attention_heads is {heads!r}, must be an integer"):
        fairseq.import_unit_lm(write(args=None, cfg={"model": options}))


def test_averages_without_a_model_are_named(torch_writer, tiny_lm, tmp_path: Path):
    path = torch_writer.zip(tmp_path / "x.pt", {"ema": tiny_lm, "extra_state": {"model_ema": tiny_lm}})
    with pytest.raises(ConvertError, match=r"2 averages of a model \(ema, model_ema\), but not the model"):
        read_checkpoint(path)
