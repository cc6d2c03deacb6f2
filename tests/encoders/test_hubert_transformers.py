"""HuBERT against transformers' HubertModel with random weights: tiny, and at full size on every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from spjax.convert.hubert import Imported, import_hubert
from spjax.encoders import hubert
from spjax.models.hubert_config import HubertConfig
from tests.encoders.hubert_models import TINY, error, peer, peer_layers, save_peer, speechlike


def test_tiny_with_every_layer(tmp_path: Path):
    model = peer(TINY)
    made = import_hubert(save_peer(model, tmp_path / "tiny"))
    assert made.config == TINY
    waves = [speechlike(n, seed=n) for n in (400, 16000, 16300)]
    theirs = [peer_layers(model, wave) for wave in waves]
    for layer in range(TINY.layers + 1):
        for found, expected in zip(hubert.extract(made.params, TINY, waves, layer), theirs, strict=True):
            assert error(found, expected[layer]) < 1e-5


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Imported]:
    model = peer(HubertConfig())
    made = import_hubert(save_peer(model, tmp_path_factory.mktemp("full") / "model"))
    assert made.config == HubertConfig()
    assert made.read == sum(p.numel() for p in model.parameters()) - 768, "all but the mask embedding"
    return model, made


def check_every_layer(full: tuple[Any, Imported], samples: int) -> None:
    model, made = full
    wave = speechlike(samples, seed=samples)
    expected = peer_layers(model, wave)
    norm = hubert.ChannelNorm(*(x[None] for x in hubert.channel_norm(made.params["conv"]["0"]["kernel"], 5, wave)))
    # Layer by layer, so that each is computed once and one program is used for all.
    features, block = jax.jit(hubert.features, static_argnums=(1, 4)), jax.jit(hubert._block, static_argnums=(1, 4))
    real = np.ones((1, made.config.frames(samples)), bool)
    placed = hubert.place(made.params, 12)
    x = features(placed, made.config, wave[None], np.asarray([samples]), 0, norm=norm)
    assert len(expected) == 13
    for layer, want in enumerate(expected):
        if layer:
            x = block(placed["layers"][str(layer - 1)], made.config, x, real, hubert.FLOAT32)
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
