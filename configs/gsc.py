"""Google Speech Commands v1: one of twelve words, unknown or silence; accuracy on the official test archive.

    python -m spjax.main --config=configs/gsc.py --units=UNIT_TEXT --workdir=runs/gsc

Published: 94.5 % (GSLM), 94.6 % (GSLM, learnable verbalizer), 95.16 % (SpeechPrompt v1).
Ours: 94.96 % ± 0.09 over 3 seeds, ensemble 95.29 % (n-gram 94.68 %, linear probe 93.96 %); docs/results.md.
The published train and valid lists are class-balanced resamples with replacement.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults


def get_config(options: str = "") -> ConfigDict:
    """The experiment."""
    config = defaults.prompt_tuning("gsc")
    config.prompt.update({"rank": 8, "lora_dropout": 0.1, "verbalizer_dropout": 0.1})
    config.optim.lr = 2e-3
    config.train.epochs = 6
    config.loss.noise = 0.2  # its train list holds most utterances twice: more noise and dropout against overfitting
    return defaults.with_backbone(config, options)
