"""Whisper encoders with random weights, ours and transformers'."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spjax.io import files
from spjax.models.whisper_config import WhisperConfig
from spjax.types import Params

TINY = WhisperConfig(mels=16, dim=24, layers=3, heads=2, ffn_dim=32, positions=1500)


def weights(config: WhisperConfig = TINY, seed: int = 0) -> Params:
    """Random weights of our tree for which every part of the encoder affects the output."""
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("kernel"):
            return (rng.standard_normal(shape) * (2 / np.prod(shape[:-1])) ** 0.5).astype(np.float32)
        return (rng.normal(path.endswith("scale"), 0.2, shape)).astype(np.float32)

    return files.unflatten({path: draw(path, shape) for path, shape in config.shapes.items()})


def peer(config: WhisperConfig, kind: str = "WhisperModel", seed: int = 0) -> Any:
    """A model of transformers of the same sizes, in eval mode, with random norms, biases and positions."""
    transformers = pytest.importorskip("transformers", reason="transformers is a test dependency")
    torch = pytest.importorskip("torch", reason="torch is a test dependency")
    sizes = transformers.WhisperConfig(
        d_model=config.dim, encoder_layers=config.layers, encoder_attention_heads=config.heads,
        encoder_ffn_dim=config.ffn_dim, num_mel_bins=config.mels, max_source_positions=config.positions,
        decoder_layers=1, decoder_ffn_dim=32, decoder_attention_heads=2, vocab_size=99, max_target_positions=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(sizes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(float("norm" in name and name.endswith("weight")), 0.2)
            else:
                scale = 0.2 if "positions" in name else 1.5 * (parameter.numel() / len(parameter)) ** -0.5
                parameter.normal_(0, scale)  # the default of 0.02 leaves attention uniform
    return model


def peer_layers(encoder: Any, wave: np.ndarray, pad: bool) -> list[np.ndarray]:
    """transformers' hidden states of one wave, [F, D] each: padded to 30 s by its feature extractor, or not padded.

    Its encoder requires padding: without it, its modules are called in the order of its `forward`.
    """
    import torch
    import transformers

    extractor = transformers.WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins)
    padding = "max_length" if pad else False
    found = extractor(wave, sampling_rate=16_000, padding=padding, truncation=False, return_tensors="pt")
    with torch.inference_mode():
        if pad:
            states = encoder(found.input_features, output_hidden_states=True).hidden_states
        else:
            gelu = torch.nn.functional.gelu
            x = gelu(encoder.conv2(gelu(encoder.conv1(found.input_features)))).transpose(1, 2)
            states = [x + encoder.embed_positions.weight[: x.shape[1]]]
            for layer in encoder.layers:
                states.append(layer(states[-1], None))
            states[-1] = encoder.layer_norm(states[-1])
    return [state[0].numpy() for state in states]
