"""Pretrain the unit LM that goes with the package, `tiny`, on synthesised speech. Nothing to download.

    python -m spjax.main --config=configs/pretrain_tiny.py --workdir=runs/pretrain_tiny

Needs espeakng-loader (the extra demo). Speech, k-means (MFCC, 100 clusters), units, LM: what is there is kept,
so the same command goes on. What belongs in spjax/assets/tiny is written to WORKDIR/assets.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults

KINDS = ("commands", "intents", "language", "accent", "voice_activity", "english", "others")


def get_config(options: str = "") -> ConfigDict:
    """The experiment. `data` is relative to the work directory."""
    config = defaults.pretraining()
    config.speech = ConfigDict({"train": 104_000, "valid": 2000, "seed": 0})
    config.tasks = KINDS
    config.data = "units"
    config.lm = ConfigDict({"vocab_size": 104, "dim": 256, "layers": 4, "heads": 4, "ffn_dim": 1024})
    # No valid voice and no test voice is heard: unit noise keeps the LM from relying on the exact unit.
    config.pretrain.update({"rows": 32, "row_length": 192, "epochs": 5, "noise": 0.05, "checkpoint_every": 200})
    return defaults.with_backbone(config, options)
