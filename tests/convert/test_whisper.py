"""Whisper encoders of Hugging Face: every file layout gives the same weights, anything else is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from spjax.convert import ConvertError
from spjax.convert.__main__ import main
from spjax.convert.whisper import import_whisper
from spjax.io import files, read_encoder
from tests.encoders.hubert_models import save_peer
from tests.encoders.whisper_models import TINY, peer, weights

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "model_type": "whisper",
    "activation_function": "gelu",
    "num_mel_bins": 16,
    "d_model": 24,
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "max_source_positions": 1500,
    "scale_embedding": True,  # of the decoder's tokens: the encoder does not read it
}
NAMES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "ffn_in": "fc1",
    "ffn_out": "fc2",
    "attn_norm": "self_attn_layer_norm",
    "ffn_norm": "final_layer_norm",
    "norm": "layer_norm",
}
DECODER = {
    "decoder.embed_tokens.weight": np.full((9, 24), np.nan, np.float32),  # never read
    "decoder.layers.0.encoder_attn.k_proj.weight": np.zeros((24, 24), np.float32),
}


def state(prefix: str = "encoder.") -> dict[str, np.ndarray]:
    """Our tiny weights with transformers' names and shapes."""
    tensors: dict[str, np.ndarray] = {}
    for path, array in files.flatten(weights()).items():
        *folders, kind = path.split("/")
        if path == "position/table":
            name = "embed_positions.weight"
        else:
            head = f"conv{int(folders[1]) + 1}" if folders[0] == "conv" else NAMES[folders[-1]]
            layer = f"layers.{folders[1]}." if folders[0] == "layers" else ""
            name = f"{layer}{head}.{'bias' if kind == 'bias' else 'weight'}"
        tensors[f"{prefix}{name}"] = np.ascontiguousarray(array if path == "position/table" else array.T)
    return tensors


def hugging_face(folder: Path, tensors: dict[str, np.ndarray], writer: Any = None, **options: Any) -> Path:
    folder.mkdir(parents=True)
    kept = {name: value for name, value in {**OPTIONS, **options}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    if writer:
        writer(folder / "pytorch_model.bin", tensors)
    else:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def shard(folder: Path) -> dict[str, str]:
    """Split model.safetensors in two shards with an index; return its weight_map."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    names = sorted(tensors)
    weight_map = {}
    for number in range(2):
        part = {name: tensors[name] for name in names[number::2]}
        safetensors.numpy.save_file(part, folder / f"model-{number + 1:05}-of-00002.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{number + 1:05}-of-00002.safetensors")
    path.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def check(made: Any) -> None:
    assert made.config == TINY
    assert files.tree_hash(made.params) == files.tree_hash(weights())
    assert made.read == TINY.num_params


@pytest.mark.parametrize("kind", ["whole", "shards", "bin"])
@pytest.mark.parametrize("prefix", ["encoder.", "model.encoder.", ""])
def test_every_file_layout(tmp_path: Path, torch_writer: SimpleNamespace, kind: str, prefix: str):
    decoder = {f"{prefix.removesuffix('encoder.')}{name}": array for name, array in DECODER.items()} if prefix else {}
    heads = {"proj_out.weight": np.zeros((9, 24), np.float32)} if prefix == "model.encoder." else {}
    folder = hugging_face(
        tmp_path / "m", {**state(prefix), **decoder, **heads}, torch_writer.zip if kind == "bin" else None
    )
    if kind == "shards":
        shard(folder)
    made = import_whisper(folder)
    check(made)
    assert made.unused == tuple(sorted({**decoder, **heads}))
    assert made.left_out == sum(array.size for array in (*decoder.values(), *heads.values()))
    check(import_whisper(made.source))
    assert len(made.provenance.get("shards_sha256", ())) == (2 if kind == "shards" else 0)


def test_files_written_by_transformers(tmp_path: Path):
    model = peer(TINY, "WhisperForConditionalGeneration")
    made = import_whisper(save_peer(model, tmp_path / "m"))
    expected = model.model.encoder.layers[1].self_attn.k_proj.weight.detach().numpy().T
    np.testing.assert_array_equal(made.params["layers"]["1"]["key"]["kernel"], expected)
    assert made.left_out == sum(p.numel() for p in model.model.decoder.parameters())
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    assert files.tree_hash(import_whisper(tmp_path / "shards").params) == files.tree_hash(made.params)


def test_half_precision_is_widened(tmp_path: Path):
    for dtype in (np.float16, ml_dtypes.bfloat16):
        narrow = {name: array.astype(dtype) for name, array in state().items()}
        made = import_whisper(hugging_face(tmp_path / np.dtype(dtype).name, narrow))
        assert {array.dtype for array in files.flatten(made.params).values()} == {np.dtype(np.float32)}
        want = np.asarray(narrow["encoder.layer_norm.weight"], np.float32)
        np.testing.assert_array_equal(made.params["norm"]["scale"], want)


def _front_end(**changes: Any) -> Callable[[Path], object]:
    options = {"feature_size": 16, "n_fft": 400, "hop_length": 160, "sampling_rate": 16_000, "padding_value": 0.0}
    return lambda folder: (folder / "preprocessor_config.json").write_text(json.dumps({**options, **changes}))


def _shards(change: Callable[[Path, dict[str, str]], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder, shard(folder))


def _index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _rewrite(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        tensors = state()
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")

    return rewrite


BAD: list[tuple[dict[str, Any], Callable[[Path], object] | None, str]] = [
    (
        {"model_type": "hubert"},
        None,
        r"is a Hugging Face model \(hubert\)\. Import it first: `python -m spjax\.convert hubert",
    ),
    ({"model_type": "data2vec-audio"}, None, r"is a Hugging Face model \(data2vec-audio\)\. spjax imports"),
    ({"activation_function": "relu"}, None, "activation_function='relu'; spjax computes only"),
    ({"encoder_attention_heads": None}, None, "lacks the options encoder_att.*--option=encoder_attention_heads"),
    ({"encoder_attention_heads": 5}, None, "not a multiple of heads 5"),
    ({"encoder_layers": "3"}, None, "layers is '3', must be a positive integer"),
    ({"encoder_layers": 4}, None, r"lacks encoder\.layers\.3\.self_attn\.q_proj\.weight"),
    ({"encoder_layers": 2}, None, r"unknown tensors: encoder\.layers\.2\.fc1\.bias"),
    ({"num_mel_bins": 80}, None, r"conv1\.weight has shape \[24, 16, 3\], must be \[24, 80, 3\]"),
    ({"max_source_positions": 1501}, None, r"embed_positions\.weight has shape \[1500, 24\]"),
    ({}, _front_end(n_fft=512), r"preprocessor_config\.json has n_fft=512; spjax computes .* n_fft=400"),
    ({}, _front_end(feature_size=80), "feature_size=80"),
    ({}, _front_end(do_normalize=True), "do_normalize=True"),
    ({}, _rewrite(lambda t: t.pop("encoder.conv2.bias")), r"lacks encoder\.conv2\.bias"),
    ({}, _rewrite(lambda t: t.update(quantizer=np.zeros(3, np.float32))), "unknown tensors: quantizer"),
    ({}, _rewrite(lambda t: t["encoder.layer_norm.bias"].fill(np.nan)), r"layer_norm\.bias holds NaN"),
    ({}, _rewrite(lambda t: t.update({"conv1.weight": t["encoder.conv1.weight"]})), "has 2 tensors encoder.conv1"),
    ({}, _rewrite(dict.clear), "has 0 tensors encoder.conv1"),
    ({}, lambda folder: _cut(folder / "model.safetensors"), r"model\.safetensors is truncated or damaged"),
    ({}, lambda folder: (folder / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
    ({}, lambda folder: (folder / "config.json").unlink(), r"config\.json cannot be read.*beside"),
    ({}, lambda folder: (folder / "model.safetensors").unlink(), "holds neither model"),
    ({}, _shards(lambda folder, _: (folder / "model-00002-of-00002.safetensors").unlink()), "00002.* is missing"),
    ({}, _shards(lambda folder, _: _cut(folder / "model-00001-of-00002.safetensors")), "00001.* is truncated"),
    ({}, _shards(lambda folder, names: _index(folder, dict.fromkeys(names, "../m/x"))), "has no weight_map"),
    ({}, _shards(lambda folder, _: _index(folder, {"a": 1})), "has no weight_map"),
    ({}, _shards(lambda folder, _: _index(folder, {"a": "model-00001-of-00002.safetensors"})), "files differ in"),
]


@pytest.mark.parametrize(("options", "change", "message"), BAD)
def test_other_inputs_are_refused(tmp_path: Path, options: dict[str, Any], change: Any, message: str):
    folder = hugging_face(tmp_path / "m", state(), **options)
    if change:
        change(folder)
    with pytest.raises(ConvertError, match=message) as raised:
        import_whisper(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_of_another_library_is_refused(tmp_path: Path):
    (tmp_path / "tiny.en.pt").write_bytes(b"PK\x03\x04")
    for source, message in (
        ("tiny.en.pt", r"is not a Hugging Face model\. Give its dir"),
        ("absent", "cannot be read"),
    ):
        with pytest.raises(ConvertError, match=message):
            import_whisper(tmp_path / source)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, out = hugging_face(tmp_path / "whisper-tiny.en", {**state(), **DECODER}), tmp_path / "out"
    _front_end(n_samples=480_000, do_normalize=None)(source)
    main(["whisper", str(source), str(out)])
    printed = capsys.readouterr().out
    assert f"Whisper whisper_tiny.en of {TINY.num_params:,} parameters (3 layers, dim 24, 2 heads, ffn 32)" in printed
    assert "left out: decoder.embed_tokens.weight, decoder.layers.0.encoder_attn.k_proj.weight (792 para" in printed
    config, params, info = read_encoder(out)
    assert (config, info["name"], info["hash"] in printed) == (TINY, "whisper_tiny.en", True)
    assert files.tree_hash(params) == files.tree_hash(weights())
    for command, message in (
        (["whisper", str(source), str(out)], "exists"),
        (["whisper", str(out), str(tmp_path / "again")], "is a Whisper encoder, not a file to import"),
        (["hubert", str(source), str(tmp_path / "other")], r"is not a HuBERT, wav2vec2 or WavLM of .*convert whisper"),
        (["whisper", str(out / "model.safetensors"), str(tmp_path / "other")], "is a Whisper encoder. It needs no"),
        (["hubert", str(out / "model.safetensors"), str(tmp_path / "other")], "is a Whisper encoder. It needs no"),
        (["whisper", str(tmp_path / "absent"), str(tmp_path / "other")], "absent"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whisper-tiny.en"]
    main(["whisper", str(source / "model.safetensors"), str(out), "--force", "--name=mine"])
    assert read_encoder(out)[2]["name"] == "mine"


def test_importing_needs_no_torch(tmp_path: Path):
    code = (
        "import sys; from spjax.convert.whisper import import_whisper; import_whisper(sys.argv[1]); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    source = hugging_face(tmp_path / "m", state())
    subprocess.run([sys.executable, "-c", code, str(source)], cwd=ROOT, check=True, timeout=120)
