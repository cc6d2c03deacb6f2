"""Google Speech Commands v1: one of twelve words, unknown or silence; accuracy on the official test archive.

    python -m spjax.main --config=configs/gsc.py --units=UNIT_TEXT --workdir=runs/gsc

Published: 94.5 % (GSLM), 94.6 % (GSLM, learnable verbalizer), 95.16 % (SpeechPrompt v1).
Ours, 3 epochs: 94.95 % ± 0.54 over 3 seeds, ensemble 95.20 % (n-gram 94.68 %, linear probe 93.96 %); docs/results.md.
The published train and valid lists are class-balanced resamples with replacement.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults


def get_config(options: str = "") -> ConfigDict:
    """The experiment."""
    config = defaults.prompt_tuning("gsc")
    config.train.epochs = 5  # its train list holds most utterances twice
    return defaults.with_backbone(config, options)
