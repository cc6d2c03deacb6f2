"""spjax: adapt a frozen speech unit language model to classification tasks by prompt tuning.

Public API: `load_unit_lm`, `load_prompt`, `classify_units` (spjax/serving/classify.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spjax.serving.classify import UnitLM, classify_units, load_prompt, load_unit_lm

__all__ = ["UnitLM", "classify_units", "load_prompt", "load_unit_lm"]


def __getattr__(name: str) -> Any:
    # On first use: reading a vocabulary or a record should not cost the import of JAX.
    if name in __all__:
        from spjax.serving import classify

        return getattr(classify, name)
    raise AttributeError(f"module 'spjax' has no attribute {name!r}")
