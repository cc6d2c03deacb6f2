"""Fluent Speech Commands: action, object and location of a command; exact match of all three.

    python -m spjax.main --config=configs/fsc.py --units=UNIT_TEXT --workdir=runs/fsc
    python -m spjax.main --config=configs/fsc.py --raw=RAW/fsc --workdir=runs/fsc

Published: 97.2 % (GSLM), 97.3 % (GSLM, learnable verbalizer), 98.4 % (SpeechPrompt v1).
Ours: 99.09 % ± 0.36 over 3 seeds, ensemble 99.13 % (n-gram 98.39 %, linear probe 96.02 %); docs/results.md.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults


def get_config(options: str = "") -> ConfigDict:
    """The experiment."""
    return defaults.with_backbone(defaults.prompt_tuning("fsc"), options)
