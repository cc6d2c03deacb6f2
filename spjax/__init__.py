"""spjax: adapt a frozen speech unit language model to classification tasks by low-rank adapters or prompts.

Public API: `SpeechPrompt`, the predictor (spjax/serving/predictor.py), and `PromptPack`, one trained task
(spjax/io/packs.py; banks and the hub: spjax/io); `load_encoder`, `encode`, `features`, `speaker_f0`
(spjax/encoders/encoder.py); `load_unit_lm`, `load_prompt`, `classify_units` (spjax/serving/classify.py).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spjax.encoders.encoder import Encoder, encode, features, load_encoder, speaker_f0
    from spjax.io.packs import PromptPack
    from spjax.serving.classify import UnitLM, classify_units, load_prompt, load_unit_lm
    from spjax.serving.predictor import SpeechPrompt

_MODULES = {
    "Encoder": "encoders.encoder",
    "PromptPack": "io.packs",
    "SpeechPrompt": "serving.predictor",
    "UnitLM": "serving.classify",
    "classify_units": "serving.classify",
    "encode": "encoders.encoder",
    "features": "encoders.encoder",
    "load_encoder": "encoders.encoder",
    "load_prompt": "serving.classify",
    "load_unit_lm": "serving.classify",
    "speaker_f0": "encoders.encoder",
}

__all__ = [
    "Encoder",
    "PromptPack",
    "SpeechPrompt",
    "UnitLM",
    "classify_units",
    "encode",
    "features",
    "load_encoder",
    "load_prompt",
    "load_unit_lm",
    "speaker_f0",
]


def __getattr__(name: str) -> Any:
    # Imported on first use, since reading a vocabulary or a record should not import JAX.
    if name in _MODULES:
        return getattr(importlib.import_module(f"spjax.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'spjax' has no attribute {name!r}")
