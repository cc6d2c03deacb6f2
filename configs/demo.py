"""The whole chain on speech made on the spot: six tasks, one frozen unit LM, one bank of prompts. Nothing to download.

    python -m spjax.main --config=configs/demo.py --workdir=runs/demo

Needs espeakng-loader (requirements-demo.txt). Spoken commands, intents in three slots, language, gender, accent and
voice activity; no voice speaks in two splits. Units are 100 k-means clusters of MFCC. Everything lands in the work
directory. Four to five minutes on two cores; each task's n-gram baseline stands beside it in the report.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults

TASKS = ("commands", "intents", "language", "gender", "accent", "voice_activity")


def get_config(options: str = "") -> ConfigDict:
    """The experiment. `data`, `lm` and `pretraining.data` are relative to the work directory."""
    config = defaults.prompt_tuning(",".join(TASKS))
    config.synthesis = ConfigDict({"train": 1000, "valid": 200, "test": 300, "seed": 0})
    config.data = "units"
    config.lm = "ulm/lm"
    config.pretraining.tasks = TASKS
    config.pretraining.data = "units"
    config.pretraining.lm = ConfigDict({"vocab_size": 104, "dim": 128, "layers": 4, "heads": 4, "ffn_dim": 512})
    # Little data and little time: small batches take more steps, and there is nothing to forget.
    config.pretraining.pretrain.update({"rows": 16, "epochs": 5})
    config.prompt.update({"length": 24, "separators": 8})
    config.loss.noise = 0.0
    config.optim.lr = 2e-2
    config.train.update({"seeds": (0,), "epochs": 6, "max_rows": 8, "buckets": 2})
    return defaults.with_backbone(config, options)
