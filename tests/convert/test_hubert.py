"""HuBERTs of fairseq and Hugging Face: every form gives the same weights, anything else is refused by name."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from spjax.convert import ConvertError
from spjax.convert.__main__ import main
from spjax.convert.hubert import FAIRSEQ, HUGGING_FACE, Dialect, import_hubert
from spjax.io import files, read_encoder
from spjax.models.hubert_config import HubertConfig
from tests.encoders.hubert_models import KINDS, TINY, weights

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "extractor_mode": "default",
    "layer_norm_first": False,
    "conv_bias": False,
    "activation_fn": "gelu",
    "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16, 2, 2)] * 2",
    "encoder_layers": 2,
    "encoder_embed_dim": 24,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "conv_pos": 12,
    "conv_pos_groups": 4,
}
HF_OPTIONS = {
    "model_type": "hubert",
    "feat_extract_norm": "group",
    "do_stable_layer_norm": False,
    "conv_bias": False,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "conv_dim": [16] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_conv_pos_embeddings": 12,
    "num_conv_pos_embedding_groups": 4,
}


def state(dialect: Dialect, spelling: int = 0, config: HubertConfig = TINY) -> dict[str, np.ndarray]:
    """Our tiny weights with a library's names, shapes and weight norm."""
    tensors: dict[str, np.ndarray] = {}
    for path, array in files.flatten(weights(config)).items():
        *folders, kind = path.split("/")
        part, number = (folders[-1], folders[1]) if folders[0] == "layers" else (folders[0], folders[-1])
        part = "conv_layer_norm" if part == "conv_norm" and config.conv_layer_norm else part
        name = dialect.names[part].format(int(config.position_norm) if part == "position" else number)
        if path == "position/kernel" and not config.position_norm:
            direction = array.T
            magnitude = np.sqrt(np.square(direction).sum((0, 1), keepdims=True))
            scale = np.linspace(0.5, 2, 12, dtype=np.float32)  # the direction's norm must not matter
            g, v = dialect.mix[spelling]
            tensors |= {f"{name}.{g}": magnitude, f"{name}.{v}": np.ascontiguousarray(direction * scale)}
        else:
            tensors[f"{name}.{'bias' if kind == 'bias' else 'weight'}"] = np.ascontiguousarray(array.T)
    return tensors


FAIRSEQ_UNUSED = {
    "mask_emb": np.zeros(24, np.float32),
    "label_embs_concat": np.zeros((5, 4), np.float32),
    "final_proj.weight": np.zeros((4, 24), np.float32),
    "final_proj.bias": np.zeros(4, np.float32),
}
MASK = {"masked_spec_embed": np.zeros(24, np.float32)}


def hugging_face(folder: Path, tensors: dict[str, np.ndarray], writer: Any = None, **options: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**HF_OPTIONS, **options}))
    if writer:
        writer(folder / "pytorch_model.bin", tensors)
    else:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def fairseq_file(tmp_path: Path, torch_writer: SimpleNamespace) -> Any:
    """A function that writes a fairseq checkpoint of the tiny weights with changed tensors and options."""

    def write(change: Any = None, task: dict[str, Any] | None = None, **options: Any) -> Path:
        tensors = {**state(FAIRSEQ), **FAIRSEQ_UNUSED}
        if change:
            change(tensors)
        kept = {name: value for name, value in {**OPTIONS, **options}.items() if value is not None}
        cfg = {"model": kept, "task": task or {"normalize": False}}
        return torch_writer.zip(tmp_path / "tiny.pt", {"args": None, "cfg": cfg, "model": tensors})

    return write


def check(made: Any) -> None:
    assert made.config == TINY
    expected = files.flatten(weights())
    found = files.flatten(made.params)
    assert found.keys() == expected.keys()
    for path, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected[path], rtol=1e-6 * (path == "position/kernel"))
    assert made.read == TINY.num_params + TINY.position_width, "weight norm has a number for each tap"


def test_fairseq(fairseq_file: Any):
    made = import_hubert(fairseq_file())
    check(made)
    assert made.unused == tuple(sorted(FAIRSEQ_UNUSED))


@pytest.mark.parametrize("spelling", [0, 1])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("prefix", ["", "hubert."])
def test_hugging_face(tmp_path: Path, torch_writer: SimpleNamespace, spelling: int, kind: str, prefix: str):
    tensors = {f"{prefix}{name}": array for name, array in {**state(HUGGING_FACE, spelling), **MASK}.items()}
    if prefix:
        tensors |= {"lm_head.weight": np.zeros((9, 24), np.float32), "lm_head.bias": np.zeros(9, np.float32)}
    writer = None if kind == "safetensors" else getattr(torch_writer, kind)
    folder = hugging_face(tmp_path / "model", tensors, writer)
    made = import_hubert(folder)
    check(made)
    assert made.unused == (("lm_head.bias", "lm_head.weight") if prefix else ()) + ("masked_spec_embed",)
    check(import_hubert(made.source))


def test_the_golden_checkpoint(golden: Path):
    made = import_hubert(golden / "hubert" / "hubert_tiny.pt")
    arrays = dict(np.load(golden / "hubert" / "hubert_tiny_state.npz"))
    assert made.config == HubertConfig(conv_dim=32, dim=48, layers=7, heads=4, ffn_dim=96)
    assert made.read == sum(array.size for name, array in arrays.items() if name not in made.unused)
    layer = arrays["encoder.layers.6.self_attn.out_proj.weight"]
    np.testing.assert_array_equal(made.params["layers"]["6"]["out"]["kernel"], layer.T)
    taps = arrays["feature_extractor.conv_layers.1.0.weight"]
    np.testing.assert_array_equal(made.params["conv"]["1"]["kernel"][2], taps[:, :, 2].T)
    direction, magnitude = (arrays[f"encoder.pos_conv.0.weight_{part}"] for part in "vg")
    kernel = direction * magnitude / np.linalg.norm(direction.reshape(-1, 128), axis=0)
    # The second channel of group 2 gives the first of that group at tap 100.
    np.testing.assert_allclose(made.params["position"]["kernel"][100, 1, 6], kernel[2 * 3, 1, 100], rtol=1e-6)


def test_half_precision_is_widened(tmp_path: Path, fairseq_file: Any, torch_writer: SimpleNamespace):
    for dtype in (np.float16, ml_dtypes.bfloat16):
        narrow = {name: array.astype(dtype) for name, array in {**state(HUGGING_FACE), **MASK}.items()}
        want = np.asarray(narrow["encoder.layer_norm.weight"], np.float32)
        for kind, writer in (("st", None), ("bin", torch_writer.zip)):
            made = import_hubert(hugging_face(tmp_path / f"{np.dtype(dtype).name}-{kind}", narrow, writer))
            assert {array.dtype for array in files.flatten(made.params).values()} == {np.dtype(np.float32)}
            np.testing.assert_array_equal(made.params["norm"]["scale"], want)

    def narrow(tensors: dict[str, np.ndarray]) -> None:
        tensors.update({name: array.astype(np.float16) for name, array in tensors.items()})

    assert import_hubert(fairseq_file(narrow)).params["norm"]["bias"].dtype == np.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extractor_mode": "other"}, "made with extractor_mode='other'; spjax .*='default' or 'layer_norm'"),
        ({"extractor_mode": "layer_norm"}, r"lacks feature_extractor\.conv_layers\.0\.2\.1\.weight"),
        ({"layer_norm_first": 1}, "layer_norm_first=1; spjax computes only layer_norm_first=False or True"),
        ({"conv_bias": True}, r"lacks feature_extractor\.conv_layers\.0\.0\.bias"),
        ({"activation_fn": "relu"}, "activation_fn='relu'"),
        ({"conv_pos_batch_norm": True}, r"lacks encoder\.pos_conv\.1\.weight"),
        ({"encoder_attention_heads": None}, "lacks the options encoder_attention_heads"),
        ({"encoder_attention_heads": 5}, "not a multiple of heads 5"),
        ({"encoder_layers": 3}, r"lacks encoder\.layers\.2\.self_attn\.q_proj\.weight"),
        ({"encoder_layers": 1}, r"unknown tensors: encoder\.layers\.1\.fc1\.bias"),
        ({"encoder_ffn_embed_dim": 33}, r"fc1\.weight has shape \[32, 24\], must be \[33, 24\]"),
        ({"conv_feature_layers": "__import__('os').abort()"}, "conv_feature_layers is .*not supported"),
        ({"conv_feature_layers": "[(16,10,5)] + [(8,3,2)] * 6"}, "convolutions of one width"),
        ({"conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 5"}, "conv_layers.5.0.weight has shape"),
    ],
)
def test_other_architectures_are_refused(fairseq_file: Any, options: dict[str, Any], message: str):
    path = fairseq_file(**options)
    with pytest.raises(ConvertError, match=message) as raised:
        import_hubert(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.pos_conv.0.weight_g"), "lacks encoder.pos_conv.0.weight_g"),
        (lambda t: t.pop("layer_norm.bias"), r"lacks layer_norm\.bias"),
        (lambda t: t.update(quantizer=np.zeros(3, np.float32)), "unknown tensors: quantizer"),
        (lambda t: t["layer_norm.bias"].fill(np.nan), r"layer_norm\.bias holds NaN"),
        (lambda t: t["encoder.pos_conv.0.weight_v"][..., 3].fill(0), "weight_v has a tap of zeros"),
        (lambda t: t.update({"layer_norm.bias": np.zeros(16, np.int64)}), "is int64, must be float32"),
    ],
)
def test_other_tensors_are_refused(fairseq_file: Any, change: Any, message: str):
    with pytest.raises(ConvertError, match=message):
        import_hubert(fairseq_file(change))


def test_waves_that_fairseq_normalises(fairseq_file: Any):
    assert import_hubert(fairseq_file(task={"normalize": True})).config.wave_eps == 1e-5
    with pytest.raises(ConvertError, match="normalize='yes'"):
        import_hubert(fairseq_file(task={"normalize": "yes"}))


@pytest.mark.parametrize("kind", ["hubert_large", "mhubert_25hz"])
def test_other_kinds_of_fairseq(torch_writer: SimpleNamespace, tmp_path: Path, kind: str):
    config = dataclasses.replace(TINY, **{**KINDS[kind], "wave_eps": 1e-5 if kind == "hubert_large" else 0.0})
    tensors = {**state(FAIRSEQ, config=config), **FAIRSEQ_UNUSED}
    if config.pre_norm:
        tensors |= {f"encoder.layer_norm.{part}": np.ones(24, np.float32) for part in ("weight", "bias")}
    if config.position_norm:  # of mean 1 and variance 4
        tensors |= {"encoder.pos_conv.0.running_mean": np.ones(24, np.float32)}
        tensors |= {"encoder.pos_conv.0.running_var": np.full(24, 4 - 1e-5, np.float32)}
        tensors |= {"encoder.pos_conv.0.num_batches_tracked": np.zeros((), np.int64)}
    options = {
        "extractor_mode": "layer_norm" if config.conv_layer_norm else "default",
        "conv_bias": config.conv_bias,
        "layer_norm_first": config.pre_norm,
        "conv_pos_batch_norm": config.position_norm,
        "conv_feature_layers": f"[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * {len(config.conv_kernels) - 5}",
    }
    cfg = {"model": {**OPTIONS, **options}, "task": {"normalize": bool(config.wave_eps)}}
    made = import_hubert(torch_writer.zip(tmp_path / "x.pt", {"cfg": cfg, "model": tensors}))
    assert made.config == config
    assert ("encoder.layer_norm.bias" in made.unused) == config.pre_norm
    expected = weights(config)
    if config.position_norm:
        given = expected["position_norm"]
        np.testing.assert_allclose(made.params["position_norm"]["scale"], given["scale"] / 2, rtol=1e-6)
        np.testing.assert_allclose(
            made.params["position_norm"]["bias"], given["bias"] - given["scale"] / 2, rtol=1e-5, atol=1e-6
        )
        expected["position_norm"] = made.params["position_norm"]
    for path, array in files.flatten(made.params).items():
        np.testing.assert_allclose(array, files.flatten(expected)[path], rtol=1e-6, err_msg=path)


def test_normalised_waves_of_hugging_face(tmp_path: Path):
    """A group norm removes offset and level, so its models take waves as they are, unless the user says otherwise."""
    folder = hugging_face(tmp_path / "model", state(HUGGING_FACE))
    (folder / "preprocessor_config.json").write_text('{"do_normalize": true, "sampling_rate": 16000}')
    made = import_hubert(folder)
    check(made)
    assert made.provenance["notes"][0].startswith("do_normalize of preprocessor_config.json is not applied")
    assert import_hubert(folder, {"do_normalize": True}).config.wave_eps == 1e-7
    with pytest.raises(ConvertError, match="has do_normalize=True, not False"):
        import_hubert(folder, {"do_normalize": False})
    (folder / "preprocessor_config.json").write_text('{"sampling_rate": 8000}')
    with pytest.raises(ConvertError, match=r"preprocessor_config\.json has sampling_rate=8000"):
        import_hubert(folder)


@pytest.mark.parametrize("kind", ["wav2vec2", "wavlm"])
def test_command_line_of_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str):
    tensors = {f"{kind}.{name}": array for name, array in state(HUGGING_FACE).items()}
    relative: dict[str, Any] = {"num_buckets": 32, "max_bucket_distance": 80} if kind == "wavlm" else {}
    for layer in range(2) if relative else ():
        name = f"wavlm.encoder.layers.{layer}.attention"
        tensors |= {f"{name}.gru_rel_pos_linear.weight": np.ones((8, 12), np.float32)}
        tensors |= {f"{name}.gru_rel_pos_linear.bias": np.ones(8, np.float32)}
        tensors |= {f"{name}.gru_rel_pos_const": np.ones((1, 2, 1, 1), np.float32)}
    if relative:
        tensors |= {"wavlm.encoder.layers.0.attention.rel_attn_embed.weight": np.zeros((32, 2), np.float32)}
    tensors |= {"quantizer.codevectors": np.zeros((1, 4, 2), np.float32), "project_q.bias": np.zeros(2, np.float32)}
    folder = hugging_face(tmp_path / "my-model", tensors, model_type=kind, **relative)
    main([kind, str(folder), str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert f"{'WavLM' if relative else 'wav2vec2'} my_model of" in printed
    assert "left out: project_q.bias, quantizer.codevectors (10 parameters)" in printed
    config, params, info = read_encoder(tmp_path / "out")
    assert (config.buckets, info["name"]) == (32 if relative else 0, "my_model")
    if relative:
        gate = params["layers"]["1"]["gate"]
        np.testing.assert_array_equal(gate["kernel"], np.full((12, 2), 4))
        np.testing.assert_array_equal(gate["bias"], [4, 4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_stable_layer_norm": None}, "lacks the options do_stable_layer_norm"),
        ({"feat_extract_norm": "layer"}, "lacks the options do_normalize.*--option=do_normalize=true"),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm='batch'; spjax computes only.*'group' or 'layer'"),
        ({"feat_proj_layer_norm": False}, "feat_proj_layer_norm=False"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ({"feat_extract_activation": "relu"}, "feat_extract_activation='relu'"),
        ({"model_type": "data2vec-audio"}, "model_type='data2vec-audio'; spjax computes only hubert, wav2vec2, wavlm"),
        ({"model_type": "wavlm"}, "lacks the options num_buckets, max_bucket_distance"),
        ({"model_type": "wavlm", "num_buckets": 320, "max_bucket_distance": 800}, "lacks encoder.*gru_rel_pos"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06"),
        ({"conv_dim": None}, "does not say its conv_dim"),
        ({"conv_dim": [16] * 6}, "convolutions of one width"),
        ({"hidden_size": None}, "lacks the options hidden_size"),
    ],
)
def test_other_hugging_face_models_are_refused(tmp_path: Path, options: dict[str, Any], message: str):
    folder = hugging_face(tmp_path / "model", {**state(HUGGING_FACE), **MASK}, **options)
    with pytest.raises(ConvertError, match=message):
        import_hubert(folder)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path, torch_writer: SimpleNamespace):
    for value in ([1, 2], {"model": {"x": 1}}):
        with pytest.raises(ConvertError, match="not a dict of tensors"):
            import_hubert(hugging_face(tmp_path / str(type(value)), value, torch_writer.zip))  # type: ignore[arg-type]
    folder = hugging_face(tmp_path / "model", state(HUGGING_FACE))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-5])
    with pytest.raises(ConvertError, match=r"model\.safetensors is truncated or damaged"):
        import_hubert(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConvertError, match=r"config\.json is not a JSON object"):
        import_hubert(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConvertError, match=r"config\.json cannot be read.*beside"):
        import_hubert(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConvertError, match="holds neither model"):
        import_hubert(folder)
    with pytest.raises(ConvertError, match="cannot be read"):
        import_hubert(tmp_path / "absent.pt")


def test_command_line(tmp_path: Path, fairseq_file: Any, capsys: pytest.CaptureFixture[str]):
    source, out = fairseq_file(), tmp_path / "out"
    main(["hubert", str(source), str(out)])
    printed = capsys.readouterr().out
    assert f"HuBERT tiny of {TINY.num_params:,} parameters (2 layers, dim 24, 2 heads, ffn 32)" in printed
    assert "left out: final_proj.bias, final_proj.weight, label_embs_concat, mask_emb" in printed
    config, params, info = read_encoder(out)
    assert config == TINY
    assert info["name"] == "tiny"
    assert info["provenance"]["source"] == "tiny.pt"
    assert info["provenance"]["made_by"] == "HuBERT (fairseq)"
    assert info["hash"] in printed
    assert files.tree_hash(params) == info["hash"]
    with pytest.raises(SystemExit, match="exists"):
        main(["hubert", str(source), str(out)])
    main(["hubert", str(source), str(out), "--force", "--name=mine"])
    assert read_encoder(out)[2]["name"] == "mine"
    folder = hugging_face(tmp_path / "hubert-base-ls960", {**state(HUGGING_FACE), **MASK})
    main(["hubert", str(folder / "model.safetensors"), str(tmp_path / "hf")])
    assert read_encoder(tmp_path / "hf")[2]["name"] == "hubert_base_ls960"
    assert "of Hugging Face's" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .*extractor_mode"):
        main(["hubert", str(fairseq_file(extractor_mode="other")), str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_importing_needs_no_torch(fairseq_file: Any):
    code = (
        "import sys; from spjax.convert.hubert import import_hubert; import_hubert(sys.argv[1]); "
        "assert not {'torch', 'transformers', 'fairseq'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(fairseq_file())], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize(
    "name", ["layer_norm_first", "activation_fn", "conv_feature_layers", "encoder_attention_heads"]
)
def test_missing_options_are_requested(fairseq_file: Any, tmp_path: Path, name: str):
    source = fairseq_file(**{name: None})
    command = ["hubert", str(source), str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=f"lacks the options {name}.* --option={name}="):
        main(command)
    main([*command, f"--option={name}={str(OPTIONS[name]).replace('False', 'false')}"])
    assert read_encoder(tmp_path / "out")[2]["provenance"]["options_given"] == {name: OPTIONS[name]}


def test_an_activation_that_config_json_lacks_is_noted(tmp_path: Path):
    noted = import_hubert(hugging_face(tmp_path / "a", state(HUGGING_FACE))).provenance
    assert noted["options_assumed"] == {"feat_extract_activation": "gelu"}
    assert "taken as Hugging Face's default: feat_extract_activation=gelu." in noted["notes"][0]
    provenance = import_hubert(
        hugging_face(tmp_path / "b", state(HUGGING_FACE), feat_extract_activation="gelu")
    ).provenance
    assert "options_assumed" not in provenance
    assert "notes" not in provenance


@pytest.mark.parametrize("name", ["layer_norm_first", "activation_fn"])
def test_an_option_of_none_is_requested(torch_writer: SimpleNamespace, tmp_path: Path, name: str):
    cfg = {"model": {**OPTIONS, name: None}, "task": {"normalize": False}}
    path = torch_writer.zip(tmp_path / "x.pt", {"cfg": cfg, "model": state(FAIRSEQ)})
    with pytest.raises(ConvertError, match=f"lacks the options {name}"):
        import_hubert(path)
    check(import_hubert(path, {name: OPTIONS[name]}))


def test_wave_normalisation_must_be_known(fairseq_file: Any):
    source = fairseq_file(task={"seed": 1})
    with pytest.raises(ConvertError, match=r"lacks the options normalize.*--option=normalize=false"):
        import_hubert(source)
    check(import_hubert(source, {"normalize": False}))
    assert import_hubert(source, {"normalize": True}).config.wave_eps == 1e-5


def test_options_in_args(torch_writer: SimpleNamespace, tmp_path: Path):
    args = {**OPTIONS, "normalize": True}
    content = {"model": {**state(FAIRSEQ), **FAIRSEQ_UNUSED}, "cfg": None}
    path = torch_writer.zip(tmp_path / "x.pt", {**content, "args": torch_writer.namespace(args)})
    assert import_hubert(path).config.wave_eps == 1e-5
    check(
        import_hubert(torch_writer.zip(path, {**content, "args": torch_writer.namespace({**args, "normalize": False})}))
    )


@pytest.mark.parametrize("name", ["do_stable_layer_norm", "hidden_act", "layer_norm_eps", "num_attention_heads"])
def test_options_that_config_json_lacks_are_requested(tmp_path: Path, name: str):
    folder = hugging_face(tmp_path / "model", {**state(HUGGING_FACE), **MASK}, **{name: None})
    config = json.loads((folder / "config.json").read_text())
    del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvertError, match=f"lacks the options {name}"):
        import_hubert(folder)
    check(import_hubert(folder, {name: HF_OPTIONS[name]}))


def test_heads_that_features_do_not_depend_on_are_left_out(tmp_path: Path):
    extra = {
        "final_proj.weight": np.zeros((4, 24), np.float32),
        "final_proj.bias": np.zeros(4, np.float32),
        "label_embs_concat": np.zeros((5, 4), np.float32),
        "masked_spec_embed": np.zeros(24, np.float32),
    }
    made = import_hubert(hugging_face(tmp_path / "contentvec", {**state(HUGGING_FACE), **extra}))
    check(made)
    assert made.unused == tuple(sorted(extra))


HASH = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("where", "origin", "name"),
    [
        (f"hub/models--facebook--hubert-base-ls960/snapshots/{HASH}", None, "hubert_base_ls960"),
        (f"hub/models--contentvec/snapshots/{HASH}", "/tmp/x", "contentvec"),
        (f"copies/{HASH}", "facebook/hubert-base-ls960", "hubert_base_ls960"),
        (f"copies/{HASH}", None, None),
        (f"copies/{HASH}", f"cache/{HASH}", None),
        ("my-hubert", "facebook/other", "my_hubert"),
    ],
)
@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_names_are_the_models(tmp_path: Path, where: str, origin: str | None, name: str | None, file: str):
    """Files of the hub's cache are links to blobs that are named by their hash."""
    made = hugging_face(tmp_path / "made", {**state(HUGGING_FACE), **MASK}, _name_or_path=origin)
    folder = tmp_path / where
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(made.iterdir()):
        path.rename(tmp_path / "blobs" / f"{HASH}{number:024}")
        (folder / path.name).symlink_to(tmp_path / "blobs" / f"{HASH}{number:024}")
    source = folder / file
    assert import_hubert(source).name == name
    command = ["hubert", str(source), str(tmp_path / "out")]
    if name is None:
        with pytest.raises(SystemExit, match="--name=NAME"):
            main(command)
        command.append("--name=given")
    main(command)
    assert read_encoder(tmp_path / "out")[2]["name"] == (name or "given")


def test_a_hash_before_a_checkpoints_name_is_dropped(fairseq_file: Any, tmp_path: Path):
    source = fairseq_file()
    assert import_hubert(source.rename(tmp_path / f"{HASH}.hubert_base.pt")).name == "hubert_base"
