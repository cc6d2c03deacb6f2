"""spjax: adapt a frozen speech unit language model to classification tasks by prompt tuning.

Public API: `load_encoder`, `encode` (spjax/speech2unit/encoder.py); `load_unit_lm`, `load_prompt`, `classify_units`
(spjax/serving/classify.py).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spjax.serving.classify import UnitLM, classify_units, load_prompt, load_unit_lm
    from spjax.speech2unit.encoder import Encoder, encode, load_encoder

__all__ = ["Encoder", "UnitLM", "classify_units", "encode", "load_encoder", "load_prompt", "load_unit_lm"]

_SPEECH = {"Encoder", "encode", "load_encoder"}


def __getattr__(name: str) -> Any:
    # On first use: reading a vocabulary or a record should not cost the import of JAX.
    if name in __all__:
        home = "spjax.speech2unit.encoder" if name in _SPEECH else "spjax.serving.classify"
        return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'spjax' has no attribute {name!r}")
