"""HuBERT, wav2vec2 and WavLM against transformers with random weights: tiny and full size, on every layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import spjax
from spjax.convert.hubert import Imported, import_hubert
from spjax.encoders import hubert, transformer
from spjax.io import save_encoder
from spjax.models.hubert_config import HubertConfig
from tests.encoders.hubert_models import KINDS, TINY, error, peer, peer_layers, save_peer, speechlike

SIZES = {"dim": 1024, "layers": 24, "heads": 16, "ffn_dim": 4096}  # of the large models


def imported(kind: str, sizes: HubertConfig, folder: Path) -> tuple[Any, Imported]:
    """A random model of transformers, and its import from the files that transformers writes."""
    config = dataclasses.replace(sizes, **KINDS[kind])
    model = peer(config, kind)
    made = import_hubert(save_peer(model, folder, do_normalize=bool(config.wave_eps)))
    assert made.config == config
    return model, made


def normalised(wave: np.ndarray, config: HubertConfig) -> np.ndarray:
    """As transformers' feature extractor."""
    if not config.wave_eps:
        return wave
    return ((wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("quick_compile")
def test_every_layer_of_a_padded_batch(tmp_path: Path, kind: str):
    """Each wave of a batch has the features that transformers gives it alone, also in blocks of queries."""
    model, made = imported(kind, TINY, tmp_path)
    config, params = made.config, made.params
    waves = [normalised(speechlike(n, seed=n), config) for n in (720, 16_000, 16_300)]
    padded = np.stack([np.pad(wave, (0, 16_300 - len(wave)), constant_values=7) for wave in waves])
    lengths = np.asarray([len(wave) for wave in waves])
    run = jax.jit(lambda *args: [hubert.features(params, config, *args, layer) for layer in range(3)])
    found = run(padded, lengths)
    for row, wave in enumerate(waves):
        for layer, expected in enumerate(peer_layers(model, wave)):
            assert error(np.asarray(found[layer][row, : len(expected)]), expected) < 1e-5


@pytest.mark.usefixtures("quick_compile")
def test_features_normalise_waves_as_the_directory_says(tmp_path: Path):
    model, made = imported("wavlm_large", TINY, tmp_path / "theirs")
    save_encoder(tmp_path / "ours", made.config, made.params, "tiny")
    wave = speechlike(16_000) + np.float32(0.1)
    expected = peer_layers(model, normalised(wave, made.config))[2]
    assert error(spjax.features(wave, tmp_path / "ours", layer=2), expected) < 1e-4


def test_relative_positions_have_the_buckets_of_transformers():
    config = dataclasses.replace(TINY, **KINDS["wavlm"])
    attention, torch = peer(config, "wavlm").encoder.layers[0].attention, pytest.importorskip("torch")
    distances = torch.arange(-4999, 5000)
    table = np.arange(320, dtype=np.float32)[:, None]
    found = np.asarray(transformer.by_distance(table, 5000, 800))[:, 0]
    np.testing.assert_array_equal(found, attention._relative_positions_bucket(distances).numpy())


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Imported]:
    model, made = imported("hubert", HubertConfig(), tmp_path_factory.mktemp("full") / "model")
    assert made.read == sum(p.numel() for p in model.parameters()) - 768, "all but the mask embedding"
    return model, made


def check_every_layer(full: tuple[Any, Imported], samples: int) -> None:
    model, made = full
    config, wave = made.config, normalised(speechlike(samples, seed=samples), made.config)
    expected = peer_layers(model, wave)
    # Layer by layer, so that each is computed once and one program is used for all.
    features = jax.jit(hubert.features, static_argnums=(1, 4))
    block = jax.jit(transformer.block, static_argnums=(1, 4), static_argnames="pre_norm")
    frames = config.frames(samples)
    placed = hubert.place(made.params, config.layers)
    relative = (
        transformer.by_distance(placed["relative"]["table"], frames, config.max_distance) if config.buckets else None
    )
    norm = None
    if not config.conv_layer_norm:
        norm = hubert.ChannelNorm(*(x[None] for x in hubert.channel_norm(made.params["conv"]["0"]["kernel"], 5, wave)))
    x = features(placed, config, wave[None], np.asarray([samples]), 0, norm=norm)
    assert len(expected) == config.layers + 1
    for layer, want in enumerate(expected):
        if layer:
            weights, real = placed["layers"][str(layer - 1)], np.ones((1, frames), bool)
            x = block(weights, config.heads, x, real, hubert.FLOAT32, pre_norm=config.pre_norm, relative=relative)
        assert error(np.asarray(x[0]), want) < 1e-4, f"layer {layer}"


def test_full_size_extract(full: tuple[Any, Imported]):
    model, made = full
    wave = speechlike(8000)
    assert error(hubert.extract(made.params, made.config, [wave], 6)[0], peer_layers(model, wave)[6]) < 1e-4


@pytest.mark.parametrize("seconds", [0.03, 1.0, 3.1])
def test_full_size(full: tuple[Any, Imported], seconds: float):
    check_every_layer(full, int(seconds * 16000))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [10.0, 30.0])
def test_full_size_long(full: tuple[Any, Imported], seconds: float):
    check_every_layer(full, int(seconds * 16000))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hubert"])
def test_full_size_of_every_kind(tmp_path: Path, kind: str):
    sizes = HubertConfig(**SIZES if kind.endswith("large") else {})
    check_every_layer(imported(kind, sizes, tmp_path), 16_000)
