"""Small decoders of transformers with random weights, and the same models as `spjax.convert` imports them."""

from __future__ import annotations

import functools
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spjax.convert import decoders
from spjax.models.config import UnitLMConfig
from spjax.types import Params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZE = 24  # vocabulary: padding 1, opener 2, 20 units from 4, as in spjax
_COMMON = {
    "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": SIZE, "max_position_embeddings": 64,
    "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip
_GATED = {**_COMMON, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
_OPT = {**_COMMON, "ffn_dim": 40, "num_attention_heads": 4, "dropout": 0.0}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GATED),
    "llama3": ("LlamaConfig", {**_GATED, "rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "linear": ("LlamaConfig", {**_GATED, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("MistralConfig", {**_GATED, "head_dim": 16, "sliding_window": 64}),
    "qwen2": ("Qwen2Config", {**_GATED, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "opt": ("OPTConfig", _OPT),
    "opt_350m": ("OPTConfig", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt_bare": ("OPTConfig", {**_OPT, "enable_bias": False, "activation_function": "gelu"}),
}


class Peer(NamedTuple):
    """A model of transformers, and the same in spjax."""

    model: Any
    config: UnitLMConfig
    params: Params


def make(kind: str) -> Any:
    """A model with random weights; no bias is 0 and no scale is 1."""
    name, options = CONFIGS[kind]
    torch.manual_seed(sorted(CONFIGS).index(kind))
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**options), attn_implementation="eager"
    )
    with torch.no_grad():
        for leaf in model.parameters():
            noise = torch.randn_like(leaf)
            leaf.copy_(0.3 * noise if leaf.ndim > 1 else leaf + 0.2 * noise)
    model.tie_weights()
    return model.eval()


@functools.cache
def peer(kind: str) -> Peer:
    """The model of a kind, imported from the folder that `save_pretrained` writes."""
    model = make(kind)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config, params, _, _ = decoders.import_decoder(folder, decoders.Tokens(first_unit=4))
    return Peer(model, config, jax.tree.map(jnp.asarray, params))


def error(found: Any, expected: Any) -> float:
    """Largest difference, relative to the largest number expected."""
    expected = np.asarray(expected)
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())
