"""spjax: adapt a frozen speech unit language model to classification tasks by low-rank adapters or prompts.

Public API: `SpeechPrompt`, the predictor (spjax/serving/predictor.py), and `PromptPack`, one trained task
(spjax/storage/packs.py; banks and the hub: spjax/storage); `load_encoder`, `encode`, `features`, `speaker_f0`
(spjax/speech2unit/encoder.py); `load_unit_lm`, `load_prompt`, `classify_units` (spjax/serving/classify.py).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spjax.serving.classify import UnitLM, classify_units, load_prompt, load_unit_lm
    from spjax.serving.predictor import SpeechPrompt
    from spjax.speech2unit.encoder import Encoder, encode, features, load_encoder, speaker_f0
    from spjax.storage.packs import PromptPack

_MODULES = {
    "Encoder": "speech2unit.encoder",
    "PromptPack": "storage.packs",
    "SpeechPrompt": "serving.predictor",
    "UnitLM": "serving.classify",
    "classify_units": "serving.classify",
    "encode": "speech2unit.encoder",
    "features": "speech2unit.encoder",
    "load_encoder": "speech2unit.encoder",
    "load_prompt": "serving.classify",
    "load_unit_lm": "serving.classify",
    "speaker_f0": "speech2unit.encoder",
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
