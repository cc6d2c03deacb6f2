"""Pretrain a unit LM on the train units of Fluent Speech Commands and Google Speech Commands; labels are not used.

    python -m spjax.main --config=configs/pretrain_ulm.py --units=UNIT_TEXT --workdir=runs/pretrain_ulm

`--config=configs/pretrain_ulm.py:family=llama` trains a LLaMA (or qwen2, opt, gslm; docs/models.md) instead.
GSLM's sizes are dim 1024, layers 12, heads 16, ffn_dim 4096; these are a laptop's. The LM is written to WORKDIR/lm.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults


def get_config(options: str = "") -> ConfigDict:
    """The experiment."""
    return defaults.with_backbone(defaults.pretraining(), options)
