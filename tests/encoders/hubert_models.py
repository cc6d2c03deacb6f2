"""HuBERT, wav2vec2 and WavLM with random weights, ours and transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spjax.io import files
from spjax.models.hubert_config import HubertConfig
from spjax.types import Params

TINY = HubertConfig(conv_dim=16, dim=24, layers=2, heads=2, ffn_dim=32, position_width=12, position_groups=4)


def weights(config: HubertConfig = TINY, seed: int = 0) -> Params:
    """Random weights of our tree for which every part of the encoder affects the output."""
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("kernel"):
            return (rng.standard_normal(shape) * (2 / np.prod(shape[:-1])) ** 0.5).astype(np.float32)
        return (rng.normal(path.endswith("scale"), 0.2, shape)).astype(np.float32)

    return files.unflatten({path: draw(path, shape) for path, shape in config.shapes.items()})


def speechlike(samples: int, seed: int = 0) -> np.ndarray:
    """Noise with most of its power at low frequencies, alternately loud and quiet, with an offset: float32 [n]."""
    rng = np.random.default_rng(seed)
    noise = np.convolve(rng.standard_normal(samples), np.exp(-np.arange(40) / 8), mode="same")
    envelope = 0.02 + np.abs(np.sin(np.arange(samples) / 2500 + seed))
    return (0.05 * noise * envelope + 0.003).astype(np.float32)


LARGE = {"conv_layer_norm": True, "conv_bias": True, "pre_norm": True, "wave_eps": 1e-7}
MHUBERT = {"conv_kernels": (10, 3, 3, 3, 3, 2, 2, 2), "conv_strides": (5, *7 * (2,)), "position_norm": True}
KINDS: dict[str, dict[str, Any]] = {  # fields in which a kind differs from HuBERT base
    "hubert": {},
    "hubert_large": LARGE,
    "mhubert_25hz": MHUBERT,
    "wav2vec2": {},
    "wav2vec2_large": LARGE,
    "wavlm": {"buckets": 320, "max_distance": 800},
    "wavlm_large": {**LARGE, "conv_bias": False, "buckets": 320, "max_distance": 800},
}
CLASSES = {"hubert": "Hubert", "mhubert": "Hubert", "wav2vec2": "Wav2Vec2", "wavlm": "WavLM"}  # of transformers


def peer(config: HubertConfig, kind: str = "hubert", seed: int = 0, **options: Any) -> Any:
    """A model of transformers of the same sizes, in eval mode, with random norms and biases."""
    transformers = pytest.importorskip("transformers", reason="transformers is a test dependency")
    torch = pytest.importorskip("torch", reason="torch is a test dependency")
    family = CLASSES[kind.partition("_")[0]]
    relative = {"num_buckets": config.buckets, "max_bucket_distance": config.max_distance} if config.buckets else {}
    batch_norm = {"conv_pos_batch_norm": config.position_norm} if family == "Hubert" else {}
    sizes = getattr(transformers, f"{family}Config")(
        hidden_size=config.dim, num_hidden_layers=config.layers, num_attention_heads=config.heads,
        intermediate_size=config.ffn_dim, conv_dim=[config.conv_dim] * len(config.conv_kernels),
        conv_kernel=list(config.conv_kernels), conv_stride=list(config.conv_strides),
        num_conv_pos_embeddings=config.position_width, num_conv_pos_embedding_groups=config.position_groups,
        feat_extract_norm="layer" if config.conv_layer_norm else "group", conv_bias=config.conv_bias,
        do_stable_layer_norm=config.pre_norm, **relative, **batch_norm, **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}Model")(sizes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "gru_rel_pos_const" in name:
                parameter.normal_(float(("norm" in name and name.endswith("weight")) or "const" in name), 0.2)
            elif parameter.ndim == 2:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)  # the default of 0.02 leaves attention uniform
        for name, buffer in model.named_buffers():  # of a batch norm
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.2)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def peer_layers(model: Any, wave: np.ndarray) -> list[np.ndarray]:
    """The peer's hidden states of one wave: the input of the first layer and the output of each, [F, D]."""
    import torch

    with torch.inference_mode():
        states = model(torch.from_numpy(wave)[None], output_hidden_states=True).hidden_states
    return [state[0].numpy() for state in states]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the root mean square of the features."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.sqrt(np.square(expected).mean()))


def save_peer(model: Any, directory: Path, do_normalize: bool = False) -> Path:
    """Save the peer in Hugging Face's format, with its feature extractor's options."""
    model.save_pretrained(directory)
    if do_normalize:
        (directory / "preprocessor_config.json").write_text('{"do_normalize": true, "sampling_rate": 16000}')
    return directory
