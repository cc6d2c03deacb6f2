"""Arabic Speech Commands: one of six words or ten digits; accuracy on the 370 test clips.

    python -m data_pipelines.extract --task=ar_sc --raw=RAW --out=runs/units/ar_sc --encoder=log_mel --clusters=100
    python -m spjax.main --config=configs/ar_sc.py --workdir=runs/ar_sc

Ours: 94.7 % ± 1.4 over 5 seeds (n-gram baseline 99.5 %); honest split, below 4 kHz: 55.6 % ± 6.7 (61.1 %).
Published: 99.7 % (GSLM), 100 % (GSLM, learnable verbalizer), on units of HuBERT and an LM of 6,000 hours of speech.
These units are 100 clusters of log-mel spectra, and the LM has seen the 1,107 train clips alone.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults


def get_config(options: str = "") -> ConfigDict:
    """The experiment."""
    config = defaults.small("ar_sc")
    config.prompt.rank = 4
    config.optim.lr = 1e-3
    config.train.epochs = 20
    return defaults.with_backbone(config, options)
