"""The whole chain on speech made on the spot: six tasks, one frozen unit LM, one bank of adapters. Nothing to download.

    python -m spjax.main --config=configs/demo.py --workdir=runs/demo

Needs espeakng-loader (the extra demo). Spoken commands, intents in three slots, language, gender, accent and
voice activity; no voice speaks in two splits. Units and unit LM are those that go with the package ("tiny"), which has
heard none of the test voices. Everything is written to the work directory. Some four minutes on two cores; the
baselines of each task stand beside its score. For three seeds: --config.train.seeds="(0, 1, 2)"
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults

TASKS = ("commands", "intents", "language", "gender", "accent", "voice_activity")


def get_config(options: str = "") -> ConfigDict:
    """The experiment. `data`, an `lm` other than tiny, and `pretraining.data` are relative to the work directory."""
    config = defaults.on_tiny(",".join(TASKS))
    config.synthesis = ConfigDict({"train": 1000, "valid": 200, "test": 300, "seed": 0})
    config.prompt.rank = 4
    config.optim.lr = 2e-3
    # Lengths are multiples of 40, so that tasks share programs: four up to 160 units.
    config.train.update({"epochs": 4, "max_rows": 8, "buckets": 4, "multiple": 40})
    config.data = config.pretraining.data = "units"
    config.pretraining.tasks = TASKS  # what another LM, --config.lm=ulm/lm, is pretrained on
    return defaults.with_backbone(config, options)
