"""Arabic Speech Commands: one of forty words; accuracy on 1,600 clips of four speakers not in train.

    python -m data_pipelines.extract --task=ar40 --raw=RAW --out=runs/units/ar40 --encoder=mfcc --clusters=100
    python -m spjax.main --config=configs/ar40.py --workdir=runs/ar40

Splits: data_pipelines/builders/ar40.py. The unit LM has seen the 4,400 train clips alone.

N-gram baseline, on these units: 71.6 %.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import defaults


def get_config(options: str = "") -> ConfigDict:
    """The experiment."""
    return defaults.with_backbone(defaults.small("ar40"), options)
