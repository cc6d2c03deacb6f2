"""Unit LMs in Hugging Face's format: files, token maps, slamkit, TWIST (tests/models/test_families.py: logits)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import spjax
from spjax import vocab
from spjax.convert import ConvertError, decoders
from spjax.convert.__main__ import main
from spjax.convert.decoders import FAMILIES, Tokens, import_decoder
from spjax.convert.options import Options
from spjax.io import StorageError, read_unit_lm, save_unit_lm
from spjax.models.config import UnitLMConfig

SIZE = 12  # of the sources' vocabulary
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12, "vocab_size": SIZE,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": True,
    "use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1, "torch_dtype": "bfloat16",
    "use_mrope": False, "max_position_embeddings": 32, "attention_dropout": 0.0, "initializer_range": 0.02,
    "rope_scaling": None, "transformers_version": "4.48.3", "use_cache": True,
}  # fmt: skip
OPT: dict[str, Any] = {
    "model_type": "opt", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 12,
    "vocab_size": SIZE, "max_position_embeddings": 16, "word_embed_proj_dim": 4, "do_layer_norm_before": False,
    "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "dropout": 0.1, "_remove_final_layer_norm": False,
    "activation_dropout": 0.0, "init_std": 0.02, "layerdrop": 0.0, "output_projection": True, "prefix": "</s>",
}  # fmt: skip
MAP = Tokens(first_unit=4, opener=2, pad=1)


def tensors(card: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Random tensors of a model, by transformers' names."""
    make, names = FAMILIES[card["model_type"]]
    config = UnitLMConfig(vocab_size=card["vocab_size"], **make(Options(Path("x/y"), card)))
    rng, found = np.random.default_rng(0), {}
    for path, shape in config.shapes.items():
        part, leaf = (path, "weight") if path in names else path.rsplit("/", 1)
        kind, name = "bias" if leaf == "bias" else "weight", f"{prefix}{names[part]}"
        shape = (shape[0] + 2, shape[1]) if path == "positions" else shape
        array = rng.normal(size=shape).astype(np.float32)
        if leaf == "kernel":
            array = array.swapaxes(-1, -2)
        if path.startswith("layers/"):
            found |= {f"{name.format(i)}.{kind}": np.ascontiguousarray(one) for i, one in enumerate(array)}
        else:
            found[f"{name}.{kind}"] = np.ascontiguousarray(array)
    return found


def write(place: Path, card: dict[str, Any], state: dict[str, np.ndarray] | None = None, **more: Any) -> Path:
    """A folder of config.json, model.safetensors and the JSON files `more`."""
    place.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors(card) if state is None else state, place / "model.safetensors")
    for name, value in {"config": card, **more}.items():
        (place / f"{name}.json").write_text(json.dumps(value))
    return place


def leaves(params: Any) -> list[np.ndarray]:
    from spjax.io import files

    return [array for _, array in sorted(files.flatten(params).items())]


def test_safetensors_shards_and_bin_are_the_same(tmp_path: Path, torch_writer: SimpleNamespace) -> None:
    state = tensors(QWEN2)
    config, params, origin, notes = import_decoder(write(tmp_path / "one", QWEN2, state), MAP)
    assert origin["tokens"] == {"opener": 2, "first_unit": 4, "units": 8}
    assert "unit 0 is token 4, unit 7 is token 11; 2 other tokens are left out" in notes[0]
    assert config.block["kv_heads"] == 1
    np.testing.assert_array_equal(params["embed"][vocab.UNIT_OFFSET :], state["model.embed_tokens.weight"][4:])
    np.testing.assert_array_equal(
        params["layers"]["ffn_gate"]["kernel"][1], state["model.layers.1.mlp.gate_proj.weight"].T
    )
    halves = [dict(list(state.items())[i::2]) for i in range(2)]
    for suffix, save in (("safetensors", safetensors.numpy.save_file), ("bin", lambda x, p: torch_writer.zip(p, x))):
        place = tmp_path / suffix
        place.mkdir()
        (place / "config.json").write_text(json.dumps(QWEN2))
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        files = [f"{stem}-{i}.{suffix}" for i in range(2)]
        for half, file in zip(halves, files, strict=True):
            save(half, place / file)
        index = {name: file for half, file in zip(halves, files, strict=True) for name in half}
        (place / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
        for ours, theirs in zip(leaves(import_decoder(place, MAP)[1]), leaves(params), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text(json.dumps(QWEN2))
    torch_writer.zip(whole / "pytorch_model.bin", {name: array.astype(np.float16) for name, array in state.items()})
    for ours, theirs in zip(leaves(import_decoder(whole, MAP)[1]), leaves(params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_the_command_and_the_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shuffled map: unit u is token u + 4, a row opens with the source's opener, absent specials never occur."""
    source = write(tmp_path / "source", QWEN2)
    flags = ["--units=5", "--first-unit=6", "--pad=0", "--opener=3"]
    main(["unit_lm", str(source), str(tmp_path / "lm"), *flags])
    assert "(2 layers, dim 8, 2 heads, ffn 12, 9 symbols)" in capsys.readouterr().out
    found = spjax.load_unit_lm(tmp_path / "lm")
    plain = import_decoder(source, Tokens(first_unit=4, opener=2, pad=1))  # its tokens are the source's
    save_unit_lm(tmp_path / "plain", plain[0], plain[1])
    reference = spjax.load_unit_lm(tmp_path / "plain")
    units = np.asarray([[4, 0, 2, 2, 1]])
    ours = np.concatenate([[[found.config.opener]], units + vocab.UNIT_OFFSET], axis=1)
    # Source token 3 is no token of `reference`; put its embedding in place of another's.
    reference.params["embed"] = reference.params["embed"].at[vocab.EOS].set(found.params["embed"][vocab.EOS])
    theirs = np.concatenate([[[vocab.EOS]], units + 6], axis=1)
    got, wanted = found.logits(ours), reference.logits(theirs)
    np.testing.assert_allclose(got[..., 4:], wanted[..., 6:11], rtol=1e-4, atol=1e-5)
    probabilities = np.exp(got - np.logaddexp.reduce(got, axis=2, keepdims=True))
    assert (probabilities[..., [vocab.BOS, vocab.UNK]] == 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=2), 1, rtol=1e-5)
    with pytest.raises(SystemExit, match="exists"):
        main(["unit_lm", str(source), str(tmp_path / "lm"), *flags])
    with pytest.raises(SystemExit, match="not a file to import"):
        main(["pgslm", str(source), str(tmp_path / "new")])


def test_slamkit(tmp_path: Path) -> None:
    """Names start with `lm.`; special tokens are followed by the units, as slamkit's tokeniser counts them."""
    card = {"model_type": "speech_language_model", "vocab_size": SIZE, "base_config": QWEN2, "twist_init": True}
    place = write(tmp_path / "slam", card, tensors(QWEN2, "lm."))
    config, params, origin, _ = import_decoder(place)
    assert origin["tokens"] == {"opener": 1, "first_unit": 2, "units": SIZE - 2}
    embed = tensors(QWEN2)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["embed"][[vocab.PAD, config.opener, 4, 13]], embed[[0, 1, 2, 11]])
    stated = {"pad_token_id": 0, "bos_eos_token_id": 3, "num_units": 5, "dedup": True, "load_fe": False}
    place = write(tmp_path / "other", card, tensors(QWEN2, "lm."), tokeniser_config=stated)
    assert import_decoder(place)[2]["tokens"] == {"opener": 3, "first_unit": 4, "units": 5}


@pytest.mark.parametrize(
    ("stated", "inner", "message"),
    [
        ({"pad_token_id": None}, {}, r"tokeniser_config\.json: the token pad is None, must be an integer"),
        ({"pad_token_id": "0"}, {}, r"tokeniser_config\.json: the token pad is '0'"),
        ({"bos_eos_token_id": [1]}, {}, r"tokeniser_config\.json: the token bos is \[1\]"),
        ({"bos_eos_token_id": True}, {}, r"tokeniser_config\.json: the token bos is True"),
        ({"num_units": "5"}, {}, "units is '5', must be an integer"),
        ({}, {"pad_token_id": "0"}, r"/config\.json: the token pad is '0'"),
    ],
)
def test_slamkits_files_that_do_not_fit_are_refused(
    tmp_path: Path, stated: dict[str, Any], inner: dict[str, Any], message: str
) -> None:
    card = {"model_type": "speech_language_model", "vocab_size": SIZE, "base_config": {**QWEN2, **inner}}
    place = write(tmp_path / "slam", card, tensors(QWEN2, "lm."), tokeniser_config=stated)
    with pytest.raises(ConvertError, match=message):
        import_decoder(place)


def test_twist(tmp_path: Path) -> None:
    """`offset` in config.json is the token of unit 0; the opener is bos_token_id, or what the user says."""
    place = write(tmp_path / "twist", {**OPT, "offset": 5})
    config, params, origin, _ = import_decoder(place)
    assert origin["tokens"] == {"opener": 2, "first_unit": 5, "units": 7}
    assert config.embed_dim == 4
    assert config.positions == "learned"
    state = tensors(OPT)
    np.testing.assert_array_equal(params["positions"], state["model.decoder.embed_positions.weight"][2:])
    np.testing.assert_array_equal(params["embed"][-1], state["model.decoder.embed_tokens.weight"][11])
    assert import_decoder(place, Tokens(opener=3))[2]["tokens"]["opener"] == 3


def test_units_by_their_names_in_the_tokenizer(tmp_path: Path) -> None:
    """Text tokens are left out; units may be in any order."""
    added = [{"id": 11 - i, "content": f"[Hu{i}]"} for i in range(4)] + [{"id": 3, "content": "<text>"}]
    tokenizer = {"model": {"vocab": {"hello": 0, "<s>": 1}}, "added_tokens": added}
    place = write(tmp_path / "spirit", QWEN2, tokenizer=tokenizer)
    _, params, _, notes = import_decoder(place, Tokens(opener=1, unit_tokens="[Hu{}]"))
    embed = tensors(QWEN2)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["embed"][[2, 4, 5, 6, 7]], embed[[1, 11, 10, 9, 8]])
    assert len(params["embed"]) == 8
    assert "7 other tokens are left out" in notes[0]
    for tokens, message in (
        (Tokens(opener=1, unit_tokens="<u{}>"), r"has no token <u0>"),
        (Tokens(opener=1, unit_tokens="[Hu{}]", units=5), r"has no token \[Hu4\]"),
        (Tokens(opener=1, unit_tokens="Hu"), r"must hold \{\} once"),
    ):
        with pytest.raises(ConvertError, match=message):
            import_decoder(place, tokens)
    for token, message in (
        (11, r"\[Hu0\] and \[Hu1\] are both token 11"),
        (3.7, r"\[Hu1\] is token 3.7"),
        (-1, r"\[Hu1\] is token -1 of the tokenizer, must be an integer of 0\.\.11"),
        (10**30, r"\[Hu1\] is token 10000"),
        ([3], r"\[Hu1\] is token \[3\]"),
    ):
        place = write(tmp_path / "named", QWEN2, vocab={"[Hu0]": 11, "[Hu1]": token})
        with pytest.raises(ConvertError, match=message):
            import_decoder(place, Tokens(opener=1, unit_tokens="[Hu{}]"))
    place = write(tmp_path / "broken", QWEN2, tokenizer={"model": {"vocab": 3}})
    with pytest.raises(ConvertError, match=r"tokenizer\.json is not a tokenizer's"):
        import_decoder(place, Tokens(opener=1, unit_tokens="[Hu{}]"))


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"model_type": "gpt2"}, "has the model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types=.*full_attention in every layer"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling=.*the kinds default, linear, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling lacks factor"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2}}, "rope_scaling=.*the kinds default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 10**400}}, "factor is 1000.*must be a positive number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "factor is None, must be a positive number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*must be a positive number"),
        ({"rms_norm_eps": 10**400}, "norm_eps is 1000.*must be a positive number"),
        ({"num_hidden_layers": True}, "layers is True, must be a positive integer"),
        ({"model_type": ["qwen2"]}, "has the model_type"),
        ({"layer_types": 3}, "layer_types=3"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "all dimen"),
        ({"qk_norm": True}, "options that spjax does not know: qk_norm"),
        ({"attention_bias": True}, "does not know: attention_bias"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ({"hidden_size": None}, "lacks the options for dim"),
        ({"num_attention_heads": 3}, "dim 8 is not a multiple of heads 3"),
        ({"num_key_value_heads": 2}, r"k_proj.weight has shape \[4, 8\], must be \[8, 8\]"),
        ({"vocab_size": 13}, r"embed_tokens.weight has shape \[12, 8\], must be \[13, 8\]"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"vocab_size": 10**30}, "vocab_size is 1000.*, must be an integer of 1"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000, must be an integer of 1"),
        ({"vocab_size": 1 << 24}, r"embed_tokens.weight has shape \[12, 8\], must be \[16777216, 8\]"),
    ],
)
def test_other_options_are_refused_by_name(tmp_path: Path, card: dict[str, Any], message: str) -> None:
    place = write(tmp_path / "x", {**QWEN2, **card}, tensors(QWEN2))
    with pytest.raises(ConvertError, match=message):
        import_decoder(place, MAP)


def test_a_padding_token_of_minus_one_is_none(tmp_path: Path) -> None:
    place = write(tmp_path / "x", {**QWEN2, "pad_token_id": -1, "bos_token_id": 1})
    assert import_decoder(place, Tokens(first_unit=4))[0].absent == (vocab.BOS, vocab.PAD, vocab.UNK)


def test_a_sliding_window_must_cover_every_position(tmp_path: Path) -> None:
    card = {**QWEN2, "model_type": "mistral"}
    del card["use_sliding_window"], card["use_mrope"]
    state = {name: array for name, array in tensors(QWEN2).items() if not name.endswith("bias")}
    assert import_decoder(write(tmp_path / "a", {**card, "sliding_window": 32}, state), MAP)[0].positions == "rotary"
    with pytest.raises(ConvertError, match="sliding_window=31"):
        import_decoder(write(tmp_path / "b", {**card, "sliding_window": 31}, state), MAP)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "lacks model.norm.weight"),
        ({"model.embed_tokens.weight": None}, "0 tensors model.embed_tokens.weight"),
        (
            {"model.layers.0.self_attn.q_norm.weight": np.ones(4, np.float32)},
            "unknown tensors: model.layers.0.self_attn.q",
        ),
        ({"model.layers.2.mlp.up_proj.weight": np.ones((12, 8), np.float32)}, "unknown tensors: model.layers.2"),
        ({"model.norm.weight": np.full(8, np.nan, np.float32)}, "holds NaN"),
        ({"lm_head.weight": np.ones((SIZE, 8), np.float32)}, "lm_head.weight differs from the token embeddings"),
        ({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}, None),
        ({"lm_head.weight": tensors(QWEN2)["model.embed_tokens.weight"]}, None),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path: Path, change: dict[str, Any], message: str | None) -> None:
    state = {name: array for name, array in (tensors(QWEN2) | change).items() if array is not None}
    place = write(tmp_path / "x", QWEN2, state)
    if message is None:
        import_decoder(place, MAP)
        return
    with pytest.raises(ConvertError, match=message):
        import_decoder(place, MAP)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (Tokens(opener=2), "does not say which tokens are units. Give --first-unit"),
        (Tokens(first_unit=4), "does not say which token opens a row. Give it: --opener"),
        (Tokens(first_unit=4, opener=2, units=9), "12 tokens, but 9 units from token 4"),
        (Tokens(first_unit=12, opener=2), "12 tokens, but 0 units"),
        (Tokens(first_unit=10**30, opener=2), "12 tokens, but 0 units from token 1000"),
        (Tokens(first_unit=4, opener=2, units=10**12), "12 tokens, but 1000000000000 units"),
        (Tokens(first_unit=4, opener=2, units=10**30), "12 tokens, but 1000.* units"),
        (Tokens(first_unit=4, opener=2, units=0), "12 tokens, but 0 units"),
        (Tokens(first_unit=4, opener=5), "opener 5 or padding None is also a unit"),
        (Tokens(first_unit=4, opener=2, pad=-1), "pad is -1"),
        (Tokens(first_unit=4, opener=2, pad=99), "12 tokens, but pad is 99. Give --pad=TOKEN of 0..11"),
        (Tokens(first_unit=4, opener=10**30), "12 tokens, but opener is 1000.*. Give --opener=TOKEN of 0..11"),
    ],
)
def test_a_token_map_that_does_not_fit_is_refused(tmp_path: Path, tokens: Tokens, message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        import_decoder(write(tmp_path / "x", QWEN2), tokens)


def test_the_block_is_stored_and_is_part_of_the_identity(tmp_path: Path) -> None:
    card = {**QWEN2, "rope_scaling": {"type": "linear", "factor": 2}}
    config, params, _, _ = import_decoder(write(tmp_path / "x", card, tensors(QWEN2)), MAP)
    identity = save_unit_lm(tmp_path / "lm", config, params)
    assert read_unit_lm(tmp_path / "lm")[0] == config
    assert config.absent == (vocab.BOS, vocab.UNK)
    assert dataclasses.replace(config, absent=[vocab.UNK, vocab.BOS, vocab.UNK]) == config
    assert save_unit_lm(tmp_path / "half", config, params, bfloat16=True) != identity
    assert read_unit_lm(tmp_path / "half")[0] == config
    other, _, _, _ = import_decoder(write(tmp_path / "y", QWEN2), MAP)
    assert save_unit_lm(tmp_path / "other", other, params) != identity, "other positions are another LM"
    path = tmp_path / "lm" / "config.json"
    stored = json.loads(path.read_text())
    assert stored["version"] == 5
    for change, message in (
        ({"dropout": 0.1}, "block is .*, may have kv_heads"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2}}, "kind is 'yarn'"),
        ({"rope_scaling": {"kind": "linear", "factor": 2, "king": 1}}, "rope_scaling is .*must have kind and factor"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling is .*must have kind and factor"),
        ({"rope_scaling": {"kind": "linear"}}, "rope_scaling is .*must have kind and factor"),
        ({"rope_scaling": {"kind": "linear", "factor": 10**400}}, "factor is 1000.*must be a positive number"),
        ({"rope_scaling": {"kind": ["linear"], "factor": 2}}, "kind is ..linear.., must be linear or llama3"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', must be an object"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*must be a positive number"),
        ({"absent": 3}, "absent is 3"),
        ({"norm": "batch"}, "norm is 'batch', must be one of layer, rms"),
        ({"qkv_bias": 1}, "qkv_bias is 1, must be true or false"),
        ({"kv_heads": -1}, "kv_heads is -1"),
        ({"norm_eps": 0}, "norm_eps is 0"),
        ({"positions": "sinusoidal"}, "rope_scaling is set, but positions is 'sinusoidal'"),
        ({"positions": "sinusoidal", "rope_scaling": None, "rope_theta": 5.0}, "rope_theta or rope_scaling is set"),
        ({"norm_eps": 10**400}, "norm_eps is 1000.*must be a positive number"),
    ):
        path.write_text(json.dumps({**stored, "block": {**stored["block"], **change}}))
        with pytest.raises(StorageError, match=message):
            read_unit_lm(tmp_path / "lm")


def test_no_family_is_known_by_name_to_the_models() -> None:
    """A family is one function and one name map here."""
    for family in FAMILIES:
        for path in (Path(decoders.__file__).parents[1] / "models").glob("*.py"):
            assert f'"{family}"' not in path.read_text()
