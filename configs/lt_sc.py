"""Lithuanian Speech Commands: one of thirteen words, unknown or silence; accuracy on the 98 test clips.

    python -m data_pipelines.extract --task=lt_sc --raw=RAW --out=runs/units/lt_sc --encoder=log_mel --clusters=100
    python -m spjax.main --config=configs/lt_sc.py --workdir=runs/lt_sc

Prompts on these units: 59.6 % ± 5.9 over 5 seeds (n-gram baseline 53.1 %). Adapters on Whisper units: 94.08 % ± 1.06
(94.90 %), with an LM of more speech; docs/whisper.md.
Published: 93.2 % (GSLM), 95.5 % (GSLM, learnable verbalizer), on units of HuBERT and an LM of 6,000 hours of speech.
These units are 100 clusters of log-mel spectra, and the LM has seen the 598 train clips alone.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults


def get_config(options: str = "") -> ConfigDict:
    """The experiment."""
    config = defaults.small("lt_sc")
    config.prompt.rank = 4
    config.optim.lr = 1e-3
    config.train.epochs = 20
    return defaults.with_backbone(config, options)
